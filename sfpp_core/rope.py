"""Rotary positions of Wan 2.1 in time, height and width, for a video of any length.

Angles are computed in float64 for the latent frames asked for, so there is no table to run out of:
the published models stop at latent frame 1024, the length of theirs.

Legend: B batch, N heads, T latent frames, H and W tokens along height and width, L tokens = T * H * W, D head
dim.
"""

import torch
from torch import Tensor

THETA = 10_000.0
"""Base of the frequencies, the same on each axis. Source: Wan 2.1, ``wan/modules/model.py``."""


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Return the channels given to time, height and width. 128 gives (44, 42, 42)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def exact_device(device: torch.device) -> torch.device:
    """Return where angles for ``device`` are computed: there, or on the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _angles(positions: Tensor, dim: int) -> Tensor:
    """Return angles ``(len(positions), dim / 2)`` in float64, position times frequency."""
    frequencies = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    return torch.outer(positions.double(), frequencies)


def rotation(head_dim: int, first: int, grid: tuple[int, int, int], *, like: Tensor) -> Tensor:
    """Return the rotations of a grid of tokens, as complex numbers.

    Args:
        head_dim: Channels of one head.
        first: Latent frame of the video the grid starts at; any integer, also beyond 1024 or below 0.
        grid: ``(T, H, W)`` in tokens.
        like: Tensor on the device wanted.

    Returns:
        ``(L, D / 2)``, complex64, tokens in the order time, height, width.
    """
    starts, device = (first, 0, 0), exact_device(like.device)
    axes = [
        _angles(torch.arange(start, start + size, device=device), dim)
        for start, size, dim in zip(starts, grid, axis_dims(head_dim), strict=True)
    ]
    t, h, w = (
        angles.view(*[-1 if axis == i else 1 for i in range(3)], angles.shape[1]).expand(*grid, -1)
        for axis, angles in enumerate(axes)
    )
    angles = torch.cat((t, h, w), dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(like.device)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Return ``x`` ``(B, N, L, D)`` turned by ``turns`` ``(L, D / 2)``; neighbouring channels are a pair."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def move_in_time(keys: Tensor, latent_frames: int) -> Tensor:
    """Return ``keys`` ``(..., D)``, already rotated, as if they stood ``latent_frames`` later."""
    head_dim = keys.shape[-1]
    turns = rotation(head_dim, latent_frames, (1, 1, 1), like=keys)
    return rotate(keys, turns)
