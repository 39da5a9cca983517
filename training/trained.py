"""A module in training: its optimisers, its averaged weights, and all that has to be saved of them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from training import parallel
from training.adapters import LoraSettings, add_adapters
from training.averaging import Averaged, restore
from training.config import ConfigError
from training.muon import Muon

M = TypeVar("M", bound=nn.Module)


class NotFiniteError(FloatingPointError):
    """A loss or a gradient is infinite or not a number."""

    def __init__(self, message: str, batch: Any = None) -> None:
        super().__init__(message)
        self.batch = batch
        """What the loss was computed from, as far as its stage told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserSettings:
    """How the weights of one module are updated."""

    lr: float
    """Learning rate of AdamW."""

    matrix_lr: float = 0.0
    """Learning rate of Muon for the matrices of the transformer layers; 0 leaves them to AdamW."""

    betas: tuple[float, ...] = (0.9, 0.99)
    """Decay of AdamW's averages."""

    weight_decay: float = 0.0
    """Of AdamW."""

    warmup: int = 50
    """Updates over which the learning rates rise."""

    hold: float = 0.5
    """Share of the updates before the learning rates fall along a cosine to 0."""

    clip: float = 1.0
    """Largest norm of the gradient; ``inf`` leaves it as it is."""

    ema: float = 0.995
    """Decay of the averaged weights; 0 keeps none: the weights themselves are sampled and handed on."""

    ema_from: int = 0
    """Updates before the average begins; until then the averaged weights are the weights."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters to train in place of the weights."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"betas is {list(self.betas)}; it must be two numbers from 0 to below 1, e.g. [0, 0.99]."
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it must be from 0, which keeps no average, to below 1.")


class Trained(Generic[M]):
    """A module with its optimisers and its averaged weights.

    Muon moves the matrices of the transformer layers, AdamW the rest. With several ranks each holds its shard
    of all but Muon's matrices: Muon needs them whole.
    """

    def __init__(
        self,
        module: M,
        settings: OptimiserSettings,
        *,
        updates: int,
        kernels: bool = False,
        narrow: bool = True,
    ) -> None:
        """Take ``module`` for a stage of ``updates`` updates.

        Args:
            module: On the device it is trained on; all its weights are trained that require a gradient.
            settings: How.
            updates: Length of the stage, for the learning rate.
            kernels: Muon moves convolution kernels too, as matrices of a row per output.
            narrow: Losses are computed in bfloat16 where the device is a GPU.
        """
        if settings.lora.rank:
            add_adapters(module, settings.lora)
        self.module = module
        self.settings, self._updates = settings, updates
        self._averaged = Averaged(module, decay=settings.ema, start=settings.ema_from)
        named = dict(module.named_parameters())
        matrices = {name for name in named if self._is_matrix(name, named[name], kernels)}
        whole = matrices | {name for name in named if not named[name].requires_grad}
        # Muon's matrices stay whole in float32; samples are made without autocast, so the rest has to match.
        device = next(iter(named.values())).device
        dtype = torch.bfloat16 if narrow and not matrices and device.type == "cuda" else None
        for sharded in (module, self._averaged.module) if self._averaged.apart else (module,):
            parallel.shard(sharded, whole, dtype=dtype)
        self._optimisers = self._optimisers_of(matrices)
        parallel.gather(module)

    def _is_matrix(self, name: str, parameter: nn.Parameter, kernels: bool) -> bool:
        """Return whether Muon moves a parameter."""
        in_layer = ".blocks." in name and parameter.ndim == 2
        shaped = in_layer or (kernels and parameter.ndim == 4)
        return bool(self.settings.matrix_lr) and parameter.requires_grad and shaped

    def _optimisers_of(self, matrices: set[str]) -> list[tuple[torch.optim.Optimizer, float]]:
        """Return the optimisers with their full learning rates."""
        settings = self.settings
        trainable = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in trainable]
        rest = [parameter for name, parameter in trainable if name not in matrices]
        betas = (settings.betas[0], settings.betas[1])
        adam = torch.optim.AdamW(rest, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay)
        optimisers: list[tuple[torch.optim.Optimizer, float]] = [(adam, settings.lr)]
        self._kernels = []
        for name, parameter in trainable:
            if name in matrices and parameter.ndim == 4:
                # Channels-last kernels: the matrix shares the kernel's memory and follows it.
                matrix = nn.Parameter(parameter.data.permute(0, 2, 3, 1).flatten(1))
                assert matrix.data_ptr() == parameter.data_ptr()
                self._kernels.append((parameter, matrix))
        flat = {id(kernel): matrix for kernel, matrix in self._kernels}
        moved = [flat.get(id(parameter), parameter) for name, parameter in trainable if name in matrices]
        if moved:
            muon = Muon(moved, lr=settings.matrix_lr, weight_decay=0.0)
            optimisers.append((muon, settings.matrix_lr))
        return optimisers

    @property
    def averaged(self) -> M:
        """The averaged weights, as a module of the same kind; whole while ``loop.run`` asks for a sample."""
        return self._averaged.module

    @contextmanager
    def averaged_whole(self) -> Iterator[None]:
        """Have the averaged weights whole on every rank meanwhile."""
        apart = self._averaged.apart  # else it is the module, which is whole between updates
        if apart:
            parallel.gather(self.averaged)
        try:
            yield
        finally:
            if apart:
                parallel.part(self.averaged)

    @property
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """AdamW, and Muon where it has matrices."""
        return [optimiser for optimiser, _ in self._optimisers]

    def rate(self, update: int) -> float:
        """Return the share of the full learning rate at ``update``."""
        rising = min(1.0, (update + 1) / max(1, self.settings.warmup))
        hold = self.settings.hold
        past = max(0.0, update / self._updates - hold) / max(1e-9, 1 - hold)
        return rising * 0.5 * (1 + math.cos(math.pi * past))

    def accumulate(self, loss: Tensor, update: int, *, batch: Any = None) -> None:
        """Add the gradient of ``loss`` to that of the coming update.

        Args:
            loss: A scalar.
            update: Which update is coming.
            batch: What the loss was computed from, to be kept if it is not finite.

        Raises:
            NotFiniteError: The loss is not finite.
        """
        self._backward(loss, update, batch, last=False)

    def update(self, loss: Tensor, update: int, *, batch: Any = None) -> float:
        """Follow the gradient of ``loss`` and of all accumulated since the last update; return its norm.

        With several ranks that gradient is the mean of theirs.

        Raises:
            NotFiniteError: The loss or a gradient is not finite.
        """
        self._backward(loss, update, batch, last=True)
        parallel.part(self.module)
        norm = parallel.clip(self._parameters, self.settings.clip)
        if not math.isfinite(norm):
            raise NotFiniteError(
                f"the gradient of {self._first_bad()} is not finite at update {update}", batch
            )
        for kernel, matrix in self._kernels:
            assert kernel.grad is not None
            matrix.grad, kernel.grad = kernel.grad.permute(0, 2, 3, 1).flatten(1), None
        for optimiser, lr in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * self.rate(update)
            optimiser.step()
            optimiser.zero_grad()
        self._averaged.update(self.module)
        parallel.gather(self.module)
        return norm

    def _backward(self, loss: Tensor, update: int, batch: Any, *, last: bool) -> None:
        """Check and differentiate a loss."""
        if not torch.isfinite(loss):
            raise NotFiniteError(f"loss is {loss.item()} at update {update}", batch)
        parallel.backward(self.module, loss, last=last)

    def _first_bad(self) -> str:
        """Return the name of the first parameter whose gradient is not finite, and how many there are."""
        bad = []
        for name, parameter in self.module.named_parameters():
            grad = parameter.grad
            if grad is not None and not parallel.local(grad).isfinite().all():
                bad.append(name)
        return f"{bad[0]} and {len(bad) - 1} more" if bad else "some weights on another rank"

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: of frozen weights nothing, of sharded ones this rank's shards.

        What is returned is shared with the module: copy it before the next update.
        """
        parallel.part(self.module)
        self._prime()
        frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        weights = self.module.state_dict()
        kept = weights.keys() - frozen if self.settings.lora.rank else weights.keys()
        state = {
            "module": {name: weights[name] for name in weights if name in kept},
            "averaged": self._averaged.state_dict(set(kept)),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        parallel.gather(self.module)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, on any number of ranks."""
        template = self.state_dict()
        parallel.part(self.module)
        fitted = parallel.like(template, state)
        restore(self.module, fitted["module"])
        self._averaged.load_state_dict(fitted["averaged"])
        for optimiser, saved in zip(self.optimisers, fitted["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
            for held in optimiser.state.values():
                # What stays in main memory may be a mapped file, which nothing shall keep on the disk.
                on_host = {name: value for name, value in held.items() if value.device.type == "cpu"}
                held.update({name: value.clone() for name, value in on_host.items()})
        parallel.gather(self.module)

    def own_state(self) -> dict[str, Any]:
        """Return what this rank alone holds and needs to go on, by a name that no other rank uses."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore what this rank holds of all that the ranks' ``own_state`` returned when they saved."""

    def _prime(self) -> None:
        """Give the optimisers the averages they would begin with, so that a state always has them all."""
        for optimiser in self.optimisers:
            for parameter in _parameters(optimiser):
                if optimiser.state[parameter]:
                    continue
                if isinstance(optimiser, torch.optim.AdamW):
                    averages = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                    optimiser.state[parameter] = {"step": torch.tensor(0.0), **averages}
                else:
                    optimiser.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter.data)}


def _parameters(optimiser: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    """Yield the parameters of an optimiser."""
    for group in optimiser.param_groups:
        yield from group["params"]
