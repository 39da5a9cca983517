"""Prompts over time in a real ComfyUI: the nodes make what the core makes, and say what is wrong."""

import pytest
import torch
from safetensors.torch import load_file
from test_in_comfyui import generating, saving
from wan_constants import wan_constants

from sfpp_core import demo
from sfpp_core.cues import Change
from sfpp_core.geometry import VideoGeometry
from sfpp_core.sampler import LongSampler
from sfpp_core.script import read_script
from sfpp_core.student import CausalStudent
from sfpp_core.timetable import timetable

pytestmark = pytest.mark.host

TEXT = "a red circle moves right quickly [0.6s] | a blue square moves up fast [cut]"


def scheduled(text, switch="soft", **options):
    prompt = generating(seconds=1.5, **options)
    return prompt | {"text": ("SFPPPromptSchedule", {"clip": ["demo", 0], "text": text, "switch": switch})}


@pytest.mark.parametrize("switch", ["soft", "cut"])
def test_the_nodes_make_what_the_core_makes(host, switch):
    text = TEXT.replace("[cut]", "")
    outputs = host.run(scheduled(text, switch) | saving())
    seen = load_file(host.files(outputs, "save")[0])["latent_tensor"]
    parts = demo.load()
    geometry = VideoGeometry(width=64, height=64, frames=24, chunk=parts.settings.chunk)
    table = timetable(read_script(text, change=Change.parse(switch)), geometry)
    assert [entry.chunk for entry in table.entries] == [0, 1]
    student = CausalStudent(parts.network, parts.config)
    sampler = LongSampler(student=student, geometry=geometry, settings=parts.settings, seed=1)
    made = sampler.chunks(table.cues(parts.words(table.prompts)))
    expected = torch.cat(list(made), dim=2)[:, :, : seen.shape[2]]
    mean, std = wan_constants()
    torch.testing.assert_close((seen - mean) / std, expected, rtol=0, atol=2e-3)


def test_what_is_wrong_is_said_plainly(host):
    where, said = host.error(scheduled("[0s: a red circle] [5: a blue circle]") | saving())
    assert where == "SFPPPromptSchedule"
    assert "the unit of 5 is missing or unknown; write seconds as 5s" in said
    assert "^ character 22" in said
    where, said = host.error(scheduled("a red circle | ein Hund") | saving())
    assert where == "SFPPPromptSchedule"
    assert "scene 2 ('ein Hund'): the demo knows no word" in said
    half = scheduled(TEXT)
    half["averaged"] = (
        "ConditioningAverage",
        {"conditioning_to": ["text", 0], "conditioning_from": ["other", 0], "conditioning_to_strength": 0.5},
    )
    half["other"] = ("CLIPTextEncode", {"clip": ["demo", 0], "text": "a blue circle"})
    half["sampler"][1]["conditioning"] = ["averaged", 0]
    where, said = host.error(half | saving())
    assert where == "SFPPLongSampler"
    assert "another node has changed the conditioning of Prompt Schedule" in said


def test_a_first_scene_is_as_of_clip_text_encode(host):
    plain = host.run(generating(seconds=0.5) | saving())
    first = host.run(scheduled(TEXT) | saving())
    plain, first = (load_file(host.files(found, "save")[0])["latent_tensor"] for found in (plain, first))
    assert torch.equal(plain, first[:, :, : plain.shape[2]])
