"""Contact sheets: rows of frames, enlarged with sharp edges, with a label per row."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 2
_LABEL = 14


def sheet(rows: Sequence[tuple[str, Tensor]], path: Path, *, columns: int = 12, enlarge: int = 2) -> None:
    """Write one picture with a row per clip.

    Args:
        rows: Label and frames ``(F, 3, H, W)`` in [0, 1]; ``columns`` frames are picked, evenly spread.
        path: A .png file.
        columns: Frames per row.
        enlarge: Whole factor by which each frame grows.
    """
    height, width = rows[0][1].shape[-2] * enlarge, rows[0][1].shape[-1] * enlarge
    page = Image.new("RGB", (columns * (width + _GAP), len(rows) * (height + _LABEL + _GAP)), (24, 24, 24))
    draw = ImageDraw.Draw(page)
    for row, (label, frames) in enumerate(rows):
        top = row * (height + _LABEL + _GAP)
        draw.text((2, top), label, fill=(255, 255, 255))
        for column in range(columns):
            index = round(column * (len(frames) - 1) / max(1, columns - 1))
            picture = Image.fromarray(
                (frames[index].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            )
            page.paste(
                picture.resize((width, height), Image.Resampling.NEAREST),
                (column * (width + _GAP), top + _LABEL),
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
