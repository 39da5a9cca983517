"""Memory the machine has, and memory this process took."""

import os
import sys
from pathlib import Path

import torch

_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory a run on ``device`` may use, or ``None`` where that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = _MEMORY.read_text().splitlines()
        physical = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        physical = _all_memory()
    if physical is None:
        return None
    try:
        return min(physical, int(_GROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no control group, or one without a limit
        return physical


def _all_memory() -> int | None:
    """Return the bytes of main memory the machine has, or ``None`` where that cannot be asked."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def peak_memory() -> int | None:
    """Return the most bytes of main memory this process has held, or ``None`` where that cannot be asked."""
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def lacks_memory(error: Exception) -> bool:
    """Return whether ``error`` says that there was no memory left, on the CPU or the GPU."""
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def in_words(size: float) -> str:
    """Return a number of bytes for people, e.g. ``6.04 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
