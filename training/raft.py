"""Optical flow by RAFT, for those who have its weights: ``raft-things.pth`` or ``raft-sintel.pth``.

The large network under the names of its published weights, for inference only.
Source: RAFT, arXiv:2003.12039; github.com/princeton-vl/RAFT at 2888e15.

Legend: B pairs of frames, C channels, F frames, H and W pixels, h and w cells of 8 by 8 pixels.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad, unfold

from sfpp_core.errors import CheckpointError, SFPPError

LEVELS = 4
"""Resolutions at which two frames are compared."""

RADIUS = 4
"""Cells around the present guess that are looked at, at each resolution."""

CELL = 8
"""Pixels along each side of a cell."""

STATE = 128
"""Channels of the recurrent state, and as many of the context."""

LEAST_SIDE = 128
"""Least side in pixels: the coarsest comparison needs two cells."""


class Unit(nn.Module):
    """A residual unit of the encoders."""

    def __init__(self, inputs: int, outputs: int, norm: type[nn.Module], stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm1, self.norm2 = norm(outputs), norm(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, outputs, H / stride, W / stride)``."""
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        return ((x if self.downsample is None else self.downsample(x)) + y).relu()


class Encoder(nn.Module):
    """Frames to cells."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3)
        self.norm1 = norm(64)
        self.layer1 = nn.Sequential(Unit(64, 64, norm, 1), Unit(64, 64, norm, 1))
        self.layer2 = nn.Sequential(Unit(64, 96, norm, 2), Unit(96, 96, norm, 1))
        self.layer3 = nn.Sequential(Unit(96, 128, norm, 2), Unit(128, 128, norm, 1))
        self.conv2 = nn.Conv2d(128, 2 * STATE, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """Return ``(B, 256, h, w)`` of ``(B, 3, H, W)`` in [-1, 1]."""
        x = self.norm1(self.conv1(frames)).relu()
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class MotionEncoder(nn.Module):
    """What the comparison and the flow so far say, as 128 channels; the last two are the flow itself."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(192 + 64, 128 - 2, 3, padding=1)

    def forward(self, flow: Tensor, compared: Tensor) -> Tensor:
        """Return ``(B, 128, h, w)``."""
        seen = self.convc2(self.convc1(compared).relu()).relu()
        moved = self.convf2(self.convf1(flow).relu()).relu()
        return torch.cat([self.conv(torch.cat([seen, moved], 1)).relu(), flow], 1)


class Recurrence(nn.Module):
    """A gated recurrent unit of convolutions, first along rows, then along columns."""

    def __init__(self) -> None:
        super().__init__()
        for name, size, border in (("1", (1, 5), (0, 2)), ("2", (5, 1), (2, 0))):
            for gate in "zrq":
                conv = nn.Conv2d(STATE + 2 * 128, STATE, size, padding=border)
                self.add_module(f"conv{gate}{name}", conv)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Return the next state, ``(B, 128, h, w)``."""
        for name in "12":
            update, reset, candidate = (self.get_submodule(f"conv{gate}{name}") for gate in "zrq")
            both = torch.cat([state, x], 1)
            share = update(both).sigmoid()
            fresh = candidate(torch.cat([reset(both).sigmoid() * state, x], 1)).tanh()
            state = (1 - share) * state + share * fresh
        return state


class FlowHead(nn.Module):
    """The change of the flow that a state asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(STATE, 256, 3, padding=1)
        self.conv2 = nn.Conv2d(256, 2, 3, padding=1)

    def forward(self, state: Tensor) -> Tensor:
        """Return ``(B, 2, h, w)``, in cells."""
        return self.conv2(self.conv1(state).relu())


class Update(nn.Module):
    """One round: compare, think, correct."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gru, self.flow_head = MotionEncoder(), Recurrence(), FlowHead()
        self.mask = nn.Sequential(
            nn.Conv2d(STATE, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, CELL**2 * 9, 1)
        )


class Raft(nn.Module):
    """The network: two frames to the flow between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet, self.cnet = Encoder(nn.InstanceNorm2d), Encoder(nn.BatchNorm2d)
        self.update = Update()

    def forward(self, before: Tensor, after: Tensor, rounds: int) -> Tensor:
        """Return the flow ``(B, 2, H, W)``, x then y, in pixels.

        Args:
            before: Frames ``(B, 3, H, W)`` in [-1, 1]; H and W are multiples of 8.
            after: The frames that follow, same shape.
            rounds: Corrections.
        """
        first, second = self.fnet(torch.cat([before, after])).chunk(2)
        levels = pyramid(first, second)
        state, context = self.cnet(before).split(STATE, 1)
        state, context = state.tanh(), context.relu()
        start = places(state)
        flow = torch.zeros_like(start)
        update = self.update
        for _ in range(rounds):
            motion = update.encoder(flow, look_up(levels, start + flow))
            state = update.gru(state, torch.cat([context, motion], 1))
            flow = flow + update.flow_head(state)
        return enlarge(flow, 0.25 * update.mask(state))


def places(like: Tensor) -> Tensor:
    """Return the (x, y) of every cell, ``(B, 2, h, w)``."""
    height, width = like.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y]).to(like).expand(len(like), -1, -1, -1)


def pyramid(first: Tensor, second: Tensor) -> list[Tensor]:
    """Compare every cell with every other: ``(B * h * w, 1, h', w')`` at each level, halved every time."""
    batch, channels, height, width = first.shape
    products = first.flatten(2).transpose(1, 2) @ second.flatten(2) / channels**0.5
    levels = [products.reshape(batch * height * width, 1, height, width)]
    for _ in range(LEVELS - 1):
        levels.append(avg_pool2d(levels[-1], 2))
    return levels


def look_up(levels: list[Tensor], where: Tensor) -> Tensor:
    """Return the comparisons around ``where`` ``(B, 2, h, w)``, ``(B, levels * 81, h, w)``."""
    batch, _, height, width = where.shape
    offsets = torch.arange(-RADIUS, RADIUS + 1).to(where)
    # The published weights expect x to change slowest.
    x, y = torch.meshgrid(offsets, offsets, indexing="ij")
    around = torch.stack([x, y], -1)
    centre = where.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for level, compared in enumerate(levels):
        sides = torch.tensor([compared.shape[3] - 1, compared.shape[2] - 1]).to(where)
        grid = 2 * (centre / 2**level + around) / sides - 1
        seen = grid_sample(compared, grid, align_corners=True)
        found.append(seen.reshape(batch, height, width, -1))
    return torch.cat(found, -1).permute(0, 3, 1, 2)


def enlarge(flow: Tensor, weights: Tensor) -> Tensor:
    """Return the flow of pixels, ``(B, 2, 8h, 8w)``: each a convex mixture of the nine cells around it.

    Args:
        flow: In cells, ``(B, 2, h, w)``.
        weights: Before the softmax, ``(B, 9 * 64, h, w)``.
    """
    batch, _, height, width = flow.shape
    shares = weights.reshape(batch, 1, 9, CELL, CELL, height, width).softmax(2)
    near = unfold(CELL * flow, 3, padding=1).reshape(batch, 2, 9, 1, 1, height, width)
    mixed = (shares * near).sum(2)
    return mixed.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, CELL * height, CELL * width)


def load_raft(path: Path) -> Raft:
    """Read published weights.

    Raises:
        CheckpointError: The file is missing, damaged, or of something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; get raft-things.pth, or leave raft empty.")
    try:
        weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        weights = {
            name.removeprefix("module.").replace("update_block.", "update."): value
            for name, value in weights.items()
        }
        # The norm of a shortcut is stored under two names.
        weights = {name: value for name, value in weights.items() if ".norm3." not in name}
        network = Raft()
        network.load_state_dict(weights)
    except Exception as error:
        raise CheckpointError(
            f"{path} does not hold the weights of RAFT: {str(error).splitlines()[0]:.120}; get "
            "raft-things.pth or raft-sintel.pth (not raft-small.pth), or leave raft empty."
        ) from error
    return network.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftSearch:
    """Mean length of RAFT's flow, as ``training.flow.DenseSearch`` gives it for the other."""

    network: Raft

    short_side: int = 256
    """Larger frames are reduced to this short side first; speeds are in pixels of what is searched."""

    wrap: int = 0
    """Pixels of the opposite edge shown beyond each edge, for a world that is a torus."""

    rounds: int = 12
    """Corrections of the flow."""

    @torch.inference_mode()
    def __call__(self, video: Tensor) -> Tensor:
        """Return the mean length of the flow from each frame of ``(F, 3, H, W)`` in [0, 1] to the next.

        Returns:
            ``(F - 1,)``, float32, in pixels per frame.

        Raises:
            SFPPError: The frames are too small.
        """
        frames, inner = self._frames(video.detach().float())
        speeds = [
            self.network(before[None], after[None], self.rounds)[(..., *inner)].norm(dim=1).mean().cpu()
            for before, after in itertools.pairwise(frames)
        ]
        return torch.stack(speeds) if speeds else torch.zeros(0)

    def _frames(self, video: Tensor) -> tuple[Tensor, tuple[slice, slice]]:
        """Return the frames as the network wants them, and where in them the video is."""
        shrink = min(1.0, self.short_side / min(video.shape[-2:]))
        if shrink < 1:
            video = interpolate(video, size=[round(side * shrink) for side in video.shape[-2:]], mode="area")
        inner = tuple(slice(self.wrap, self.wrap + side) for side in video.shape[-2:])
        frames = (2 * video - 1).to(self.network.cnet.conv2.weight)
        if self.wrap:
            frames = pad(frames, (self.wrap,) * 4, mode="circular")
        height, width = frames.shape[-2:]
        if min(height, width) < LEAST_SIDE:
            raise SFPPError(
                f"RAFT is asked for the flow of {height}x{width} pixels; both sides must be at least "
                f"{LEAST_SIDE}: use larger frames, a larger short_side, or leave raft empty."
            )
        return pad(frames, (0, -width % CELL, 0, -height % CELL), mode="replicate"), (inner[0], inner[1])
