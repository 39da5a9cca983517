"""Against ComfyUI, github.com/comfyanonymous/ComfyUI: its Wan, its causal Wan, its autoregressive sampler.

Nothing of ComfyUI is replaced but, where a test says ``exact_time``, its float32 sinusoids of the timestep.
"""

import pytest
import torch
from harness import SCHEDULE, Reference, Rollout, bidirectional_inputs, clip, error, text, whole, worst

pytestmark = pytest.mark.host
WHOLE_CLIPS = [Rollout(window=27, chunks=9), Rollout(window=7, chunk=1, chunks=7)]
TIME = pytest.mark.parametrize("exact_time", [False, True], ids=["as it is", "exact time"])


@pytest.fixture
def comfyui():
    return Reference.named("SFPP_COMFYUI", "SFPP_COMFYUI_PYTHON")


@pytest.fixture
def causal(comfyui):
    if not (comfyui.folder / "comfy/ldm/wan/ar_model.py").exists():
        pytest.skip("this ComfyUI has no causal Wan; 0.21 and later have")
    return {"module": "comfy.ldm.wan.ar_model", "kind": "CausalWanModel"}


@TIME
def test_the_bidirectional_model_is_the_same(comfyui, exact_time, measured, tmp_path):
    inputs = bidirectional_inputs()
    theirs = comfyui.run(
        "run_comfyui.py",
        tmp_path,
        inputs,
        mode="whole",
        module="comfy.ldm.wan.model",
        kind="WanModel",
        exact_time=exact_time,
    )
    measured("velocity", error(whole(inputs), theirs["velocity"]))


@TIME
@pytest.mark.parametrize("sizes", WHOLE_CLIPS, ids=str)
def test_every_pass_over_its_cache_is_the_same(comfyui, causal, sizes, exact_time, measured, tmp_path):
    """Its cache holds the whole clip and rolls nothing, so the window here is the whole clip."""
    inputs = sizes.inputs()
    theirs = comfyui.run(
        "run_comfyui.py", tmp_path, inputs, mode="passes", exact_time=exact_time, **causal, **sizes.settings
    )
    ours, _ = sizes.passes(inputs)
    measured("velocity", worst(ours["velocity"], theirs["velocity"]))
    for name in ("keys", "values"):
        measured(name, error(torch.cat(list(ours[name]), dim=2), theirs[name]))


class TheirNoise:
    """The noise of a run of theirs, where a sampler of ours looks for its own."""

    def __init__(self, first, fresh, chunk):
        self.first, self.fresh = first.split(chunk, dim=2), fresh

    def draw(self, shape, *, chunk, step, like):
        later = len(SCHEDULE.sigmas) - 1
        drawn = self.fresh[chunk * later + step - 1] if step else self.first[chunk]
        assert drawn.shape == shape
        return drawn.to(like)


@TIME
@pytest.mark.parametrize(("chunk", "image"), [(1, False), (3, False), (3, True)])
def test_its_sampler_makes_what_the_long_sampler_makes(
    comfyui, causal, chunk, image, exact_time, measured, monkeypatch, tmp_path
):
    """Theirs starts from a file: loader, guider, SamplerARVideo. Its cache never rolls, so nor does ours."""
    sizes = Rollout(window=12, chunk=chunk, chunks=9 // chunk)
    start = clip(int(image), seed=9)
    noise = clip(int(image) + 9, seed=8)
    theirs = comfyui.run(
        "run_comfyui.py",
        tmp_path,
        {"noise": noise, "text": text()} | ({"start": start} if image else {}),
        mode="sampler",
        causal_mark=True,
        exact_time=exact_time,
        seed=3,
        **sizes.settings,
    )
    own = TheirNoise(noise[:, :, start.shape[2] :], theirs["fresh"], chunk)
    monkeypatch.setattr("sfpp_core.sampler.ChunkNoise", lambda seed: own)
    made = sizes.sampler(seed=0, lead=int(image)).chunks(text(), start=start if image else None)
    measured("latents", error(torch.cat(list(made), dim=2), theirs["latents"]))
