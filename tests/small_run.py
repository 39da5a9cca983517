"""A run of five small chunks that no student has made."""

import torch

from sfpp_core.geometry import VideoGeometry
from sfpp_core.run.agreement import Wanted
from sfpp_core.run.folder import open_run

GEOMETRY = VideoGeometry(height=16, width=32, frames=57)


def wanted(text=lambda _: "a cat", **fields):
    given = {"space": "wan2.1", "geometry": GEOMETRY, "decisions": {"seed": 3}, "request": {}, "text": text}
    return Wanted(**{**given, **fields})


def chunk(number):
    return torch.randn(1, 16, 3, 2, 4, generator=torch.Generator().manual_seed(number))


def make(folder, asked=None):
    """Make what a run lacks; return its folder."""
    with open_run(folder, asked or wanted()) as run:
        for number in range(run.kept, run.chunks):
            run.add(number, chunk(number))
    return folder
