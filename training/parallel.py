"""Several processes as one trainer: who computes what of a batch, and who keeps what of the weights.

Started by ``torchrun``, the ranks share out the weights with FSDP2 (``fully_shard``), one group per
transformer layer. A rollout runs a student dozens of times per update, so weights are gathered once per
update and not once per forward: while a loss is computed every rank holds them whole; while they are updated,
averaged and saved it holds its shard, with the gradients and the optimisers' averages of that shard alone.
The code of a loss sees plain modules and need not know.

Without ``torchrun`` there is one rank, and nothing here does anything.
"""

import atexit
import logging
import os
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import ConfigError

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: longer than a sample, shorter than a night."""

_BROKEN = ("connection", "gloo", "nccl", "timed out", "peer")
"""Words in the errors of a collective that lost a rank."""


def ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """Return how many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which of them this one is."""
    return dist.get_rank() if ranks() > 1 else 0


def join(name: str) -> torch.device:
    """Join the other ranks if ``torchrun`` started several; return the device of this one.

    Args:
        name: Kind of device, ``cpu`` or ``cuda``.
    """
    if launched() == 1:
        return torch.device(name)
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(_leave)
        if rank():
            logging.getLogger().setLevel(logging.WARNING)
        logger.info("%d ranks train together, backend %s", ranks(), backend)
    return device


def _leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """How the effective batch of an update is cut into batches, and which of them this rank computes.

    A piece has a number of its own in the whole run, and what is drawn for it follows from that number: two
    ranks with one piece each make the update that one rank makes of two.
    """

    batch: int
    """Clips of one piece: what one rank computes at once."""

    effective: int
    """Clips of one update, over all pieces of all ranks."""

    ranks: int = field(default_factory=launched)
    """Processes that share the work."""

    def __post_init__(self) -> None:
        least = self.batch * self.ranks
        if self.effective % least:
            raise ConfigError(
                f"loop.effective_batch is {self.effective}; with {self.ranks} ranks and batch {self.batch} "
                f"it must be a multiple of {least}: change batch, loop.effective_batch or the ranks."
            )

    @property
    def per_update(self) -> int:
        """Pieces of one update, over all ranks."""
        return self.effective // self.batch

    @property
    def per_rank(self) -> int:
        """Pieces of one update on each rank."""
        return self.per_update // self.ranks

    def of(self, iteration: int) -> range:
        """Return the numbers of this rank's pieces in one iteration."""
        first = iteration * self.per_update
        return range(first + rank(), first + self.per_update, self.ranks)


@contextmanager
def first() -> Iterator[None]:
    """Let the first rank through before the others: what it makes and writes, they find."""
    if rank():
        agree(False)
    try:
        yield
    finally:
        if ranks() > 1 and rank() == 0:
            agree(False)


def agree(*wishes: bool) -> list[bool]:
    """Return for each wish whether any rank has it; every rank gets the same answer."""
    if ranks() == 1:
        return list(wishes)
    table = torch.tensor(wishes, dtype=torch.int32)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return [bool(wish) for wish in table.tolist()]


def mean(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over all ranks of each number; every rank must have the same names."""
    if ranks() == 1:
        return dict(numbers)
    table = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(table)
    return dict(zip(numbers, (table / ranks()).tolist(), strict=True))


def lost_contact(error: BaseException) -> bool:
    """Return whether ``error`` says that another rank is gone."""
    if ranks() == 1:
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _BROKEN)


def shard(module: nn.Module, whole: Collection[str], *, dtype: torch.dtype | None) -> None:
    """Share out the parameters of ``module`` between the ranks, a group per layer and one for the rest.

    Args:
        module: On this rank's device; the same values on every rank.
        whole: Names of the parameters every rank keeps whole.
        dtype: What gathered weights are cast to; ``None`` leaves them in float32.
    """
    if ranks() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    kept = {parameter for name, parameter in module.named_parameters() if name in whole}
    device = next(module.parameters()).device
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (ranks(),))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": kept}
    for name, child in module.named_modules():
        if name.rpartition(".")[0].endswith("blocks"):
            fully_shard(child, reshard_after_forward=False, **options)
    fully_shard(module, reshard_after_forward=False, **options)
    module.hand_over = types.MethodType(lambda _, make: make(), module)  # type: ignore[assignment]
    register_fsdp_forward_method(module, "hand_over")


def gather(module: nn.Module) -> None:
    """Make the weights of ``module`` whole."""
    _each_group(module, lambda group: group.unshard())


def part(module: nn.Module) -> None:
    """Keep this rank's shard of the weights of ``module`` alone."""
    _each_group(module, lambda group: group.reshard())


def _each_group(module: nn.Module, act: Callable[[Any], object]) -> None:
    """Call ``act`` for every group of shards in ``module``, the outermost first."""
    if ranks() > 1:
        from torch.distributed.fsdp import FSDPModule

        for child in module.modules():
            if isinstance(child, FSDPModule):
                act(child)


def backward(module: nn.Module, loss: Tensor, *, last: bool) -> None:
    """Add the gradient of ``loss`` to that of ``module``; with the ``last`` of an update ranks share it."""
    if ranks() == 1:
        loss.backward()
        return
    sharded: Any = module
    sharded.set_requires_gradient_sync(last)
    sharded.set_reshard_after_backward(False)
    # The loss passes through FSDP's forward, so that its backward knows when all gradients are there. It is
    # hidden in a function: FSDP would take an argument for the input of the first layer.
    sharded.hand_over(lambda: loss).backward()


def clip(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients to a norm of at most ``limit`` over all ranks; return the norm before.

    Gradients of weights that every rank keeps whole are averaged between the ranks first.
    """
    if ranks() == 1:
        return nn.utils.clip_grad_norm_(parameters, limit).item()
    from torch.distributed.tensor import DTensor

    moved = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in moved if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in moved if not isinstance(parameter, DTensor)]
    _average([parameter.grad for parameter in whole if parameter.grad is not None])
    squares = torch.zeros((), dtype=torch.float64)
    for parameters_alike in (sharded, whole):
        grads = [parameter.grad for parameter in parameters_alike if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        squares += (norm.full_tensor() if isinstance(norm, DTensor) else norm).double().cpu().square()
    total = squares.sqrt().float()
    for parameters_alike in (sharded, whole):
        device = parameters_alike[0].device if parameters_alike else total.device
        nn.utils.clip_grads_with_norm_(parameters_alike, limit, total.to(device))
    return total.item()


def _average(grads: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over all ranks, in one message."""
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, mean_grad in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean_grad.view_as(grad) / ranks())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of ``tensor``, or all of it where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


def like(template: Any, value: Any) -> Any:
    """Return ``value``, nested as ``template`` is, with each whole tensor cut as its counterpart there."""
    if isinstance(template, Mapping) and isinstance(value, Mapping):
        return {name: like(template.get(name), inner) for name, inner in value.items()}
    if isinstance(template, list) and isinstance(value, list):
        return [like(*pair) for pair in zip(template, value, strict=True)]
    return _cut(template, value) if isinstance(value, Tensor) else value


def _cut(template: Any, value: Tensor) -> Tensor:
    """Return this rank's shard of a whole ``value`` where ``template`` is a shard; else the value itself."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(template, DTensor) or isinstance(value, DTensor):
        return value
    whole = value.to(template.to_local().device)
    return distribute_tensor(whole, template.device_mesh, template.placements, src_data_rank=None)
