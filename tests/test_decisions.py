"""What decides a video: each thing a user can ask for does, or does not, and nothing is forgotten."""

from dataclasses import fields, replace

import pytest
import tiny_demo
import torch

from sfpp_core.config import RolloutSettings
from sfpp_core.cues import Change
from sfpp_core.deciding import decisions_of
from sfpp_core.plan import Plan, plan
from sfpp_core.request import Request

OTHER_PROMPT = "a blue circle [1s] | a red circle"

DECIDES = {
    "prompt": OTHER_PROMPT,
    "switch": Change.parse("cut"),
    "seed": 5,
    "width": 48,
    "height": 48,
    "settings": {"shift": 4.0},
    "preset": "longlive",
    "student": "student",
    "weights": "live",
    "loras": "loras",
    "words": "words",
    "text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
    "start": "start",
    "encoder": "encoder",
    "storage": "fp8",
    "anchor": 0.5,
    "context_sigma": 0.1,
    "attention": "matmul",
    "device": "cuda",
    "dtype": "bfloat16",
}
"""Fields of a request that decide its chunks, each with another value; a word of the same name is a file."""

SHOWS = {
    "out": "other.mp4",
    "seconds": 4.0,
    "text_cache": "cache",
    "decoder": "decoder",
    "tile": 128,
    "latents": "latents",
    "report": "report",
    "run": "run",
    "enlarge": 2,
    "threads": 2,
}
"""Fields that decide how long it is, where it is made and how it is shown."""

WHERE = {"student", "adapters", "beginning", "settings", "device", "dtype", "attend", "request", "timetable"}
"""Fields of a plan from which what decides is taken."""

ELSEWHERE = {"geometry", "decoder", "source", "enlarge", "threads", "forecast"}
"""The others: size is compared by itself; the rest follows from these, or decides nothing."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_demo.write(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def asked(files, tmp_path):
    return Request(
        prompt="a red circle [1s] | a blue circle",
        out=str(tmp_path / "video.mp4"),
        seconds=3.0,
        width=32,
        height=32,
        settings={},
        student=files.student,
        words=files.words,
        decoder=files.decoder,
        device="cpu",
        attention="sdpa",
        threads=1,
        enlarge=1,
    )


def decided(planned: Plan):
    """Return what decides the chunks of a run but for the size."""
    texts = [planned.timetable.text(chunk) for chunk in range(4)]
    return {**decisions_of(planned), "text": texts}


def same(planned: Plan, other: Plan):
    """Return whether two plans make the same chunks: for a run, and for kept latents."""
    info, further = planned.latents_info, other.latents_info
    size = replace(planned.geometry, frames=1) == replace(other.geometry, frames=1)
    kept = replace(info, frames=1, chunks=1) == replace(further, frames=1, chunks=1)
    return size and decided(planned) == decided(other), kept


def with_field(planned: Plan, files, name, value, folder):
    """Return the plan of a request with one field changed; what no file here can be is put in by hand."""
    if name in ("student", "words", "decoder"):
        value = folder / "other.safetensors"
        value.write_bytes(getattr(files, name).read_bytes()[:-1] + b"\1")
    elif value == name:
        value = folder / name
        value.write_bytes(b"file")
    if name in ("loras", "text_encoder", "tokenizer", "start"):
        value = ((value, 0.5),) if name == "loras" else value
        return replace(planned, request=replace(planned.request, **{name: value}))
    if name == "device":
        return replace(planned, device=torch.device(value))
    return plan(replace(planned.request, **{name: value}))


def test_every_field_is_known_to_decide_or_not():
    assert DECIDES.keys() | SHOWS.keys() == {field.name for field in fields(Request)}
    assert not DECIDES.keys() & SHOWS.keys()
    assert {field.name for field in fields(Plan)} == WHERE | ELSEWHERE


@pytest.mark.parametrize("name", [*DECIDES, *SHOWS])
def test_what_decides_a_video_is_known_to_runs_and_to_kept_latents(files, asked, tmp_path, name):
    planned = plan(asked)
    value = DECIDES.get(name, SHOWS.get(name))
    if name in ("out", "latents", "run", "report", "text_cache"):
        value = tmp_path / str(value)
        value = str(value) if name == "out" else value
    changed = with_field(planned, files, name, value, tmp_path)
    assert same(planned, changed) == (name in SHOWS,) * 2


def test_every_setting_decides(asked):
    planned, others = plan(asked), {"sink_positions": "relative", "sigmas": (1.0, 0.5)}
    for field in fields(RolloutSettings):
        other = others.get(field.name, getattr(planned.settings, field.name))
        if isinstance(other, (int, float)):
            other = other + planned.settings.chunk
        changed = object.__new__(RolloutSettings)
        for each in fields(RolloutSettings):
            object.__setattr__(changed, each.name, getattr(planned.settings, each.name))
        object.__setattr__(changed, field.name, other)
        assert same(planned, replace(planned, settings=changed)) == (False, False), field.name


def test_a_file_counts_by_what_it_holds(files, asked, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files.student.read_bytes())
    assert same(plan(asked), plan(replace(asked, student=copy))) == (True, True)


@pytest.mark.parametrize(("name", "value"), [("decoder", "other"), ("tile", 128)])
def test_a_decoder_decides_where_windows_start_anew_from_its_frames(files, asked, tmp_path, name, value):
    asked = replace(asked, settings={"overlap": 3})
    if name == "decoder":
        value = tmp_path / "decoder.safetensors"
        value.write_bytes(files.decoder.read_bytes()[:-1] + b"\1")
    planned, other = plan(asked), plan(replace(asked, **{name: value}))
    assert same(planned, other) == (False, False)
    longer = plan(replace(asked, seconds=9.0))
    assert same(planned, longer) == (True, True)


@pytest.mark.parametrize(
    ("own", "controls", "said"),
    [
        (0.0, {}, []),
        (0.2, {}, ["past under noise 0.2"]),
        (0.2, {"context_sigma": 0.1}, ["past under noise 0.1"]),
        (0.0, {"context_sigma": 0.1, "anchor": 0.5}, ["past under noise 0.1", "anchor 0.5"]),
    ],
)
def test_the_plan_says_what_acts_against_drift(asked, own, controls, said):
    settings = {"context_sigma": own} if own else {}
    (line,) = (
        line for line in plan(replace(asked, settings=settings, **controls)).lines() if "rollout" in line
    )
    assert [part for part in line.split(", ") if part.startswith(("past", "anchor"))] == said
