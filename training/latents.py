"""Latents of the demo world: many clips, encoded once, and batches of them with fresh captions.

The world and its autoencoder live on a torus, so a clip moved by whole latent cells is another clip of the
same scene: every batch is moved at random, and moved within a clip it is a cut to another framing.

Legend: B clips, C channels, T latent frames, H and W latent height and width.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sfpp_core.tiny_autoencoder import TinyAutoencoder
from training.config import ConfigError
from training.world import WORLD_VERSION, render, sample_scene
from training.worlds import STANDARD, World

_AT_ONCE = 8
"""Clips rendered and encoded together."""


def prepare(path: Path, autoencoder: TinyAutoencoder, *, clips: int, seed: int) -> None:
    """Encode ``clips`` scenes of the world to ``path`` unless it holds them already.

    Args:
        path: A safetensors file, float16, ``(clips, C, T, H, W)``.
        autoencoder: Trained encoder.
        clips: Scenes; scene ``i`` is drawn from ``(seed, i)``.
        seed: Of all scenes.
    """
    wanted = {
        "world": WORLD_VERSION,
        "clips": str(clips),
        "seed": str(seed),
        "encoder": _fingerprint(autoencoder),
    }
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata() == wanted:
                return
    parts = []
    for first in tqdm(range(0, clips, _AT_ONCE), desc="encode clips"):
        scenes = [sample_scene((seed, index)) for index in range(first, min(first + _AT_ONCE, clips))]
        parts.append(autoencoder.encode(render(scenes)).half().contiguous())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"latents": torch.cat(parts).contiguous()}, partial, metadata=wanted)
    partial.replace(path)


def _fingerprint(autoencoder: TinyAutoencoder) -> str:
    """Return a digest that changes when anything does that decides the latents."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (*autoencoder.encoder.state_dict().values(), autoencoder.mean, autoencoder.std):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


class Clips:
    """Batches of encoded clips with their captions, each a function of seed and iteration."""

    def __init__(
        self,
        path: Path,
        *,
        seed: int,
        drop: float = 0.0,
        world: World = STANDARD,
        cuts: float = 0.0,
        shot: int = 3,
    ) -> None:
        """Open the file written by ``prepare``.

        Args:
            path: The file.
            seed: Of the batches.
            drop: Share of captions replaced by the empty one, for classifier-free guidance.
            world: How the scenes are told; the clips of all worlds are the same.
            cuts: Share of the places where a cut may be that have one: from there on the whole picture is
                moved by a random number of latent cells, two or more along an axis.
            shot: Latent frames between such places.

        Raises:
            ConfigError: There is no such file.
        """
        if not path.exists():
            raise ConfigError(f"latents is {path}, which does not exist; run training.train_teacher first.")
        with safe_open(path, "pt") as file:
            self.latents = file.get_tensor("latents")
            self.scene_seed = int(file.metadata()["seed"])
        self.seed, self.drop, self.world, self.cuts, self.shot = seed, drop, world, cuts, shot

    def batch(self, iteration: int, size: int) -> tuple[Tensor, list[str], torch.Generator]:
        """Return clips ``(B, C, T, H, W)``, their captions, and a generator for the rest of the iteration."""
        rng = np.random.default_rng((self.seed, iteration))
        picks = rng.integers(len(self.latents), size=size)
        clips, captions = [], []
        for pick in picks.tolist():
            move = tuple(int(rng.integers(side)) for side in self.latents.shape[-2:])
            clip = self.latents[pick].float().roll(move, (-2, -1))
            clips.append(self._cut(clip, rng) if self.cuts else clip)
            text = self.world.caption(sample_scene((self.scene_seed, pick)), rng)
            captions.append("" if rng.random() < self.drop else text)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return torch.stack(clips), captions, generator

    def _cut(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Make the cuts of ``(C, T, H, W)`` in place, and return it."""
        for first in range(self.shot, clip.shape[1], self.shot):
            if rng.random() < self.cuts:
                move = tuple(int(rng.integers(2, side - 1)) for side in clip.shape[-2:])
                clip[:, first:] = clip[:, first:].roll(move, (-2, -1))
        return clip
