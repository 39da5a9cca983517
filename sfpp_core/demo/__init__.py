"""The embedded demo: a small student of a small world, its words and its autoencoder.

The three files beside this one are made by the scripts in ``training``; nothing here is downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import load_student, load_words
from ..config import RolloutSettings, StudentConfig
from ..errors import CheckpointError
from ..network import WanNetwork
from ..tiny_autoencoder import TinyAutoencoder
from ..words import WordEncoder

FOLDER = Path(__file__).parent
"""Where the files are."""

STUDENT = "student.safetensors"
"""Name of the student's file; see ``checkpoint.save``."""

WORDS = "words.safetensors"
"""Name of the text encoder's file; see ``checkpoint.save_words``."""

AUTOENCODER = "autoencoder.safetensors"
"""Name of the autoencoder's file; see ``TinyAutoencoder.save``."""

SIZE = 64
"""Height and width, in pixels, of the frames it was trained on."""


@dataclass(frozen=True, slots=True)
class Demo:
    """Everything the demo needs to turn a prompt into frames."""

    network: WanNetwork
    """Weights of the student."""

    config: StudentConfig
    """Its architecture."""

    settings: RolloutSettings
    """How it was trained to be rolled out."""

    words: WordEncoder
    """Its text encoder."""

    groups: Mapping[str, tuple[str, ...]]
    """Words worth telling a user, by heading."""

    autoencoder: TinyAutoencoder
    """Frames to latents and back."""


def file(name: str, folder: Path | None = None) -> Path:
    """Return the path of one of the demo's files, in ``folder`` or beside this module.

    Raises:
        CheckpointError: It is not there.
    """
    folder = folder or FOLDER
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"the embedded demo lacks {name} in {folder}; get the whole package again, or make the file with "
            "the commands in training/LOG.md."
        )
    return path


def load(
    folder: Path | None = None, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Demo:
    """Load the demo.

    Args:
        folder: Where its files are; ``None`` is beside this module.
        device: Where the student computes.
        dtype: Dtype the student computes in.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    student, vocabulary, autoencoder = (file(name, folder) for name in (STUDENT, WORDS, AUTOENCODER))
    network, config, settings = load_student(student, device=device, dtype=dtype)
    words, groups = load_words(vocabulary)
    return Demo(network, config, settings, words, groups, TinyAutoencoder.load(autoencoder))
