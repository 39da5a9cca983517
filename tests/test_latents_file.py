"""Latents on disk: decoded again as they were, whatever ended the run; other folders are refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from wan_files import TINY, write_tiny

from sfpp_core import demo
from sfpp_core.decoder import load_decoder
from sfpp_core.errors import CheckpointError, OutputError, SettingsError
from sfpp_core.latents_file import (
    LatentsInfo,
    check_latents_folder,
    decode_latents,
    load_latents,
    save_latents,
)

INFO = LatentsInfo(space="wan2.1", width=32, height=16, frames=19, chunks=2, seed=7, prompt="a red ball")


def chunks():
    torch.manual_seed(0)
    return list(torch.randn(1, 16, 6, 2, 4).split(3, dim=2))


@pytest.fixture
def folder(tmp_path):
    for number, chunk in enumerate(chunks()):
        save_latents(tmp_path / "latents", number, chunk, INFO)
    return tmp_path / "latents"


@pytest.fixture
def decoder(tmp_path):
    write_tiny(tmp_path / "tiny.safetensors", TINY)
    return load_decoder(tmp_path / "tiny.safetensors")


def test_decoded_again_they_give_the_frames_of_the_run(folder, decoder):
    expected = torch.cat([decoder.decode(chunk) for chunk in chunks()], 1)[0]
    latents = load_latents(folder)
    assert latents.complete and latents.info == INFO
    frames = list(decode_latents(latents, decoder))
    assert [len(piece) for piece in frames] == [9, 10]
    assert torch.equal(torch.cat(frames), expected[:19])


def test_what_was_saved_before_a_crash_can_be_decoded(folder, decoder):
    (folder / "chunk_000001.safetensors").unlink()
    (folder / ".chunk_000001.safetensors.part").write_bytes(b"half")
    latents = load_latents(folder / "chunk_000000.safetensors")
    assert latents.chunks == 1 and not latents.complete
    assert sum(len(piece) for piece in decode_latents(latents, decoder)) == 9


def test_a_start_picture_may_come_first(tmp_path, decoder):
    for number, chunk in enumerate(torch.randn(1, 16, 4, 2, 4).split([1, 3], dim=2)):
        save_latents(tmp_path / "latents", number, chunk.half(), INFO)
    frames = decode_latents(load_latents(tmp_path / "latents"), decoder)
    assert [len(piece) for piece in frames] == [1, 12]


def test_the_same_video_may_be_saved_again_and_another_may_not(folder):
    save_latents(folder, 0, chunks()[0], INFO)
    other = replace(INFO, seed=8)
    for refuse in (
        lambda: check_latents_folder(folder, other),
        lambda: save_latents(folder, 1, chunks()[1], other),
    ):
        with pytest.raises(OutputError, match="holds the latents of another video"):
            refuse()
    with pytest.raises(OutputError, match="is a file"):
        check_latents_folder(folder / "chunk_000000.safetensors", INFO)
    with pytest.raises(OutputError, match="cannot be made"):
        save_latents(folder / "missing" / "deep", 0, chunks()[0], INFO)


def test_the_decoder_must_be_the_models_own(folder):
    demos = load_decoder(demo.file(demo.AUTOENCODER))
    with pytest.raises(SettingsError, match=re.escape("latents of demo, these are of wan2.1")):
        next(decode_latents(load_latents(folder), demos))


def rewrite(path, *, info=None, tensors=None):
    """Write a chunk with other contents."""
    table = {"sfpp_latents": json.dumps(info)} if info is not None else {}
    save_file(tensors or load_file(path), path, metadata=table)


def as_table(**changes):
    return {name: getattr(INFO, name) for name in INFO.__slots__} | changes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "chunk_000000.safetensors").unlink(),
            "chunk_000000.safetensors is missing",
        ),
        (
            lambda folder: (folder / "chunk_000001.safetensors").write_bytes(b"\0" * 99),
            "not a safetensors file",
        ),
        (lambda folder: rewrite(folder / "chunk_000000.safetensors"), "holds no latents of a video"),
        (
            lambda folder: rewrite(folder / "chunk_000001.safetensors", info=as_table(seed=8)),
            "belongs to another video",
        ),
        (
            lambda folder: rewrite(folder / "chunk_000000.safetensors", info=as_table(seed="7")),
            "does not say what video",
        ),
        (
            lambda folder: rewrite(folder / "chunk_000000.safetensors", info=as_table(space="sd")),
            "does not say what video",
        ),
        (
            lambda folder: rewrite(folder / "chunk_000000.safetensors", info=as_table(extra=1)),
            "says something impossible",
        ),
        (
            lambda folder: rewrite(
                folder / "chunk_000001.safetensors",
                info=as_table(),
                tensors={"latents": torch.zeros(1, 16, 3, 2, 2)},
            ),
            "it is damaged",
        ),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_latents(folder)


def test_latents_that_are_not_finite_are_refused(folder, decoder):
    bad = torch.full((1, 16, 3, 2, 4), float("nan"))
    rewrite(folder / "chunk_000001.safetensors", info=as_table(), tensors={"latents": bad})
    with pytest.raises(CheckpointError, match="not finite"):
        list(decode_latents(load_latents(folder), decoder))


def test_folders_without_latents_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no latents"):
        load_latents(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_latents(tmp_path / "missing")
