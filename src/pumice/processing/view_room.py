"""Memory for the views of a batch, one after the other, so that they are not copied to become one.

Shapes: N views of S x S pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class ViewRoom:
    """float[N, 3, S, S] that is given out view by view; when all are, there is no more room."""

    def __init__(self, count: int, side: int) -> None:
        # numpy's memory: it asks Linux for large pages, and torch does not.
        views = np.empty((count, 3, side, side), np.float32)
        self._free = iter(torch.from_numpy(views).unbind())

    def take(self) -> torch.Tensor | None:
        """The next float[3, S, S], to be filled, or None."""
        return next(self._free, None)


def in_one(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """float[n, 3, S, S] of each -> float[N, 3, S, S]; no copy where one lies behind the other."""
    parts = [part for part in parts if len(part)] or list(parts[:1])
    first = parts[0]
    if len(parts) == 1:
        return first
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        beside = part.untyped_storage().data_ptr() == storage and part.storage_offset() == offset
        if not beside or not part.is_contiguous() or part.shape[1:] != first.shape[1:]:
            return torch.cat(list(parts))
        offset += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
