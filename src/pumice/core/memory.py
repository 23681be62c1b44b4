"""Memory of this process: the most it held, and what it no longer uses given back."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def peak_memory_bytes() -> int:
    """The most main memory this process has held."""
    if _STATUS.is_file():
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return 1024 * peaks[0]
    import resource

    # On Linux the second choice: a process inherits the mark of the one that started it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Frees what only reference cycles still hold, and returns free pages of the heap.

    glibc keeps freed blocks of less than 32 MB for itself, and between the activations of one
    forward pass and the next they come to lie so that nothing fits into them: over the probes of a
    conversion several hundred megabytes pile up. Elsewhere than with glibc only cycles are freed.
    """
    gc.collect()
    give_back_heap()


def give_back_heap() -> None:
    """Returns free pages of the heap to the system, where the allocator is glibc's."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def keep_freed_memory() -> None:
    """From now on freed blocks of any size stay with this process, where the allocator is glibc's.

    Otherwise large blocks are new each time, and the system clears each of their pages: a twentieth
    of a training step on a CPU, a sixth of loading a picture. `give_back_heap` still gives back.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@cache
def _glibc(name: str) -> Any:
    """A function of glibc's allocator, or None where it is another."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return None
