"""Stage 0 of the demo: the autoencoder.

Run ``python -m training.train_autoencoder training/configs/demo_autoencoder.toml [key=value ...]``.

The run ends with the latents' mean and standard deviation, a round trip, and ``autoencoder.safetensors``.

Legend: B clips, F frames, C channels, T latent frames, H and W pixels, h and w latent cells.
"""

import logging
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sfpp_core.tiny_autoencoder import TEMPORAL_STRIDE, AutoencoderConfig, TinyAutoencoder
from training import parallel
from training.config import ConfigError, load
from training.loop import LoopSettings, Loss, OptimiserSettings, Plan, Trained, descend, run
from training.precision import narrow_on, region
from training.world import SIZE, render, sample_scene

logger = logging.getLogger(__name__)

TRAIN, VALIDATE, MEASURE = 0, 1, 2
"""First part of a clip's seed after the run's own, so that no clip serves two purposes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One training run."""

    SMOKE: ClassVar = ("clips=2", "measured=4", "config.coarse=16", "config.fine=8", "config.mask=8")

    loop: LoopSettings
    """Length and bookkeeping."""

    optimiser: OptimiserSettings
    """How it is updated: Muon moves the kernels, AdamW biases and gains."""

    start: Path | None = None
    """Weights to begin with; the encoder is then frozen and only the decoder trained."""

    clips: int = 8
    """Clips computed at once."""

    frames: int = 17
    """Frames per clip: 1 + 4(T - 1)."""

    bf16: float = 0.7
    """Share of the run in bfloat16, where the device has it; the rest is float32."""

    latent_noise: float = 0.12
    """Largest sigma of the noise added to latents, drawn uniformly per clip."""

    wide: float = 0.35
    """Share of clips beyond the world, where a rollout may go: other places, colours, drifting exposure."""

    measured: int = 256
    """Clips of the world over which the latents' mean and standard deviation are taken at the end."""

    config: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Sizes of the network."""

    def __post_init__(self) -> None:
        if parallel.launched() > 1:
            raise ConfigError(
                f"the autoencoder trains in one process, and torchrun started {parallel.launched()}; "
                "use python -m training.train_autoencoder."
            )


def build(settings: Settings, device: torch.device) -> TinyAutoencoder:
    """Return the autoencoder before its first update, with what is to be trained marked."""
    torch.manual_seed(settings.loop.seed)
    if settings.start is None:
        return TinyAutoencoder(settings.config).to(device).requires_grad_(True)
    autoencoder = TinyAutoencoder.load(settings.start).to(device).requires_grad_(False)
    autoencoder.decoder.requires_grad_(True)
    return autoencoder


def clips(settings: Settings, piece: int, device: torch.device) -> Tensor:
    """Return the training clips ``(B, F, 3, H, W)`` of one piece of an update."""
    rngs = [np.random.default_rng((settings.loop.seed, TRAIN, piece, clip)) for clip in range(settings.clips)]
    batch = render([sample_scene(rng) for rng in rngs], settings.frames, device=device)
    for clip, rng in enumerate(rngs):
        if rng.uniform() < settings.wide:
            batch[clip] = widen(batch[clip], rng)
    return batch


def widen(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a clip ``(F, 3, H, W)`` moved off the grid, with other colours and a drifting exposure."""
    y, x = (int(pixels) for pixels in rng.integers(8, size=2))
    clip = clip[:, torch.from_numpy(rng.permutation(3))].roll((y, x), (-2, -1))
    offset = rng.uniform(-0.3, 0.3) + rng.uniform(-0.1, 0.1) * torch.linspace(
        0, 1, len(clip), device=clip.device
    )
    return (clip * rng.uniform(0.6, 1.3) + offset[:, None, None, None]).clamp(0, 1)


def reconstruction_loss(drawn: Tensor, truth: Tensor) -> Tensor:
    """Return L1 + 0.5 spatial gradient + 0.25 temporal difference + 2 MSE of ``(B, F, 3, H, W)``."""
    error = drawn - truth
    spatial = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return (
        error.abs().mean() + 0.5 * spatial + 0.25 * error.diff(dim=1).abs().mean() + 2 * error.square().mean()
    )


def unit_loss(latents: Tensor) -> Tensor:
    """Return how far each channel of ``(B, C, T, h, w)`` is from zero mean and unit variance."""
    std, mean = torch.std_mean(latents.float(), dim=(0, 2, 3, 4))
    return mean.square().mean() + std.log().square().mean()


def loss_of(autoencoder: TinyAutoencoder, settings: Settings, piece: int, *, half: bool) -> Loss:
    """Return the loss of one piece of an update, computed in bfloat16 if ``half`` and the
    device has it."""
    device = autoencoder.mean.device
    truth = clips(settings, piece, device)
    generator = torch.Generator().manual_seed(settings.loop.seed * 1_000_003 + piece)
    with region(device, narrow_on(device) if half else torch.float32):
        latents = autoencoder.encoder(truth)
        sigma = settings.latent_noise * torch.rand((len(truth), 1, 1, 1, 1), generator=generator)
        noise = sigma * torch.randn(latents.shape, generator=generator)
        if settings.start is not None:
            noise = noise * autoencoder.std.cpu()[:, None, None, None]
        drawn, _ = autoencoder.decoder(latents + noise.to(latents))
    loss = reconstruction_loss(drawn[:, TEMPORAL_STRIDE - 1 :].float(), truth)
    return Loss(
        loss if settings.start is not None else loss + 0.02 * unit_loss(latents), batch={"truth": truth}
    )


@torch.inference_mode()
def evaluate(
    autoencoder: TinyAutoencoder, seed: int, *, count: int = 16, frames: int = 33
) -> tuple[float, Tensor]:
    """Return the PSNR in dB (mean of frames) on unseen clips and a sheet ``(3, H, W)``, truth above."""
    truth = render([sample_scene((seed, VALIDATE, clip)) for clip in range(count)], frames)
    truth = truth.to(autoencoder.mean)
    latents = autoencoder.encoder(truth)
    drawn = autoencoder.decoder(latents)[0][:, TEMPORAL_STRIDE - 1 :].clamp(0, 1)
    psnr = float(-10 * (drawn - truth).square().mean((2, 3, 4)).log10().mean())
    shown = [0, *range(frames // 2 - 3, frames // 2 + 4), frames - 1]
    rows = [torch.cat(list(video[shown]), -1) for pair in zip(truth, drawn, strict=True) for video in pair]
    return psnr, torch.cat(rows[:16], -2).cpu()


def write_sheet(sheet: Tensor, path: Path, *, scale: int = 3) -> None:
    """Write ``(3, H, W)`` in [0, 1] as a PNG, enlarged with sharp edges."""
    from PIL import Image

    picture = Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


@torch.inference_mode()
def measure_latents(autoencoder: TinyAutoencoder, seed: int, *, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each latent channel over ``count`` clips of the world."""
    parts = []
    for first in range(0, count, 16):
        scenes = [sample_scene((seed, MEASURE, clip)) for clip in range(first, min(first + 16, count))]
        parts.append(autoencoder.encoder(render(scenes, 33).to(autoencoder.mean)).cpu())
    std, mean = torch.std_mean(torch.cat(parts), dim=(0, 2, 3, 4))
    return mean, std


def finish(settings: Settings, autoencoder: TinyAutoencoder) -> Path:
    """Store the latents' statistics, check the round trip, and return the exported weights' path."""
    autoencoder = autoencoder.eval().cpu()
    seed = settings.loop.seed
    if settings.start is None:
        mean, std = measure_latents(autoencoder, seed, count=settings.measured)
        autoencoder.mean.copy_(mean)
        autoencoder.std.copy_(std)
    path = Path(settings.loop.out) / "autoencoder.safetensors"
    autoencoder.save(path)
    stored = TinyAutoencoder.load(path)
    clip = render([sample_scene((seed, VALIDATE, 0))], 33)
    latents = stored.encode(clip)
    stored.reset()
    streamed = torch.cat([stored.decode(chunk) for chunk in latents.split(3, dim=2)], 1)
    round_trip = float(-10 * nn.functional.mse_loss(streamed, clip).log10())
    count = max(1, settings.measured // 4)
    psnr, _ = evaluate(stored, seed, count=count)
    logger.info("%s: PSNR %.2f dB over %d clips, round trip %.2f dB", path, psnr, count, round_trip)
    return path


def main(settings: Settings) -> Path | None:
    """Train, or go on training; return the path of the exported weights, none from a dry run."""
    device = settings.loop.pick_device()
    autoencoder = build(settings, device)
    iterations = settings.loop.iterations
    trained = Trained(autoencoder, settings.optimiser, updates=iterations, kernels=True)
    pieces = settings.loop.pieces(settings.clips)

    def step(iteration: int) -> dict[str, float]:
        half = iteration < settings.bf16 * iterations
        losses = (loss_of(autoencoder, settings, piece, half=half) for piece in pieces.of(iteration))
        return descend(trained, losses, iteration, count=pieces.per_rank)

    def sample(path: Path) -> dict[str, float]:
        psnr, page = evaluate(autoencoder, settings.loop.seed)
        write_sheet(page, path)
        return {"psnr": psnr}

    plan = partial(Plan, pieces=pieces, shapes={"clips": (settings.clips, settings.frames, 3, SIZE, SIZE)})
    run(settings.loop, {"model": trained}, step, sample, recipe=settings, plan=plan)
    return None if settings.loop.dry_run else finish(settings, autoencoder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(load(Settings, sys.argv[1:], stage="train_autoencoder"))
