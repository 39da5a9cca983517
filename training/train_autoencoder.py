"""Stage 0 of the demo: the autoencoder.

Run ``python -m training.train_autoencoder training/configs/demo_autoencoder.toml [key=value ...]``.

Clips are functions of (seed, iteration): a killed run resumes exactly from ``last.pt``.
The run ends with the latents' mean and standard deviation, a round trip, and ``autoencoder.safetensors``.

Legend: B clips, F frames, C channels, T latent frames, H and W pixels, h and w latent cells.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sfpp_core.tiny_autoencoder import TEMPORAL_STRIDE, AutoencoderConfig, TinyAutoencoder
from training.config import load
from training.world import render, sample_scene

TRAIN, VALIDATE, MEASURE = 0, 1, 2
"""First part of a clip's seed after the run's own, so that no clip serves two purposes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One training run."""

    out: Path
    """Folder for checkpoints, sheets and the final weights."""

    minutes: float = 30.0
    """Wall time aimed at when ``iterations`` is 0; the iterations are then counted once, at the start."""

    iterations: int = 0
    """Optimiser updates, or 0 to derive them from ``minutes``."""

    threads: int = 1
    """CPU threads."""

    seed: int = 0
    """Seed of the weights, the clips and the noise."""

    start: Path | None = None
    """Weights to begin with; the encoder is then frozen and only the decoder trained."""

    clips: int = 8
    """Clips per iteration."""

    frames: int = 17
    """Frames per clip: 1 + 4(T - 1)."""

    muon_lr: float = 1e-2
    """Learning rate of the kernels."""

    adam_lr: float = 3e-3
    """Learning rate of biases and gains."""

    hold: float = 0.15
    """Share of the run at the full learning rate, before the cosine."""

    bf16: float = 0.7
    """Share of the run in bfloat16; the rest is float32."""

    latent_noise: float = 0.12
    """Largest sigma of the noise added to latents, drawn uniformly per clip."""

    wide: float = 0.35
    """Share of clips beyond the world, where a rollout may go: other places, colours, drifting exposure."""

    measured: int = 256
    """Clips of the world over which the latents' mean and standard deviation are taken at the end."""

    config: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Sizes of the network."""


@dataclass(slots=True)
class Run:
    """What training changes: everything a checkpoint must hold."""

    autoencoder: TinyAutoencoder
    """The network in training."""

    kernels: list[tuple[nn.Parameter, nn.Parameter]]
    """Convolution kernels and the matrices that share their memory, for Muon."""

    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    """Muon for the matrices, AdamW for the rest."""

    iterations: int
    """Optimiser updates in the whole run."""

    iteration: int = 0
    """Optimiser updates done."""

    seconds: float = 0.0
    """Wall time spent so far."""


def build(settings: Settings, device: torch.device) -> Run:
    """Return the run at iteration 0."""
    torch.manual_seed(settings.seed)
    autoencoder = (
        TinyAutoencoder(settings.config) if settings.start is None else TinyAutoencoder.load(settings.start)
    )
    autoencoder.to(device)
    trained = autoencoder if settings.start is None else autoencoder.decoder
    trained.requires_grad_(True)
    kernels, others = [], []
    for parameter in trained.parameters():
        if parameter.ndim == 4:
            kernels.append((parameter, nn.Parameter(parameter.data.permute(0, 2, 3, 1).flatten(1))))
        else:
            others.append(parameter)
    muon = torch.optim.Muon([matrix for _, matrix in kernels], lr=settings.muon_lr, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return Run(autoencoder, kernels, (muon, adam), settings.iterations)


def clips(settings: Settings, iteration: int, device: torch.device) -> Tensor:
    """Return the training clips ``(B, F, 3, H, W)`` of one iteration."""
    rngs = [np.random.default_rng((settings.seed, TRAIN, iteration, clip)) for clip in range(settings.clips)]
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


def losses(run: Run, settings: Settings, device: torch.device) -> Tensor:
    """Return the loss of the run's next iteration."""
    truth = clips(settings, run.iteration, device)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + run.iteration)
    half = run.iteration < settings.bf16 * run.iterations
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        latents = run.autoencoder.encoder(truth)
        sigma = settings.latent_noise * torch.rand((len(truth), 1, 1, 1, 1), generator=generator)
        noise = sigma * torch.randn(latents.shape, generator=generator)
        if settings.start is not None:
            noise = noise * run.autoencoder.std.cpu()[:, None, None, None]
        drawn, _ = run.autoencoder.decoder(latents + noise.to(latents))
    loss = reconstruction_loss(drawn[:, TEMPORAL_STRIDE - 1 :].float(), truth)
    return loss if settings.start is not None else loss + 0.02 * unit_loss(latents)


def update(run: Run, settings: Settings, device: torch.device) -> Tensor:
    """Do one iteration and return its loss."""
    rate = learning_rate(run.iteration / max(1, run.iterations), settings.hold) * min(
        1.0, (run.iteration + 1) / 50
    )
    for optimizer, peak in zip(run.optimizers, (settings.muon_lr, settings.adam_lr), strict=True):
        optimizer.param_groups[0]["lr"] = rate * peak
    loss = losses(run, settings, device)
    loss.backward()
    for kernel, matrix in run.kernels:
        assert kernel.grad is not None
        matrix.grad, kernel.grad = kernel.grad.permute(0, 2, 3, 1).flatten(1), None
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    run.iteration += 1
    return loss.detach()


def learning_rate(progress: float, hold: float) -> float:
    """Return the share of the peak learning rate at ``progress`` in [0, 1]: constant, then a cosine."""
    return 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress - hold) / (1 - hold))


def count_iterations(settings: Settings, device: torch.device) -> int:
    """Return how many iterations fit into ``settings.minutes``, from a few timed ones."""
    trial = build(replace(settings, iterations=1000, bf16=settings.bf16), device)
    for _ in range(4):
        update(trial, settings, device)
    began = time.perf_counter()
    for _ in range(12):
        float(update(trial, settings, device))
    # Float32 iterations take about 1.3 times as long; checkpoints and sheets take the rest.
    seconds = (time.perf_counter() - began) / 12 * (1 + 0.3 * (1 - settings.bf16)) * 1.03
    return max(1, int(settings.minutes * 60 / seconds))


def save(run: Run, path: Path) -> None:
    """Write everything needed to resume exactly; a kill in the middle leaves the old file."""
    partial = path.with_suffix(".partial")
    state = {
        "weights": run.autoencoder.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "iterations": run.iterations,
        "iteration": run.iteration,
        "seconds": run.seconds,
    }
    torch.save(state, partial)
    partial.replace(path)


def resume(run: Run, path: Path) -> None:
    """Bring ``run`` to where ``path`` was saved. The matrices share the kernels' memory and follow them."""
    state = torch.load(path, map_location=run.autoencoder.mean.device, weights_only=True)
    run.autoencoder.load_state_dict(state["weights"])
    for optimizer, values in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    run.iterations, run.iteration, run.seconds = state["iterations"], state["iteration"], state["seconds"]


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


def train(settings: Settings, run: Run, device: torch.device, log: Callable[[str], object]) -> None:
    """Run to the last iteration, with a checkpoint a minute and a sheet every three."""
    settings.out.mkdir(parents=True, exist_ok=True)
    last = settings.out / "last.pt"
    spent, saved, drawn = run.seconds, time.monotonic(), 0.0
    began = saved
    with tqdm(total=run.iterations, initial=run.iteration, unit="it", mininterval=5, smoothing=0.05) as bar:
        while run.iteration < run.iterations:
            loss = update(run, settings, device)
            bar.update()
            now = time.monotonic()
            run.seconds = spent + now - began
            if now - saved > 60 or run.iteration == run.iterations:
                save(run, last)
                saved = now
            if now - drawn > 180 or run.iteration == run.iterations:
                psnr, sheet = evaluate(run.autoencoder, settings.seed)
                write_sheet(sheet, settings.out / f"sheet_{run.iteration:06d}.png")
                log(f"iteration {run.iteration}, {run.seconds:.0f} s: loss {loss:.4f}, PSNR {psnr:.2f} dB")
                drawn = now


def finish(settings: Settings, run: Run, log: Callable[[str], object]) -> Path:
    """Store the latents' statistics, check the round trip, and return the exported weights' path."""
    autoencoder = run.autoencoder.eval().cpu()
    if settings.start is None:
        mean, std = measure_latents(autoencoder, settings.seed, count=settings.measured)
        autoencoder.mean.copy_(mean)
        autoencoder.std.copy_(std)
    path = settings.out / "autoencoder.safetensors"
    autoencoder.save(path)
    stored = TinyAutoencoder.load(path)
    clip = render([sample_scene((settings.seed, VALIDATE, 0))], 33)
    latents = stored.encode(clip)
    stored.reset()
    streamed = torch.cat([stored.decode(chunk) for chunk in latents.split(3, dim=2)], 1)
    round_trip = float(-10 * nn.functional.mse_loss(streamed, clip).log10())
    count = max(1, settings.measured // 4)
    psnr, _ = evaluate(stored, settings.seed, count=count)
    log(f"{path}: PSNR {psnr:.2f} dB over {count} clips, round trip {round_trip:.2f} dB, {run.seconds:.0f} s")
    return path


def main(settings: Settings) -> Path:
    """Train, or go on training, and return the path of the exported weights."""
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings.out.mkdir(parents=True, exist_ok=True)
    run = build(settings, device)
    if (settings.out / "last.pt").exists():
        resume(run, settings.out / "last.pt")
    elif not settings.iterations:
        run.iterations = count_iterations(settings, device)
    with (settings.out / "log.txt").open("a") as file:

        def log(line: str) -> None:
            tqdm.write(line)
            file.write(line + "\n")
            file.flush()

        log(f"{asdict(settings)} iterations {run.iterations} from {run.iteration}")
        train(settings, run, device, log)
        return finish(settings, run, log)


if __name__ == "__main__":
    main(load(Settings, sys.argv[1:], stage="train_autoencoder"))
