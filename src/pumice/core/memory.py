"""Memory that the process holds and no longer uses, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from typing import Any


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
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return None
