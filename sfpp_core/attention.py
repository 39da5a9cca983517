"""One attention call, and the back ends behind it.

Every back end takes ``(B, N, L, D)`` queries, keys and values and returns ``(B, N, L, D)``: full attention of
the open chunk over all it may see. Back ends agree to rounding; which one runs is decided once, when a
student is built.

Legend: B batch, N heads, L tokens, D head dim.
"""

import importlib.util
import logging
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import SettingsError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""An attention back end: queries, keys, values to outputs."""

logger = logging.getLogger(__name__)

_PROBE_REPEATS = 5
_MATMUL_SCORES = 2**26
"""Scores matmul may hold at once; SDPA holds none."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with ``torch.nn.functional.scaled_dot_product_attention``."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with two matrix products and a softmax; on many CPUs faster than the fused kernel."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(scores.softmax(dim=-1), v)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with flash-attn 2, which wants ``(B, L, N, D)``."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with SageAttention, 8-bit: faster, and visibly not exact."""
    from sageattention import sageattn  # type: ignore[import-not-found]

    return sageattn(q, k, v, tensor_layout="HND")


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with xformers, which wants ``(B, L, N, D)``."""
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


_HALVES = (torch.bfloat16, torch.float16)

_OPTIONAL: dict[str, tuple[str, Attend, tuple[torch.dtype, ...]]] = {
    "flash": ("flash_attn", _flash, _HALVES),
    "sage": ("sageattention", _sage, _HALVES),
    "xformers": ("xformers", _xformers, (*_HALVES, torch.float32)),
}
"""Package, function and dtypes of the back ends that have to be installed; all need a CUDA GPU."""

NAMES = ("auto", "probe", "sdpa", "matmul", *_OPTIONAL)
"""Values accepted by ``choose``."""


def choose(name: str, *, shape: tuple[int, int, int, int], visible: int, like: Tensor) -> Attend:
    """Return the attention back end called ``name``.

    Args:
        name: One of ``NAMES``. ``auto`` is SDPA, or matmul for half precision on a CPU, where it measured
            faster (tests/bench/RESULTS.md): a fixed rule, since back ends differ in rounding and the same
            settings must give the same video. ``probe`` measures here and now and takes the faster.
        shape: Queries, ``(B, N, L, D)``.
        visible: Tokens attention sees once the window is full.
        like: Tensor on the device and in the dtype of the student.

    Raises:
        SettingsError: The name is unknown, its package is not installed, or it cannot compute on this device
            or in this dtype.
    """
    fits = like.device.type == "cpu" and shape[0] * shape[1] * shape[2] * visible <= _MATMUL_SCORES
    if name == "auto":
        return matmul if fits and like.dtype.itemsize < 4 else sdpa
    if name == "probe":
        return _faster(shape, visible, like.dtype) if fits else sdpa
    if name in ("sdpa", "matmul"):
        return sdpa if name == "sdpa" else matmul
    if name not in _OPTIONAL:
        raise SettingsError(f"attention is {name!r}; use one of {', '.join(NAMES)}.")
    package, attend, dtypes = _OPTIONAL[name]
    if like.device.type != "cuda" or like.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        raise SettingsError(
            f"attention {name!r} needs a CUDA GPU and {', '.join(names[:-1])} or {names[-1]}; use 'auto'."
        )
    if importlib.util.find_spec(package) is None:
        raise SettingsError(f"attention {name!r} needs the package {package}; install it, or use 'auto'.")
    return attend


def _faster(shape: tuple[int, int, int, int], visible: int, dtype: torch.dtype) -> Attend:
    """Return the faster of SDPA and matmul on this CPU."""
    q = torch.zeros(shape, dtype=dtype)
    k = torch.zeros((shape[0], shape[1], visible, shape[3]), dtype=dtype)
    cost = {attend: _cpu_seconds(attend, q, k) for attend in (sdpa, matmul)}
    logger.info("attention probe: sdpa %.2f ms, matmul %.2f ms", 1e3 * cost[sdpa], 1e3 * cost[matmul])
    return min(cost, key=lambda attend: cost[attend])


def _cpu_seconds(attend: Attend, q: Tensor, k: Tensor) -> float:
    """Return the median CPU time of one call: unlike wall time it hardly notices other processes."""
    times = []
    with torch.inference_mode():
        for _ in range(_PROBE_REPEATS + 1):
            start = time.process_time()
            attend(q, k, k)
            times.append(time.process_time() - start)
    return statistics.median(times[1:])
