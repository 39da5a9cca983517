"""The files of a demo, with random weights and the sizes of the tiny student, and commands that use them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import tiny
import torch

from sfpp_core import cli, demo
from sfpp_core.checkpoint import save, save_words
from sfpp_core.config import RolloutSettings
from sfpp_core.tiny_autoencoder import AutoencoderConfig, TinyAutoencoder
from sfpp_core.words import WordEncoder

VOCABULARY = ("a", "red", "blue", "circle", "moves", "right")
GROUPS = {"colours": ("red", "blue"), "shapes": ("circle",)}
PROMPT = "a red circle moves right"
SETTINGS = RolloutSettings(window=9)


@dataclass(frozen=True)
class DemoFiles:
    student: Path
    words: Path
    decoder: Path

    def replace(self, **files):
        return replace(self, **files)


def write(folder):
    """Write the files under the names of the embedded ones and return them."""
    files = DemoFiles(folder / demo.STUDENT, folder / demo.WORDS, folder / demo.AUTOENCODER)
    notes = {"world": "7"}
    save(files.student, tiny.network().state_dict(), tiny.CONFIG, SETTINGS, stage="ode", notes=notes)
    torch.manual_seed(0)
    words = WordEncoder(VOCABULARY, text_dim=tiny.CONFIG.text_dim, text_length=tiny.CONFIG.text_length)
    save_words(files.words, words, groups=GROUPS)
    TinyAutoencoder(AutoencoderConfig(coarse=16, fine=16, mask=8, units=1)).save(files.decoder)
    return files


def command(files, out, *more, prompt=PROMPT, seconds="1", size="32", enlarge="1"):
    """Return the words of a command that makes a small video; later ones win."""
    models = ("--student", files.student, "--words", files.words, "--decoder", files.decoder)
    shape = ("--seconds", seconds, "--width", size, "--height", size, "--enlarge", enlarge)
    return [str(word) for word in ("generate", prompt, "--out", out, *models, *shape, *more)]


def refused(capsys, words, *expected, code=2):
    """Run a command that must fail with ``code`` and a message that holds ``expected``."""
    try:
        ended = cli.main(words)
    except SystemExit as leaving:
        ended = leaving.code
    said = capsys.readouterr().err
    assert ended == code, said
    for part in expected:
        assert part in said
    assert "Traceback" not in said
    return said


def write_raw(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
