"""Memory for what every token reads from end to end: in large pages, where the system has them.

A page of 4 KiB is found anew every 4 KiB, which on a virtual machine costs up to a quarter of the
time in which a matrix is read. numpy asks Linux for pages of 2 MiB for whatever takes 4 MiB or more
(its NUMPY_MADVISE_HUGEPAGE), torch does not; so the memory here is numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

# Smaller matrices share a block of so many bytes; what of it is not used is never in memory.
_BLOCK = 32 * 1024**2
# From here on numpy asks for large pages.
_LARGE = 4 * 1024**2
_LINE = 64


class Pages:
    """Tensors on the CPU side by side in large blocks, which live as long as any of them."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)
        self._passing = torch.empty(0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape, its numbers not set."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._left):
            self._left = _block(max(size, _BLOCK))
        taken = self._left[:size]
        self._left = self._left[size + -size % _LINE :]
        return taken.view(dtype).view(*shape)

    def passing(self, count: int) -> torch.Tensor:
        """float[count] that everyone gets who asks, for what is read at once: it stays in cache."""
        if count > len(self._passing):
            self._passing = torch.empty(count)
        return self._passing[:count]

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy; of what is on another device a plain one there."""
        if tensor.device.type != "cpu":
            return tensor.contiguous()
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def empty_like(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of this shape and its type and device, not set; in large pages if it is large."""
    size = math.prod(shape) * tensor.dtype.itemsize
    if tensor.device.type != "cpu" or size < _LARGE:
        return tensor.new_empty(shape)
    return _block(size)[:size].view(tensor.dtype).view(*shape)


def _block(size: int) -> torch.Tensor:
    """uint8[size or more], from the beginning of a cache line."""
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[start:])
