"""One student of random weights, the questions both sides are asked, and how far their answers lie apart."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import exchange
import pytest
import tiny
import torch

from sfpp_core.config import RolloutSettings, StudentConfig, to_table
from sfpp_core.geometry import SPATIAL_STRIDE, VideoGeometry
from sfpp_core.kv_cache import CacheShape, RollingKVCache
from sfpp_core.noise import ChunkNoise
from sfpp_core.sampler import LongSampler
from sfpp_core.schedule import FewStepSchedule
from sfpp_core.student import CausalStudent

HERE = Path(__file__).parent
CONFIG = StudentConfig(dim=256, ffn_dim=512, heads=2, layers=3, text_length=24)
"""Small, with the head dim of every published Wan: 128."""

SIZE = (8, 12)
"""Latent height and width."""

TOKENS = 24
"""Tokens per latent frame."""

SCHEDULE = FewStepSchedule.uniform(4, shift=5.0)

RELATIVE = 1e-5
"""Largest difference that counts as equal, over the largest entry of the reference."""

QUERY_GAIN = 4.0
"""Random queries attend to everything alike; sharper ones notice what they should and should not see."""


def network():
    """Return the random weights every test uses."""
    net = tiny.network(CONFIG, seed=11)
    with torch.no_grad():
        for layer in net.blocks:
            layer.self_attn.norm_q.weight.mul_(QUERY_GAIN)
    return net


def text(batch=1):
    """Return text embeddings with zeros after the text, as umT5's are."""
    embeddings = tiny.text(CONFIG, batch=batch)
    embeddings[:, 17:] = 0
    return embeddings


def clip(latent_frames, *, batch=1, seed=5):
    """Return a random clip, ``(B, C, T, H, W)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CONFIG.channels, latent_frames, *SIZE, generator=generator)


def error(ours, theirs):
    """Return the largest difference over the largest entry of ``theirs``."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert torch.isfinite(ours).all() and torch.isfinite(theirs).all()
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def whole(inputs, *, mask=None):
    """Return our velocity of a clip in one forward."""
    with torch.inference_mode():
        bound = CausalStudent(network(), CONFIG).bind(inputs["text"])
        return bound.whole(inputs["clip"], inputs["sigma"], mask=mask)


def bidirectional_inputs():
    """Return two clips at two noise levels."""
    return {"clip": clip(9, batch=2), "text": text(2), "sigma": torch.tensor([[0.9375], [0.31]])}


def worst(ours, theirs):
    """Return the largest ``error`` of any entry along the first axis."""
    return max(error(a, b) for a, b in zip(ours, theirs, strict=True))


RUN_SECONDS = 600


@dataclass(frozen=True)
class Reference:
    """A checkout of someone else's code and the Python that runs it."""

    folder: Path
    python: str

    @classmethod
    def named(cls, variable, python_variable="SFPP_REFERENCE_PYTHON"):
        """Return the reference a variable of the environment names; skip the test if it names none."""
        folder = os.environ.get(variable)
        if not folder:
            pytest.skip(f"{variable} names no checkout of the reference; see tests/parity/README.md")
        return cls(Path(folder).resolve(), os.environ.get(python_variable) or sys.executable)

    def run(self, script, scratch, inputs, **settings):
        """Ask one question in a process of its own; return the tensors of the answer."""
        settings = {"config": to_table(CONFIG), "tokens": TOKENS, **settings}
        exchange.ask(scratch, settings, network().state_dict(), inputs)
        command = [self.python, str(HERE / script), str(self.folder), str(scratch)]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=RUN_SECONDS)
        assert result.returncode == 0, result.stderr[-4000:]
        return exchange.read_answer(scratch)


@dataclass(frozen=True)
class Rollout:
    """Sizes of one rollout: chunks are counted, the rest is in latent frames."""

    window: int
    sink: int = 0
    chunk: int = 3
    chunks: int = 0
    positions: str = "absolute"
    batch: int = 1

    def __post_init__(self):
        if not self.chunks:  # past the window three times: the ring is rewritten three times
            object.__setattr__(self, "chunks", (4 * self.window - 3 * self.sink) // self.chunk)

    def __str__(self):
        return (
            f"window {self.window} sink {self.sink}, {self.chunks} chunks of {self.chunk}, batch {self.batch}"
        )

    @property
    def settings(self):
        """What the reference is told."""
        return {
            "window": self.window,
            "sink": self.sink,
            "chunk": self.chunk,
            "sigmas": SCHEDULE.sigmas,
            "shift": 5.0,
        }

    def inputs(self):
        """Return random noisy and clean chunks, which no answer depends on: errors do not add up."""
        steps = len(SCHEDULE.sigmas)
        drawn = clip(self.chunks * (steps + 1) * self.chunk, batch=self.batch)
        drawn = torch.stack(drawn.split(self.chunk, dim=2)).unflatten(0, (self.chunks, steps + 1))
        return {"noisy": drawn[:, :-1], "clean": drawn[:, -1], "text": text(self.batch)}

    def cache(self):
        """Return our empty cache."""
        shape = CacheShape(
            layers=CONFIG.layers,
            heads=CONFIG.heads,
            head_dim=CONFIG.head_dim,
            tokens_per_chunk=self.chunk * TOKENS,
            latent_frames_per_chunk=self.chunk,
            window=self.window // self.chunk,
            sink=self.sink // self.chunk,
            sink_positions=self.positions,
        )
        return RollingKVCache(shape, batch=self.batch, like=torch.empty(0))

    @torch.inference_mode()
    def passes(self, inputs):
        """Run every pass of every chunk over our cache; return velocities, new keys and values, the cache."""
        bound, cache = CausalStudent(network(), CONFIG).bind(inputs["text"]), self.cache()
        velocities, keys, values = [], [], []
        for chunk, (noisy, clean) in enumerate(zip(inputs["noisy"], inputs["clean"], strict=True)):
            cache.open(chunk)
            for latent, sigma in zip((*noisy, clean), (*SCHEDULE.sigmas, 0.0), strict=True):
                velocities.append(bound(latent, sigma, cache).clone())
            bound.remember(clean, cache)
            cache.close()
            k, v = cache.chunk_keys(chunk)
            keys.append(as_theirs(k))
            values.append(as_theirs(v))
        ours = {"velocity": torch.stack(velocities), "keys": torch.stack(keys), "values": torch.stack(values)}
        return ours, cache

    def sampler(self, seed, *, lead=0):
        """Return our sampler of this run."""
        height, width = (SPATIAL_STRIDE * size for size in SIZE)
        frames = 4 * (lead + self.chunk * self.chunks) - 3
        return LongSampler(
            student=CausalStudent(network(), CONFIG),
            geometry=VideoGeometry(height=height, width=width, frames=frames, chunk=self.chunk, lead=lead),
            settings=RolloutSettings(
                chunk=self.chunk, window=self.window, sink=self.sink, sink_positions=self.positions
            ),
            seed=seed,
        )

    def remembered(self):
        """Return the chunks in memory after the last one, oldest first, the sink before them."""
        sink, ring = self.sink // self.chunk, (self.window - self.sink) // self.chunk
        return [*range(sink), *range(max(sink, self.chunks - ring), self.chunks)]

    def noise(self, seed):
        """Return all noise of a run, ``(chunks, steps, B, C, T, H, W)``, as ``ChunkNoise`` draws it."""
        shape, source = (self.batch, CONFIG.channels, self.chunk, *SIZE), ChunkNoise(seed)
        steps = range(len(SCHEDULE.sigmas))
        draws = [
            [source.draw(shape, chunk=chunk, step=step, like=torch.empty(0)) for step in steps]
            for chunk in range(self.chunks)
        ]
        return torch.stack([torch.stack(chunk) for chunk in draws])


def as_theirs(keys):
    """Return ``(layers, B, N, L, D)`` in the order of the references, ``(layers, B, L, N, D)``, as a copy."""
    return keys.transpose(2, 3).clone()


def compare_passes(repository, sizes, measured, scratch, *, module="wan.modules.causal_model", **more):
    """Compare the velocity of every pass with that of a causal model of the Self-Forcing family."""
    inputs = sizes.inputs()
    theirs = repository.run(
        "run_wan.py", scratch, inputs, mode="passes", module=module, **sizes.settings, **more
    )
    ours, _ = sizes.passes(inputs)
    measured("velocity", worst(ours["velocity"], theirs["velocity"]))
