"""Prompts over time on the command line."""

import json

import pytest
import tiny_demo
import torch
from tiny_demo import command, refused

from sfpp_core import cli
from sfpp_core.latents_file import load_latents

TWO = "a red circle [1s] | a blue circle moves right"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_demo.write(tmp_path_factory.mktemp("demo"))


def latents(files, folder, *more, **options):
    """Return the chunks a command makes."""
    kept = folder / f"kept{len(list(folder.iterdir()))}"
    assert (
        cli.main(command(files, folder / "video.mp4", "--latents", kept, *more, seconds="2", **options)) == 0
    )
    saved = load_latents(kept)
    return [saved.chunk(chunk) for chunk in range(saved.chunks)]


def test_prompts_change_on_time_and_what_comes_before_is_untouched(files, tmp_path, capsys):
    plain = latents(files, tmp_path, prompt="a red circle")
    capsys.readouterr()
    changed = latents(files, tmp_path, prompt=TWO)
    said = capsys.readouterr().err
    assert "scenes   scene  wanted  chunk  actual  change  prompt" in said
    assert "             2  1.00 s      2  1.31 s    soft  a blue circle moves right" in said
    assert [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)] == [True, True, False]
    script = tmp_path / "story.json"
    scenes = [{"at": 0, "prompt": "red circle"}, {"at": 1, "prompt": "blue circle moves right"}]
    script.write_text(json.dumps({"common": "a", "scenes": scenes}))
    words = command(files, tmp_path / "again.mp4", "--script", script, "--switch", "cut", "--latents")
    assert cli.main([words[0], *words[2:], str(tmp_path / "last"), "--seconds", "2"]) == 0
    again = load_latents(tmp_path / "last")
    assert [torch.equal(again.chunk(chunk), changed[chunk]) for chunk in range(3)] == [True, True, False]
    assert "cut  a blue circle moves right" in capsys.readouterr().err


def test_unknown_words_are_told_of_by_scene(files, tmp_path, capsys):
    latents(files, tmp_path, prompt="a red circle | a blue tree circle")
    assert "scene 2 ('a blue tree circle'): the demo does not know: tree" in capsys.readouterr().err
    out = tmp_path / "no.mp4"
    refused(
        capsys, command(files, out, prompt="a red circle | ein Hund"), "scene 2 ('ein Hund'): the demo knows"
    )
    assert not out.exists()


def test_what_cannot_be_is_refused_before_anything_is_loaded(files, tmp_path, capsys):
    out = tmp_path / "no.mp4"
    said = refused(
        capsys, command(files, out, prompt="[0s: a red circle] [1: a blue circle]"), "error: the unit"
    )
    assert said.splitlines()[-1].endswith("^ character 22")
    refused(
        capsys, command(files, out, "--switch", "fade"), "argument --switch: 'fade' names no way to change"
    )
    refused(
        capsys, command(files, out, "--script", tmp_path / "x"), "either a prompt, or --script with a file"
    )
    words = command(files, out)
    refused(capsys, [words[0], *words[2:]], "say what the video shows: either a prompt, or --script")
    refused(capsys, [words[0], *words[2:], "--script", str(tmp_path / "x")], "x cannot be read: No such file")
    assert not out.exists()
