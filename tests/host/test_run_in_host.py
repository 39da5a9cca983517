"""A run on disk in a real ComfyUI: cancelled, killed, restarted, rewritten, it goes on to the same video."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_in_comfyui import ROOT, decoding, generating, latent_of, prompt_of, saving
from test_prompt_schedule import scheduled

from sfpp_core.video import video_info

pytestmark = pytest.mark.host

SECONDS = 30.0
THIRD = 14
"""Of 41 chunks."""


def demo_prompt(run, seconds=SECONDS, **changes):
    """Return the demo workflow as a user queues it, with a run."""
    (path,) = (ROOT / "workflows").glob("demo*.json")
    prompt = prompt_of(json.loads(Path(path).read_text()), seconds=seconds, **changes)
    (sampler,) = (key for key, (kind, _) in prompt.items() if kind == "SFPPLongSampler")
    (video,) = (key for key, (kind, _) in prompt.items() if kind == "SFPPDecodeToVideo")
    prompt[sampler][1]["run"] = run
    return prompt, video


def chunks(host, run):
    return sorted((host.output / run / "latents").glob("[!.]*.safetensors"))


def wait_for_chunks(host, run, wanted):
    end = time.monotonic() + 300
    while len(chunks(host, run)) < wanted:
        assert time.monotonic() < end, host.log[-3000:]
        time.sleep(0.02)


def made(host, run):
    return torch.cat([load_file(path)["latents"] for path in chunks(host, run)], dim=2)


@pytest.fixture(scope="module")
def whole(host):
    """The latents of the demo workflow, undisturbed."""
    prompt, video = demo_prompt("runs/whole")
    (path,) = host.files(host.run(prompt), video)
    assert video_info(path).frames == 480
    return made(host, "runs/whole")


def test_cancelled_at_a_third_and_queued_again(host, whole):
    prompt, video = demo_prompt("runs/cancelled", filename_prefix="video/first")
    number = host.queue(prompt)
    wait_for_chunks(host, "runs/cancelled", THIRD)
    host.interrupt()
    assert host.result(number)[1] == "execution_interrupted"
    kept = len(chunks(host, "runs/cancelled"))
    assert THIRD <= kept < 41
    stamps = [path.stat().st_mtime_ns for path in chunks(host, "runs/cancelled")]
    (path,) = host.files(host.run(prompt), video)
    assert video_info(path).frames == 480
    assert [path.stat().st_mtime_ns for path in chunks(host, "runs/cancelled")][:kept] == stamps
    assert torch.equal(made(host, "runs/cancelled"), whole)


def test_killed_at_a_third_restarted_and_queued_again(new_host, whole):
    server = new_host().start()
    prompt, video = demo_prompt("runs/killed")
    server.queue(prompt)
    wait_for_chunks(server, "runs/killed", THIRD)
    server.kill()
    kept = len(chunks(server, "runs/killed"))
    assert kept < 41
    server.start()
    try:
        (path,) = server.files(server.run(prompt), video)
        assert video_info(path).frames == 480
        assert f"went on at chunk {kept} of 41, exactly" in server.log
        assert torch.equal(made(server, "runs/killed"), whole)
    finally:
        server.stop()


def test_a_prompt_changed_at_half_keeps_the_first_half(host):
    texts = [
        "[0s: a red circle moves right quickly] [5s: " + then for then in ("a blue square]", "a red star]")
    ]

    def run(text, name):
        prompt = scheduled(text, run=name)
        prompt["sampler"][1]["seconds"] = 10.0
        return latent_of(host, host.run(prompt | saving()))

    before, after = (run(text, "runs/script") for text in texts)
    half = 3 * 7  # the chunk border nearest to 5 s
    assert torch.equal(after[:, :, : half - 3], before[:, :, : half - 3])
    assert not torch.equal(after[:, :, half:], before[:, :, half:])
    assert torch.equal(run(texts[1], "runs/other"), after)
    assert list((host.output / "runs/script/aside").rglob("chunk_*.safetensors"))


def test_a_longer_one_goes_on_and_another_seed_is_refused(host):
    first = latent_of(host, host.run(generating(seconds=2, run="runs/longer") | saving()))
    longer = latent_of(host, host.run(generating(seconds=4, run="runs/longer") | saving()))
    torch.testing.assert_close(longer[:, :, : first.shape[2]], first, rtol=0, atol=0)
    kind, message = host.error(generating(seconds=4, seed=2, run="runs/longer") | saving())
    assert kind == "SFPPLongSampler"
    assert "seed was 1 and is 2" in message
    kind, message = host.error(generating(run="../longer") | saving())
    assert "no folder within the output folder" in message
    outputs = host.run(generating(seconds=2, run="runs/longer") | decoding("again"))
    assert video_info(host.files(outputs, "video")[0]).frames == 32
