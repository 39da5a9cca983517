"""Against Self-Forcing, github.com/guandeh17/Self-Forcing: its cache, its mask, its inference loop.

What is replaced at run time to run it in float32 on a CPU is listed in ``run_wan``.
"""

import harness
import pytest
import torch
from harness import SCHEDULE, Reference, Rollout, clip, error, text, whole, worst

from sfpp_core.student import causal_mask

pytestmark = pytest.mark.slow
SEED = 7


@pytest.fixture
def ask(tmp_path):
    """Return a function that asks Self-Forcing's causal model, or ``module``."""
    self_forcing = Reference.named("SFPP_SELF_FORCING")

    def asked(inputs, *, module="wan.modules.causal_model", **settings):
        return self_forcing.run("run_wan.py", tmp_path, inputs, module=module, **settings)

    return asked


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
def test_every_pass_over_a_rolling_cache_is_the_same(ask, sizes, measured):
    """Velocity of every pass, keys and values of every chunk, and what is remembered at the end."""
    inputs = sizes.inputs()
    theirs = ask(inputs, mode="passes", **sizes.settings)
    ours, cache = sizes.passes(inputs)
    for name in ("velocity", "keys", "values"):
        measured(name, worst(ours[name], theirs[name]))
    memory = [cache.chunk_keys(chunk) for chunk in sizes.remembered()]
    for name, part in (("memory_keys", 0), ("memory_values", 1)):
        kept = torch.cat([pair[part] for pair in memory], dim=3).transpose(2, 3)
        measured(name, error(kept, theirs[name]))


def test_another_window_or_sink_would_be_noticed(ask):
    """What the tests above can see: a chunk more in sight, a sink that is not there, or elsewhere in time."""
    sizes = Rollout(window=9, sink=3)
    inputs = sizes.inputs()
    theirs = ask(inputs, mode="passes", **sizes.settings)
    for other in (
        Rollout(window=12, sink=3, chunks=sizes.chunks),
        Rollout(window=9, chunks=sizes.chunks),
        Rollout(window=9, sink=3, positions="relative"),
    ):
        assert worst(other.passes(inputs)[0]["velocity"], theirs["velocity"]) > 1e-2


@pytest.mark.parametrize("sizes", [Rollout(window=21, chunks=7), Rollout(window=9, chunks=7)], ids=str)
def test_one_forward_under_the_training_mask_is_the_same(ask, sizes, measured):
    latent_frames = sizes.chunk * sizes.chunks
    inputs = {"clip": clip(latent_frames), "text": text(), "sigma": torch.full((1, latent_frames), 0.9375)}
    theirs = ask(inputs, mode="whole", **sizes.settings)
    mask = causal_mask(latent_frames, harness.TOKENS, chunk=sizes.chunk, window=sizes.window)
    measured("velocity", error(whole(inputs, mask=mask), theirs["velocity"]))


def test_the_bidirectional_model_is_the_same(ask, measured):
    inputs = harness.bidirectional_inputs()
    theirs = ask(inputs, mode="whole", module="wan.modules.model")
    measured("velocity", error(whole(inputs), theirs["velocity"]))


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("sizes", [Rollout(window=9), Rollout(window=9, sink=3)], ids=str)
def test_the_inference_loop_makes_the_chunks_of_the_long_sampler(ask, sizes, past, measured):
    """Its steps, its noise levels, its clean pass, and its way of going on from a clip of ``past`` chunks.

    Nothing is given but the noise. Noise levels there come from a table, by the nearest timestep; the four
    steps are entries of that table, so the levels are ours but for float32.
    """
    start = clip(past * sizes.chunk, seed=9)
    inputs = {"noise": sizes.noise(SEED)[past:], "text": text()} | ({"start": start} if past else {})
    theirs = ask(inputs, mode="inference", **sizes.settings)
    sigmas = torch.tensor(SCHEDULE.sigmas, dtype=torch.float64)
    measured("timesteps", error(1000 * sigmas, theirs["timesteps"]), limit=1e-7)
    given = start.split(sizes.chunk, dim=2) if past else ()
    ours = [*given, *sizes.sampler(SEED).chunks(text(), past=given)]
    measured("clean chunks", worst(ours, theirs["latents"].split(sizes.chunk, dim=2)))


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("sizes", [Rollout(window=9), Rollout(window=9, sink=3)], ids=str)
def test_a_video_that_starts_from_an_image_is_the_same(ask, sizes, chunks, measured):
    """The image alone, or with whole chunks after it.

    Here the image comes on top of the sink it belongs to; there it counts in the sink and in the window,
    which are therefore one latent frame larger. Without a sink both drop it when the window is full.
    """
    image = 1
    start = clip(image + chunks * sizes.chunk, seed=9)
    more = image if sizes.sink else 0
    settings = sizes.settings | {"window": sizes.window + more, "sink": sizes.sink + more}
    inputs = {"noise": sizes.noise(SEED)[chunks:], "text": text(), "start": start}
    theirs = ask(inputs, mode="inference", image=True, **settings)["latents"]
    ours = torch.cat(list(sizes.sampler(SEED, lead=image).chunks(text(), start=start)), dim=2)
    measured("latents", worst(ours.split(1, dim=2), theirs.split(1, dim=2)))
