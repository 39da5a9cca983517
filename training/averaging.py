"""Averaged weights: what is sampled from, exported and handed to the next stage."""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training import parallel
from training.config import ConfigError

M = TypeVar("M", bound=nn.Module)

_COUNT = "n_averaged"
_PREFIX = "module."
# Names in a saved state are those of torch's AveragedModel.


class Averaged(Generic[M]):
    """An exponential moving average of a module's trainable weights; frozen ones are the module's own.

    Without decay the average of anything is the latest: it is the module itself, and costs nothing.
    """

    def __init__(self, module: M, *, decay: float, start: int = 0) -> None:
        """Copy ``module``.

        Args:
            module: Whole, not yet sharded.
            decay: Share of the average that stays at each update; 0 is none.
            start: Updates before the average begins; until then it is the weights themselves.
        """
        self._start, self._updates = start, 0
        self.apart = decay > 0
        if not self.apart:
            self.module, self.names = module, []
            return
        shared = {
            id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad
        }
        self.module = copy.deepcopy(module, shared).requires_grad_(False)
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, module: M) -> None:
        """Follow ``module``, of which this holds the same shards."""
        self._updates += 1
        if not self.apart:
            return
        mine, theirs = self._tensors(self.module), self._tensors(module)
        if self._updates <= self._start + 1:
            for average, weight in zip(mine, theirs, strict=True):
                average.copy_(weight)
        else:
            self._average(mine, theirs, None)
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)

    def _tensors(self, module: M) -> list[Tensor]:
        """Return this rank's part of the trainable weights of ``module``."""
        parameters = dict(module.named_parameters())
        return [parallel.local(parameters[name].data) for name in self.names]

    def state_dict(self, keep: set[str]) -> dict[str, Any]:
        """Return the average of the tensors in ``keep``, and how many updates it is of."""
        weights = self.module.state_dict() if self.apart else {}
        kept = {_PREFIX + name: value for name, value in weights.items() if name in keep}
        return {_COUNT: torch.tensor(self._updates), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._updates = int(state[_COUNT])
        if self.apart:
            restore(self.module, plain(state))


def restore(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load ``tensors``; what they leave out must be frozen, as it is where only adapters are saved.

    Raises:
        ConfigError: They do not fit the module.
    """
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if wrong := [*unexpected, *(name for name in missing if name not in frozen)]:
        raise ConfigError(
            f"a saved state does not fit its model: {wrong[0]!r} and {len(wrong) - 1} more differ."
        )


def plain(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a saved average, under the module's own names."""
    return {name.removeprefix(_PREFIX): value for name, value in state.items() if name != _COUNT}
