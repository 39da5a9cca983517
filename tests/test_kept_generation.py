"""The Long Sampler with a run on disk: queued again after anything, it goes on to the same video."""

from contextlib import closing
from types import SimpleNamespace

import pack
import pytest
import tiny
import torch
from tiny import CONFIG

sampling = pack.module("nodes.sampling")
conditioning = pack.module("nodes.conditioning")
fingerprint = pack.module("nodes.model_fingerprint")
run_folder = pack.module("nodes.run_folder")
lock = pack.module("sfpp_core.run.lock")
script = pack.module("sfpp_core.script")
host = pack.module("nodes._host")

CHUNKS = 5
SECONDS = 3.5
"""56 frames: four chunks of 12 frames after one of 9, of which the last is cut."""


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "output_root", lambda: tmp_path, raising=False)
    monkeypatch.setattr(sampling.SFPPLongSampler, "hidden", SimpleNamespace(unique_id="1"))
    return tmp_path


def model(seed=0):
    """Return what a fresh server has loaded."""
    network = tiny.network(seed=seed)
    network.in_dim = network.out_dim = CONFIG.channels
    network.num_heads, network.model_type, network.img_emb, network.ref_conv = CONFIG.heads, "t2v", None, None
    for name in ("dim", "ffn_dim", "text_dim", "freq_dim", "eps"):
        setattr(network, name, getattr(CONFIG, name))
    loaded = type("WAN21", (), {})()
    loaded.diffusion_model = network
    settings = sampling.settings_of(SimpleNamespace(settings=None))
    rollout = pack.module("sfpp_core.config").RolloutSettings(window=6)
    settings = type(settings)(rollout=rollout, text_length=CONFIG.text_length)
    return SimpleNamespace(model=loaded, load_device="cpu", settings=settings, patches={})


def plain(seed=3):
    return [[tiny.text(seed=seed), {}]]


def schedule(text):
    """Return prompts over time; of each the embeddings are another random tensor."""
    read = script.read_script(text)
    rows = tuple(tiny.text(seed=len(scene.prompt)) for scene in read.scenes)
    return [[rows[0], {conditioning.KEY: conditioning.Spoken(read, rows)}]]


def queued(run="runs/a", *, seconds=SECONDS, seed=0, text=None, student=None, size=32, **more):
    """Return the latent of a sampler in a server that has just started."""
    output = sampling.SFPPLongSampler.execute(
        student or model(), text or plain(), size, size, seconds, seed, run=run, **more
    )
    assert output.values[1] == run
    return output.values[0]


def read(latent, chunks):
    """Read so many chunks, then cancel."""
    with closing(latent.source.chunks()) as found:
        return [next(found) for _ in range(chunks)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is made without a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.SFPPLongSampler, "hidden", SimpleNamespace(unique_id="1"))
        return queued("")["samples"]


def test_without_a_run_nothing_is_written(whole, output):
    assert whole.shape[2] == 15
    assert not list(output.iterdir())


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_cancelled_run_goes_on_from_its_chunks_to_the_same_bits(whole, output, stop, restarted):
    latent = queued()
    assert latent.source.kept == 0
    read(latent, stop)
    assert not lock.is_locked(output / "runs/a")
    assert len(list((output / "runs/a/latents").iterdir())) == stop
    again = queued() if restarted else latent
    assert (again.source.kept, again.source.origin) == (stop, "run runs/a")
    assert torch.equal(again["samples"], whole)
    assert f"{stop} of {CHUNKS} chunks from run runs/a" in pack.SAID[-1]


def test_a_finished_run_is_read_and_the_model_is_not_asked(whole, monkeypatch):
    assert torch.equal(queued()["samples"], whole)
    again = queued()
    monkeypatch.setattr(host, "load", None)
    assert torch.equal(again["samples"], whole)


def test_the_run_is_locked_while_it_is_read(output):
    latent = queued()
    with closing(latent.source.chunks()) as chunks:
        next(chunks)
        assert lock.is_locked(output / "runs/a")
        with pytest.raises(ValueError, match="is being worked on by process"):
            queued()["samples"]
    assert not lock.is_locked(output / "runs/a")


def test_chunks_are_not_kept_in_memory():
    latent = queued()
    read(latent, CHUNKS)
    assert not latent.source._finished


def test_a_longer_video_goes_on_and_a_shorter_one_is_its_beginning(whole):
    first = queued(seconds=2.0)["samples"]
    assert torch.equal(first, whole[:, :, : first.shape[2]])
    assert torch.equal(queued()["samples"], whole)
    short = queued(seconds=2.0)
    assert short.source.kept == short.source.total_chunks == 3
    assert torch.equal(short["samples"], first)
    assert queued().source.kept == CHUNKS


def test_a_shorter_video_of_a_longer_run_that_was_stopped_goes_on(whole):
    read(queued(), 1)
    first = queued(seconds=2.0)["samples"]
    assert torch.equal(first, whole[:, :, : first.shape[2]])
    assert queued().source.kept == 3


def test_a_prompt_that_changes_later_keeps_what_came_before(output):
    before = queued(text=schedule("[0s: one] [2s: three]"))["samples"]
    changed = queued(text=schedule("[0s: one] [2s: fourth]"))
    assert changed.source.kept == 3
    after = changed["samples"]
    assert torch.equal(after[:, :, :9], before[:, :, :9])
    assert not torch.equal(after[:, :, 9:], before[:, :, 9:])
    assert torch.equal(after, queued("runs/b", text=schedule("[0s: one] [2s: fourth]"))["samples"])
    assert len(list((output / "runs/a/aside").rglob("*.safetensors"))) == 2
    assert torch.equal(queued(text=schedule("[0s: one] [2s: three]"))["samples"], before)


def test_a_damaged_run_is_refused_in_words_for_comfyui(output):
    read(queued(), 1)
    latent = queued()
    for name in ("manifest.json", ".manifest.copy.json"):
        (output / "runs/a" / name).write_text("{}")
    for asked in (queued, lambda: latent["samples"]):
        with pytest.raises(ValueError, match=r"is no manifest.*--restart.*In ComfyUI: name another run"):
            asked()


def lora(strength=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adapter = SimpleNamespace(weights=(torch.randn(4, 4, generator=generator), None, 2.0))
    return {"diffusion_model.blocks.0.self_attn.q.weight": [(strength, adapter, 1.0, None, None)]}


def with_lora(**changes):
    changed = model()
    changed.patches = lora(**changes)
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"student": model(seed=5)}, "student was"),
        ({"student": with_lora()}, "loras was none and is"),
        ({"size": 48}, "made in another size"),
        ({"text": plain(seed=4)}, "the prompt was"),
        ({"cache": sampling.CacheChoice(9, 0, "absolute")}, "settings.window was 6 and is 9"),
        ({"start": {"samples": torch.zeros(1, 16, 1, 4, 4)}}, "lead was 0 and is 1"),
        ({"start": {"samples": torch.zeros(1, 16, 3, 4, 4)}}, "start was none and is"),
    ],
)
def test_another_video_is_refused_before_anything_is_made(output, changes, message):
    read(queued(), 1)
    with pytest.raises(ValueError, match=message) as caught:
        queued(**changes)
    assert "In ComfyUI: name another run" in str(caught.value)
    assert queued().source.kept == 1


@pytest.mark.parametrize("name", ["../a", "runs/../../a", "/tmp/a", ".", "a\0b"])
def test_a_run_outside_of_the_output_folder_is_refused(name):
    with pytest.raises(ValueError, match="no folder within the output folder"):
        queued(name)


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(output):
    (output / "runs/a").mkdir(parents=True)
    (output / "runs/a/picture.png").touch()
    with pytest.raises(ValueError, match=r"holds picture\.png and no run"):
        queued()["samples"]
    assert [path.name for path in (output / "runs/a").iterdir()] == ["picture.png"]


@pytest.mark.parametrize("latent_frames", [1, 3, 4, 7])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_starts_from_an_image_or_a_clip_holds_it(latent_frames, stop):
    start = {"samples": tiny.latents(1, chunk=latent_frames, size=(4, 4))}
    whole = queued("", start=start)["samples"]
    latent = queued(start=start)
    read(latent, stop)
    again = queued(start=start)
    assert latent.source.kept == again.source.kept >= stop
    chunks = list(again.source.chunks())
    assert len(chunks) == again.source.total_chunks
    assert torch.equal(torch.cat(chunks, dim=2)[:, :, : whole.shape[2]], whole)
    assert torch.equal(queued(start=start)["samples"], whole)
    with pytest.raises(ValueError, match="start was"):
        queued(start={"samples": start["samples"] + 1})


def test_runs_can_be_chained_and_a_start_without_a_run_is_refused():
    first = queued(seconds=2.0)
    second = queued("runs/b", seed=1, start=first)
    read(second, 4)
    again = queued("runs/b", seed=1, start=queued(seconds=2.0))
    assert again.source.kept == 4
    expected = queued("", seed=1, start=queued("", seconds=2.0))["samples"]
    assert torch.equal(again["samples"], expected)
    with pytest.raises(ValueError, match="start comes from a Long Sampler without a run"):
        queued("runs/c", start=queued("", seconds=2.0))


def test_a_damaged_chunk_is_made_again(whole, output, caplog):
    read(queued(), 3)
    path = output / "runs/a/latents/chunk_000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert torch.equal(queued()["samples"], whole)
    assert "2 chunks from 1 on were moved" in caplog.text


def test_the_fingerprint_knows_weights_and_loras_and_nothing_else():
    def of(loaded):
        return fingerprint.student_fingerprint(loaded), fingerprint.patches_fingerprint(loaded)

    assert of(model()) == of(model())
    assert of(model())[0] != of(model(seed=5))[0]
    assert of(model())[1] == ""
    assert of(with_lora())[0] == of(model())[0]
    assert of(with_lora())[1] == of(with_lora())[1]
    assert len({of(with_lora(strength=s, seed=n))[1] for s in (0.5, 1.0) for n in (0, 1)}) == 4
    half = model()
    half.model.diffusion_model.to(torch.float16)
    assert of(half)[0] != of(model())[0]
