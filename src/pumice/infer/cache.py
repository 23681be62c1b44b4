"""The keys and values of rows in flight, in buffers that are written in place.

Rows are padded on the left and share their last column, so that all write to the same column and
sliding windows keep their meaning; a rectangle of B rows and as many columns as the longest row
has. Rows join and leave while the others stay where they are. transformers' own cache copies
everything it holds at every token. Shapes: B rows, H key heads, S columns, Dh head width.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Free columns behind the last one, so that a buffer is copied once in so many tokens.
_HEADROOM = 64

Piece = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer and one row, float[H, n, Dh] each."""


class BufferLayer(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values, float[B, H, S, Dh]; what is in use are views of buffers."""

    _key_buffer: torch.Tensor
    _value_buffer: torch.Tensor
    is_initialized: bool
    _rows: int = 0
    _first: int = 0
    _end: int = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float[B, H, T, Dh] twice -> float[B, H, S + T, Dh] twice."""
        rows, _, new, _ = key_states.shape
        if not self.is_initialized:
            self._allocate(key_states, value_states, rows, new)
            self._rows = rows
        self._make_room(rows, self._end - self._first, new)
        self._key_buffer[:rows, :, self._end : self._end + new] = key_states
        self._value_buffer[:rows, :, self._end : self._end + new] = value_states
        self._end += new
        self._show()
        return self.keys, self.values

    def join(self, other: BufferLayer, row: int, length: int) -> None:
        """Takes in a row of another layer: its last `length` columns."""
        keys = other.keys[row, :, other.keys.shape[2] - length :]
        values = other.values[row, :, other.values.shape[2] - length :]
        if not self.is_initialized:
            self._allocate(keys.unsqueeze(0), values.unsqueeze(0), 1, length)
        if self._rows == 0:
            self._first = self._end = min(length, self._key_buffer.shape[2])
        width = max(length, self._end - self._first)
        self._make_room(self._rows + 1, width, 0)
        for buffer, piece in ((self._key_buffer, keys), (self._value_buffer, values)):
            # Padding must be numbers: what is masked is still multiplied by zero.
            buffer[: self._rows, :, self._end - width : self._first] = 0
            buffer[self._rows, :, self._end - width : self._end - length] = 0
            buffer[self._rows, :, self._end - length : self._end] = piece
        self._first = self._end - width
        self._rows += 1
        self._show()

    def leave(self, row: int, width: int) -> None:
        """Gives a row up; the last one moves into its place, and `width` columns are kept."""
        last = self._rows - 1
        if row != last:
            for buffer in (self._key_buffer, self._value_buffer):
                buffer[row, :, self._end - width : self._end] = buffer[
                    last, :, self._end - width : self._end
                ]
        self._rows = last
        self._first = self._end - width
        self._show()

    def piece(self, row: int, first: int, last: int) -> Piece:
        """A copy of the columns `first` to `last` of a row: float[H, n, Dh] twice."""
        return self.keys[row, :, first:last].clone(), self.values[row, :, first:last].clone()

    def _show(self) -> None:
        self.keys = self._key_buffer[: self._rows, :, self._first : self._end]
        self.values = self._value_buffer[: self._rows, :, self._first : self._end]

    def _make_room(self, rows: int, width: int, new: int) -> None:
        """Room for `rows` rows whose `width` columns end at the last one, and for `new` more."""
        known, _, columns, _ = self._key_buffer.shape
        if rows <= known and self._end >= width and self._end + new <= columns:
            return
        keys, values = self._key_buffer, self._value_buffer
        used, first, end = self._rows, self._first, self._end
        self._allocate(keys, values, rows if rows <= known else max(rows, 2 * known), width + new)
        for buffer, old in ((self._key_buffer, keys), (self._value_buffer, values)):
            buffer[:used, :, width - (end - first) : width] = old[:used, :, first:end]
        self._first, self._end = width - (end - first), width

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor, rows: int, columns: int) -> None:
        columns += max(_HEADROOM, columns // 2)
        self._key_buffer = keys.new_empty(rows, keys.shape[1], columns, keys.shape[3])
        self._value_buffer = values.new_empty(rows, values.shape[1], columns, values.shape[3])
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


class BufferCache(Cache):  # type: ignore[misc]
    """A cache for transformers' decoders that rows join and leave."""

    layers: list[BufferLayer]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BufferLayer)

    @property
    def width(self) -> int:
        """The columns in use."""
        return int(self.layers[0].get_seq_length()) if self.layers else 0

    def join(self, other: BufferCache, length: int, row: int = 0) -> None:
        """Takes in the last `length` columns of a row of another cache."""
        while len(self.layers) < len(other.layers):
            self.layers.append(BufferLayer())
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.join(source, row, length)

    def leave(self, row: int, width: int) -> None:
        """Gives a row up; the last one moves into its place, and `width` columns are kept."""
        for layer in self.layers:
            layer.leave(row, width)

    def pieces(self, row: int, first: int, last: int) -> list[Piece]:
        """Copies of the columns `first` to `last` of a row, one layer after the other."""
        return [layer.piece(row, first, last) for layer in self.layers]

    def extend(self, pieces: list[Piece]) -> None:
        """Appends to a cache of one row what `pieces` gave."""
        for index, (keys, values) in enumerate(pieces):
            self.update(keys.unsqueeze(0), values.unsqueeze(0), index)
