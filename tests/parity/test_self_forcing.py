"""Against Self-Forcing, github.com/guandeh17/Self-Forcing: its cache, its mask, its inference loop.

What is replaced at run time to run it in float32 on a CPU is listed in ``run_wan``.
"""

import pytest
import torch
from conftest import reference
from harness import CONFIG, SCHEDULE, TOKENS, Rollout, clip, error, network, text, worst

from sfpp_core.rollout import rollout
from sfpp_core.student import CausalStudent, causal_mask

pytestmark = pytest.mark.slow
CAUSAL = "wan.modules.causal_model"


@pytest.fixture
def self_forcing():
    return reference("SFPP_SELF_FORCING", "SFPP_REFERENCE_PYTHON")


@pytest.mark.parametrize(
    "sizes",
    [
        Rollout(window=6),
        Rollout(window=9),
        Rollout(window=9, sink=3),
        Rollout(window=12, sink=3, batch=2),
        Rollout(window=21),
        Rollout(window=21, sink=3),
        Rollout(window=5, sink=2, chunk=1),
    ],
    ids=str,
)
def test_every_pass_over_a_rolling_cache_is_the_same(self_forcing, sizes, measured, tmp_path):
    inputs = sizes.inputs()
    theirs = self_forcing.run(
        "run_wan.py", tmp_path, inputs, mode="passes", module=CAUSAL, **sizes.settings
    )
    ours, cache = sizes.passes(inputs)
    for name in ("velocity", "keys", "values"):
        measured(name, worst(ours[name], theirs[name]))
    memory = [cache.chunk_keys(chunk) for chunk in sizes.remembered()]
    for name, part in (("memory_keys", 0), ("memory_values", 1)):
        kept = torch.cat([pair[part] for pair in memory], dim=3).transpose(2, 3)
        measured(name, error(kept, theirs[name]))


def test_another_window_would_be_noticed(self_forcing, tmp_path):
    """What the tests above can see: one chunk more or less in sight, and a sink that is not there."""
    sizes = Rollout(window=9, sink=3)
    inputs = sizes.inputs()
    theirs = self_forcing.run(
        "run_wan.py", tmp_path, inputs, mode="passes", module=CAUSAL, **sizes.settings
    )
    for other in (
        Rollout(window=12, sink=3, chunks=sizes.chunks),
        Rollout(window=9, chunks=sizes.chunks),
        Rollout(window=9, sink=3, positions="relative"),
    ):
        assert worst(other.passes(inputs)[0]["velocity"], theirs["velocity"]) > 1e-2


@pytest.mark.parametrize("sizes", [Rollout(window=21, chunks=7), Rollout(window=9, chunks=7)], ids=str)
def test_one_forward_under_the_training_mask_is_the_same(self_forcing, sizes, measured, tmp_path):
    latent_frames = sizes.chunk * sizes.chunks
    inputs = {"clip": clip(latent_frames), "text": text(), "sigma": torch.full((1, latent_frames), 0.9375)}
    theirs = self_forcing.run(
        "run_wan.py", tmp_path, inputs, mode="whole", module=CAUSAL, **sizes.settings
    )
    mask = causal_mask(latent_frames, TOKENS, chunk=sizes.chunk, window=sizes.window)
    with torch.inference_mode():
        bound = CausalStudent(network(), CONFIG).bind(inputs["text"])
        ours = bound.whole(inputs["clip"], inputs["sigma"], mask=mask)
    measured("velocity", error(ours, theirs["velocity"]))


def test_the_bidirectional_model_is_the_same(self_forcing, measured, tmp_path):
    inputs = {"clip": clip(9, batch=2), "text": text(2), "sigma": torch.tensor([[0.9375], [0.31]])}
    theirs = self_forcing.run("run_wan.py", tmp_path, inputs, mode="whole", module="wan.modules.model")
    with torch.inference_mode():
        ours = CausalStudent(network(), CONFIG).bind(inputs["text"]).whole(inputs["clip"], inputs["sigma"])
    measured("velocity", error(ours, theirs["velocity"]))


@pytest.mark.parametrize("sizes", [Rollout(window=9), Rollout(window=9, sink=3)], ids=str)
def test_the_inference_loop_makes_the_same_clean_chunks(self_forcing, sizes, measured, tmp_path):
    """Its steps, its noise levels, its clean pass: nothing is replayed but the noise.

    Noise levels there come from a table by the nearest timestep; the four steps are entries of that table, so
    the levels are ours but for float32.
    """
    inputs = {"noise": sizes.noise(seed=7), "text": text()}
    theirs = self_forcing.run(
        "run_wan.py", tmp_path, inputs, mode="inference", module=CAUSAL, **sizes.settings
    )
    sigmas = torch.tensor(SCHEDULE.sigmas, dtype=torch.float64)
    measured("timesteps", error(1000 * sigmas, theirs["timesteps"]), limit=1e-7)
    ours = our_rollout(sizes, seed=7)
    measured("clean chunks", worst(ours, theirs["latents"].split(sizes.chunk, dim=2)))


@torch.inference_mode()
def our_rollout(sizes, *, seed):
    """Return the clean chunks of a run of ours."""
    from sfpp_core.noise import ChunkNoise

    bound = CausalStudent(network(), CONFIG).bind(text())
    return list(
        rollout(
            bound, ChunkNoise(seed), SCHEDULE, sizes.cache(), chunks=sizes.chunks, like=clip(sizes.chunk)
        )
    )
