"""The keys and values of rows in flight, in buffers that are written in place.

Rows are padded on the left and share their last column, so that all write to the same column and
sliding windows keep their meaning; a rectangle of B rows and as many columns as the longest row
has. Rows join and leave while the others stay where they are. transformers' own cache copies
everything it holds at every token. Shapes: L layers, B rows, H key heads, S columns, Dh head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, DynamicLayer

from pumice.infer.pages import empty_like

# Free columns behind the last one, so that a buffer is copied once in so many tokens.
_HEADROOM = 64
# Those behind prompts that are read side by side: a short answer needs no other memory.
_ANSWER = 16

Pieces = list[torch.Tensor]
"""The keys and values of some positions of one row, float[..., H, n, Dh] each."""


class PromptCache(Protocol):
    """Keys and values of one prompt that is being read."""

    @property
    def width(self) -> int:
        """The columns in use."""

    def pieces(self, row: int, first: int, last: int) -> Pieces:
        """Copies of the columns `first` to `last` of a row, which is 0."""

    def extend(self, pieces: Pieces) -> None:
        """Appends what `pieces` gave."""


class BatchCache(Protocol):
    """Keys and values of the rows in flight; what the engine does with them."""

    @property
    def width(self) -> int:
        """The columns in use."""

    def first_column(self, length: int) -> int:
        """The column in which a row of this length begins."""

    def join(self, other: Any, length: int, more: int = 0) -> None:
        """Takes in the last `length` columns of a cache of one row, of the same decoder's.

        `more` rows, none of them longer, come right behind it: room is made for all at once.
        """

    def take_over(self, caches: Sequence[Any]) -> bool:
        """Becomes these caches of one row each, without a copy, if they lie so and it is empty."""

    def leave(self, row: int, width: int) -> None:
        """Gives a row up; the last one moves into its place, and `width` columns are kept."""

    def pieces(self, row: int, first: int, last: int) -> Pieces:
        """Copies of the columns `first` to `last` of a row."""


class Buffer:
    """Rows that end in the same column: float[*lead, B, H, S, Dh], and room for more of them."""

    def __init__(
        self, like: torch.Tensor, lead: tuple[int, ...] = (), columns: int | None = None
    ) -> None:
        """For what looks like `like`, float[..., H, any, Dh]; one row takes `columns`, if given."""
        rows = 0 if columns is None else 1
        shape = (*lead, rows, like.shape[-3], columns or 0, like.shape[-1])
        self._data = empty_like(like, shape)
        self._rows = 0
        self._first = 0
        self._end = 0

    @classmethod
    def within(cls, data: torch.Tensor) -> Self:
        """An empty buffer in memory that is there: float[*lead, 1, H, S, Dh]."""
        buffer = cls(data[..., :0, :])
        buffer._data = data
        return buffer

    @classmethod
    def full(cls, data: torch.Tensor, end: int) -> Self:
        """A buffer of memory, float[*lead, B, H, S, Dh], whose columns before `end` are set."""
        buffer = cls(data[..., :0, :])
        buffer._data, buffer._rows, buffer._end = data, data.shape[-4], end
        return buffer

    @property
    def width(self) -> int:
        """The columns in use."""
        return self._end - self._first

    @property
    def is_full(self) -> bool:
        """Whether another column would need other memory."""
        return self._end == self._data.shape[-2]

    @property
    def shown(self) -> torch.Tensor:
        """What is in use: a view, float[*lead, B, H, S, Dh]."""
        return self._data[..., : self._rows, :, self._first : self._end, :]

    def extend(self, new: int, rows: int) -> torch.Tensor:
        """`new` more columns -> they, to be written to: a view, float[*lead, B, H, new, Dh].

        `rows` are those of an empty buffer, and else as many as there are.
        """
        self._make_room(rows, self.width, new)
        self._rows = rows
        self._end += new
        return self._data[..., :rows, :, self._end - new : self._end, :]

    def join(self, row: torch.Tensor, more: int = 0) -> None:
        """Takes in a row, float[*lead, H, n, Dh], and makes room for `more` of no greater n."""
        length = row.shape[-2]
        if self._rows == 0:
            self._first = self._end = min(length, self._data.shape[-2])
        width = max(length, self.width)
        self._make_room(self._rows + 1 + more, width, 0)
        data, end = self._data, self._end
        # Padding must be numbers: what is masked is still multiplied by zero.
        data[..., : self._rows, :, end - width : self._first, :] = 0
        data[..., self._rows, :, end - width : end - length, :] = 0
        data[..., self._rows, :, end - length : end, :] = row
        self._first = end - width
        self._rows += 1

    def leave(self, row: int, width: int) -> None:
        """Gives a row up; the last one moves into its place, and `width` columns are kept."""
        self._rows -= 1
        columns = slice(self._end - width, self._end)
        if row != self._rows:
            moved = self._data[..., self._rows, :, columns, :]
            self._data[..., row, :, columns, :] = moved
        self._first = self._end - width

    def piece(self, row: int, first: int, last: int) -> torch.Tensor:
        """A copy of the columns `first` to `last` of a row: float[*lead, H, n, Dh]."""
        columns = slice(self._first + first, self._first + last)
        return self._data[..., row, :, columns, :].clone()

    def _make_room(self, rows: int, width: int, new: int) -> None:
        """Room for `rows` rows whose `width` columns end at the last one, and for `new` more."""
        *lead, known, heads, columns, head_width = self._data.shape
        if rows <= known and self._end >= width and self._end + new <= columns:
            return
        old = self.shown
        rows = rows if rows <= known else max(rows, 2 * known)
        columns = width + new + max(_HEADROOM, (width + new) // 2)
        shape = (*lead, rows, heads, columns, head_width)
        # Many rows hold much, and to find large pages for it may take longer than they save.
        self._data = empty_like(old, shape) if rows == 1 else old.new_empty(shape)
        start = width - old.shape[-2]
        self._data[..., : self._rows, :, start:width, :] = old
        self._first, self._end = start, width


class BufferLayer(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values, float[B, H, S, Dh], as transformers' decoders take them."""

    _buffers: tuple[Buffer, Buffer]
    is_initialized: bool

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float[B, H, T, Dh] twice -> float[B, H, S + T, Dh] twice."""
        rows, _, new, _ = key_states.shape
        self._begin(key_states, value_states)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.extend(new, rows)[:] = states
        self._show()
        return self.keys, self.values

    def join(self, other: BufferLayer, length: int, more: int) -> None:
        """Takes in the last `length` columns of a layer of one row; `more` rows come behind it."""
        self._begin(other.keys, other.values)
        for buffer, states in zip(self._buffers, (other.keys, other.values), strict=True):
            buffer.join(states[0, :, states.shape[2] - length :], more)
        self._show()

    def leave(self, row: int, width: int) -> None:
        """Gives a row up; the last one moves into its place, and `width` columns are kept."""
        for buffer in self._buffers:
            buffer.leave(row, width)
        self._show()

    def pieces(self, row: int, first: int, last: int) -> Pieces:
        """Copies of the columns `first` to `last` of a row: keys, values."""
        return [buffer.piece(row, first, last) for buffer in self._buffers]

    def _begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.is_initialized:
            # Some families have values of another width than their keys.
            self._buffers = Buffer(keys), Buffer(values)
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True

    def _show(self) -> None:
        self.keys, self.values = (buffer.shown for buffer in self._buffers)


class BufferCache(Cache):  # type: ignore[misc]
    """A cache for transformers' decoders that rows join and leave."""

    layers: list[BufferLayer]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BufferLayer)

    @property
    def width(self) -> int:
        """The columns in use."""
        return int(self.layers[0].get_seq_length()) if self.layers else 0

    def first_column(self, length: int) -> int:
        """The column in which a row of this length begins: all end in the last one."""
        return self.width - length

    def join(self, other: BufferCache, length: int, more: int = 0) -> None:
        """Takes in the last `length` columns of a cache of one row; `more` rows come behind it."""
        while len(self.layers) < len(other.layers):
            self.layers.append(BufferLayer())
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.join(source, length, more)

    def take_over(self, caches: Sequence[BufferCache]) -> bool:
        """Never: each lies in memory of its own."""
        return False

    def leave(self, row: int, width: int) -> None:
        """Gives a row up; the last one moves into its place, and `width` columns are kept."""
        for layer in self.layers:
            layer.leave(row, width)

    def pieces(self, row: int, first: int, last: int) -> Pieces:
        """Copies of the columns `first` to `last` of a row: keys and values, layer by layer."""
        return [piece for layer in self.layers for piece in layer.pieces(row, first, last)]

    def extend(self, pieces: Pieces) -> None:
        """Appends to a cache of one row what `pieces` gave."""
        for index in range(len(pieces) // 2):
            keys, values = pieces[2 * index : 2 * index + 2]
            self.update(keys.unsqueeze(0), values.unsqueeze(0), index)


class Beside(NamedTuple):
    """Where a cache lies among those that were made together with it."""

    every: torch.Tensor
    """float[L, 2, B, H, S, Dh]; rows end in the same column, and behind it is room for answers."""
    row: int
    first: int
    """The row's first column; before it stand numbers that mean nothing."""
    end: int
    """The column behind the last of every row."""


class StackedCache:
    """All layers in one tensor, float[L, 2, B, H, S, Dh]: what happens to a row is one copy."""

    def __init__(self, layers: int, like: torch.Tensor, columns: int | None = None) -> None:
        """For what looks like `like`, float[H, any, Dh]; one row takes `columns`, if given."""
        self._buffer = Buffer(like, (layers, 2), columns)
        self.beside: Beside | None = None

    @classmethod
    def side_by_side(cls, layers: int, like: torch.Tensor, columns: Sequence[int]) -> list[Self]:
        """Empty caches of one row each, of so many columns, which lie in one tensor."""
        heads, _, width = like.shape
        end = max(columns)
        every = like.new_empty(layers, 2, len(columns), heads, end + _ANSWER, width)
        # Padding must be numbers, for what is masked is still multiplied by zero.
        every[..., : end - min(columns), :] = 0
        caches = [cls(layers, like) for _ in columns]
        for row, (cache, count) in enumerate(zip(caches, columns, strict=True)):
            cache._buffer = Buffer.within(every[:, :, row : row + 1, :, end - count : end])
            cache.beside = Beside(every, row, end - count, end)
        return caches

    @property
    def width(self) -> int:
        """The columns in use."""
        return self._buffer.width

    def grow(self, new: int, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`new` more columns, written to layer by layer.

        -> views of each layer's own new ones, float[2, B, H, new, Dh], and of all its columns.
        """
        fresh = self._buffer.extend(new, rows)
        return list(fresh.unbind(0)), list(self._buffer.shown.unbind(0))

    def grow_row(self) -> NDArray[np.float32]:
        """One more column of a cache of one row -> all of its columns: float[L, 2, H, S, Dh].

        A view of the CPU's memory: the last column is to be written to.
        """
        self._buffer.extend(1, 1)
        shown: NDArray[np.float32] = self._buffer.shown[:, :, 0].numpy()
        return shown

    def first_column(self, length: int) -> int:
        """The column in which a row of this length begins: all end in the last one."""
        return self.width - length

    def join(self, other: StackedCache, length: int, more: int = 0) -> None:
        """Takes in the last `length` columns of a cache of one row; `more` rows come behind it."""
        row = other._buffer.shown[:, :, 0]
        self._buffer.join(row[..., row.shape[-2] - length :, :], more)

    def take_over(self, caches: Sequence[StackedCache]) -> bool:
        """The full caches of one tensor, all of them and in order, become this empty one.

        Nothing is copied; those are not to be used any more. Whether these were such caches.
        """
        if self.width or not StackedCache.whole(caches):
            return False
        if not all(cache._buffer.is_full for cache in caches):
            return False
        assert caches[0].beside is not None
        self._buffer = Buffer.full(caches[0].beside.every, caches[0].beside.end)
        return True

    @staticmethod
    def whole(caches: Sequence[StackedCache]) -> bool:
        """Whether these are all rows of one tensor, in order."""
        one = caches[0].beside
        return (
            one is not None
            and len(caches) == one.every.shape[2]
            and all(
                cache.beside is not None
                and cache.beside.every is one.every
                and cache.beside.row == row
                for row, cache in enumerate(caches)
            )
        )

    def leave(self, row: int, width: int) -> None:
        """Gives a row up; the last one moves into its place, and `width` columns are kept."""
        self._buffer.leave(row, width)

    def pieces(self, row: int, first: int, last: int) -> Pieces:
        """Copies of the columns `first` to `last` of a row, in one tensor."""
        return [self._buffer.piece(row, first, last)]

    def extend(self, pieces: Pieces) -> None:
        """Appends to a cache of one row what `pieces` gave."""
        for piece in pieces:
            self._buffer.extend(piece.shape[-2], 1)[:, :, 0] = piece
