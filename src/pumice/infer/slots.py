"""Keys and values of rows in flight at places that never move: a slot for every row.

A decode step that is recorded once and run again (a CUDA graph) reads and writes the addresses of
its recording, so the memory has a fixed size, row r lies in slot r from its first column on, and
what a step may look at is a number of slots and columns rounded up. Memory outlives the cache that
used it, with what was recorded over it. Shapes: L layers, R slots, H key heads, S columns, Dh head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pumice.infer.cache import Pieces, StackedCache

# Columns that a step looks at are rounded up to these: each number is another recording, and what
# lies between is read for nothing.
COLUMNS = 128
# Slots are rounded up to powers of two below this, and to multiples of it from there on.
_SLOTS = 16

Replay = Callable[[], torch.Tensor]
"""Runs a recorded step over what its inputs hold now -> float[R, V]."""


class SlotMemory:
    """What slots lie in, keys and values apart, and the steps recorded over it."""

    def __init__(self, layers: int, like: torch.Tensor) -> None:
        """Without a slot; for what looks like `like`, float[H, any, Dh]."""
        heads, _, width = like.shape
        self._nothing = (like.new_zeros(layers, 0, heads, 0, width),) * 2
        self.data = self._nothing
        """Keys and values, float[L, R, H, S, Dh] each."""
        self.inputs = torch.zeros(2, 0, dtype=torch.long, device=like.device)
        """long[2, >= R]: the tokens of a step, and the columns in which they will stand."""
        self.seen: set[tuple[int, int]] = set()
        """The numbers of slots and columns of which a step has run."""
        self.recorded: dict[tuple[int, int], Replay] = {}

    def hold(self, slots: int, columns: int) -> None:
        """Makes room for so many, at least those in use; what stands in a slot keeps its place.

        Where room is made it is for what is needed now: a long row of long ago is not remembered,
        nor a large batch, so that this never holds many times what is in flight.
        """
        layers, known, heads, before, width = self.data[0].shape
        if slots <= known and columns < before:
            return
        if columns < before:
            columns = min(before - COLUMNS, 2 * columns)
        else:
            # Half as much again, for all of it is copied each time.
            columns = max(columns, before + before // 2)
        # Columns that no step looks at, so that a compiler does not take the two numbers for one.
        shape = layers, rounded_slots(slots), heads, rounded_columns(columns) + COLUMNS, width
        # The old ones first: they are what recordings look at.
        self.recorded.clear()
        self.seen.clear()
        self._move(shape)
        # An even number, so that the second row begins at 16 bytes: what is compiled copies others.
        self.inputs = self.inputs.new_zeros(2, shape[1] + shape[1] % 2)

    def _move(self, shape: tuple[int, ...]) -> None:
        """The same in tensors of this shape; after a failure there is nothing left."""
        keys, values = self.data
        self.data = self._nothing
        # One after the other, and what is let go goes back to the GPU: at its largest this is most
        # of the memory there is, and twice of it would not be there.
        keys = _moved(keys, shape)
        _give_back(keys.device)
        values = _moved(values, shape)
        _give_back(keys.device)
        self.data = keys, values


class SlotCache:
    """The rows in flight, each in a slot; the last one moves into the slot of one that leaves."""

    def __init__(self, memory: SlotMemory) -> None:
        """Without a row; nobody else may use the memory meanwhile."""
        self.memory = memory
        self.lengths: list[int] = []

    @property
    def width(self) -> int:
        """The columns in use."""
        return max(self.lengths, default=0)

    def first_column(self, length: int) -> int:
        """The column in which a row of this length begins."""
        return 0

    def join(self, other: StackedCache, length: int, more: int = 0) -> None:
        """Takes in the last `length` columns of a cache of one row; `more` rows come behind it."""
        row = len(self.lengths)
        # One more column for the token that comes next, which may well be the answer's last.
        self.memory.hold(row + 1 + more, max(length, self.width) + 1)
        [piece] = other.pieces(0, other.width - length, other.width)
        for data, part in zip(self.memory.data, piece.unbind(1), strict=True):
            data[:, row, :, :length] = part
        self.lengths.append(length)

    def take_over(self, caches: Sequence[StackedCache]) -> bool:
        """Never: rows are copied to their slots."""
        return False

    def leave(self, row: int, width: int) -> None:
        """Gives a row up; the last one moves into its slot."""
        length = self.lengths.pop()
        last = len(self.lengths)
        for data in self.memory.data:
            if row != last:
                data[:, row, :, length : self.lengths[row]] = 0
                data[:, row, :, :length] = data[:, last, :, :length]
            # Numbers that are none would reach whoever comes next, masked or not.
            data[:, last, :, :length] = 0
        if row != last:
            self.lengths[row] = length

    def pieces(self, row: int, first: int, last: int) -> Pieces:
        """Copies of the columns `first` to `last` of a row, in one tensor."""
        return [torch.stack([data[:, row, :, first:last] for data in self.memory.data], 1)]


def _moved(old: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """float[L, R, H, S, Dh] -> as much of it as `shape` holds, and zeros."""
    # What is masked is still multiplied by zero, so that it must be numbers.
    data = old.new_zeros(shape)
    slots, columns = min(old.shape[1], shape[1]), min(old.shape[3], shape[3])
    data[:, :slots, :, :columns] = old[:, :slots, :, :columns]
    return data


def _give_back(device: torch.device) -> None:
    """Has the GPU have again what nobody uses; torch would keep it, and cut it up for others."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rounded_slots(rows: int) -> int:
    """The slots that a step of so many rows is run with."""
    if rows > _SLOTS:
        return rows + -rows % _SLOTS
    return 1 << (rows - 1).bit_length() if rows else 0


def rounded_columns(columns: int) -> int:
    """The columns that a step is run with whose longest row comes to so many."""
    return columns + -columns % COLUMNS
