"""The Prompt Schedule node: what it hands on, and what the Long Sampler makes of it."""

from contextlib import closing

import pack
import pytest
import tiny
import torch
from test_generation import generation_of

node = pack.module("nodes.prompt_schedule").SFPPPromptSchedule
conditioning = pack.module("nodes.conditioning")
sampling = pack.module("nodes.sampling")
cues = pack.module("sfpp_core.cues")
script = pack.module("sfpp_core.script")
table_of = pack.module("sfpp_core.timetable").timetable
geometry = pack.module("sfpp_core.geometry")
host = pack.module("nodes._host")
TEXTS = {"a": tiny.text(seed=3), "b": tiny.text(seed=4)}


class Clip:
    """A text encoder that knows two prompts and counts."""

    def __init__(self):
        self.encoded = []

    def __call__(self, text):
        self.encoded.append(text)
        if text not in TEXTS:
            raise ValueError(f"knows no word of {text!r}")
        return [[TEXTS[text], {"pooled_output": None}]]


@pytest.fixture
def clip(monkeypatch):
    monkeypatch.setattr(host, "encode_text", lambda clip, text: clip(text), raising=False)
    return Clip()


def scheduled(clip, text, switch="soft"):
    (value,) = node.execute(clip, text, switch).values
    return value


def test_a_schedule_is_the_conditioning_of_its_first_scene_with_all_scenes_attached(clip):
    value = scheduled(clip, "a [1s] | b [1s] | a [cut]", "blend:2")
    assert clip.encoded == ["a", "b"]  # each once
    ((first, extras),) = value
    assert first is TEXTS["a"]
    assert extras["pooled_output"] is None
    spoken = conditioning.spoken_of(value)
    assert [scene.prompt for scene in spoken.script.scenes] == ["a", "b", "a"]
    assert [str(scene.change) for scene in spoken.script.scenes] == ["blend:2", "blend:2", "cut"]
    assert all(rows is TEXTS[key] for rows, key in zip(spoken.embeddings, "aba", strict=True))


def test_one_prompt_is_plain_conditioning(clip):
    assert len(conditioning.spoken_of(scheduled(clip, "a")).embeddings) == 1
    spoken = conditioning.spoken_of([[TEXTS["a"], {}]])
    assert (len(spoken.script.scenes), spoken.embeddings[0]) == (1, TEXTS["a"])


def test_what_is_wrong_with_a_schedule_is_said_plainly(clip):
    for text, says in (
        ("[0s: a] [5: b]", r"the unit of 5 is missing .*\n.*\n +\^ character 11"),
        ("a | b | ein Hund", r"scene 3 \('ein Hund'\): knows no word of 'ein Hund'"),
        ("ein Hund", r"^knows no word of 'ein Hund'"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            scheduled(clip, text)
        assert type(caught.value) is ValueError
    with pytest.raises(ValueError, match="clip is empty; connect the text encoder"):
        scheduled(None, "a")


def test_a_node_between_schedule_and_sampler_is_refused(clip):
    ((first, extras),) = scheduled(clip, "a | b")
    with pytest.raises(ValueError, match="another node has changed the conditioning of Prompt Schedule"):
        conditioning.spoken_of([[first * 0.5, dict(extras)]])
    assert conditioning.spoken_of([[first.clone(), dict(extras)]]) is extras[conditioning.KEY]


def test_the_node_says_when_scenes_begin_and_what_is_not_shown():
    video = geometry.VideoGeometry(height=32, width=32, frames=160)
    one = table_of(script.read_script("a"), video)
    assert sampling.scene_remarks(one) == []
    several = table_of(script.read_script("a [5s] | b [5s] | a"), video)
    late, facts = sampling.scene_remarks(several)
    assert late == "scene 3 ('a') begins at 10 s and the video ends at 10 s: it is not shown."
    assert facts == "2 scenes, at 0.0 s, 5.1 s"


def test_a_video_of_several_scenes_is_stopped_and_goes_on():
    heard = [
        cues.Cue(chunk=0, embeddings=TEXTS["a"]),
        cues.Cue(chunk=3, embeddings=TEXTS["b"]),
    ]
    plain = list(generation_of()[0].chunks())
    whole = list(generation_of(text=heard)[0].chunks())
    same = [torch.equal(a, b) for a, b in zip(plain, whole, strict=True)]
    assert same == [True] * 3 + [False] * 3
    video, _ = generation_of(text=heard)
    with closing(video.chunks()) as chunks:
        for _ in range(4):
            next(chunks)
    assert all(torch.equal(a, b) for a, b in zip(video.chunks(), whole, strict=True))


def test_every_way_to_choose_is_one():
    socket = next(each for each in pack.schemas()["SFPPPromptSchedule"].inputs if each.name == "switch")
    assert [str(cues.Change.parse(name)) for name in socket.fields["options"]] == socket.fields["options"]
