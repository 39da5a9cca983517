"""What a stage of Wan reads: all of it has to be there before the first model is loaded."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sfpp_core.decoder import is_preview
from sfpp_core.lora import parse_lora_option
from training.config import ConfigError
from training.models import ARCHITECTURES, VideoSettings
from training.state import FILE, newest
from training.texts import Texts

logger = logging.getLogger(__name__)


def open_texts(
    video: VideoSettings, files: Mapping[str, str], *, loras: Sequence[str] = (), dry_run: bool = False
) -> Texts | None:
    """Return the prompts of Wan's videos once everything else is there; ``None`` for the demo's world.

    Args:
        video: Whether it is the demo's world or Wan, and where the prompts are.
        files: Paths by the setting that names each; an empty one names nothing.
        loras: Each ``FILE`` or ``FILE:STRENGTH``.
        dry_run: It needs no files: what a run would miss is told, and ``None`` returned.

    Raises:
        ConfigError: A file is missing; or as ``Texts``.
    """
    if not video.is_wan:
        return None
    named = {
        **files,
        **{f"LoRA {index}": str(parse_lora_option(lora)[0]) for index, lora in enumerate(loras)},
    }
    absent = ", ".join(_absent({**named, "video.prompts": video.prompts} if dry_run else named))
    if dry_run:
        if absent:
            logger.info("a run would miss %s", absent)
        return None
    if absent:
        raise ConfigError(f"{absent}: not there; training/README.md lists where published files come from.")
    return Texts(Path(video.prompts))


def _absent(files: Mapping[str, str]) -> Iterator[str]:
    """Yield what is neither a file, a folder or a run, nor a word that needs no file."""
    for setting, path in files.items():
        if not path or path in ARCHITECTURES or is_preview(path):
            continue
        if (newest(Path(path)) is None) if Path(path).name == FILE else not Path(path).exists():
            yield f"{setting} {path}"
