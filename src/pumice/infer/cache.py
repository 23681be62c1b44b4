"""The keys and values of the rows in flight, in buffers that are written in place.

transformers' own cache copies everything it holds at every token; this one only when it must grow
or when rows leave. Shapes: B rows, H key heads, S columns, Dh head width.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer

_HEADROOM = 64


class BufferLayer(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values, float[B, H, S, Dh]; the columns in use are views of buffers."""

    _key_buffer: torch.Tensor
    _value_buffer: torch.Tensor
    is_initialized: bool

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float[B, H, T, Dh] twice -> float[B, H, S + T, Dh] twice."""
        used = self.get_seq_length()
        needed = used + key_states.shape[2]
        if not self.is_initialized or needed > self._key_buffer.shape[2]:
            self._grow(key_states, value_states, used, needed)
        self._key_buffer[:, :, used:needed] = key_states
        self._value_buffer[:, :, used:needed] = value_states
        self.keys = self._key_buffer[:, :, :needed]
        self.values = self._value_buffer[:, :, :needed]
        return self.keys, self.values

    def select(self, rows: torch.Tensor, first: int) -> None:
        """Keeps the rows of long[R], and of their columns those from `first` on."""
        used = self.get_seq_length()
        self._key_buffer = self._key_buffer[rows, :, first:]
        self._value_buffer = self._value_buffer[rows, :, first:]
        self.keys = self._key_buffer[:, :, : used - first]
        self.values = self._value_buffer[:, :, : used - first]

    def _grow(self, keys: torch.Tensor, values: torch.Tensor, used: int, needed: int) -> None:
        columns = max(needed + _HEADROOM, used + used // 2)
        fresh_keys = keys.new_empty(*keys.shape[:2], columns, keys.shape[3])
        fresh_values = values.new_empty(*values.shape[:2], columns, values.shape[3])
        if used:
            fresh_keys[:, :, :used] = self.keys
            fresh_values[:, :, :used] = self.values
        self._key_buffer, self._value_buffer = fresh_keys, fresh_values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


class BufferCache(Cache):  # type: ignore[misc]
    """A cache for transformers' decoders from which finished rows can leave."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BufferLayer)

    def select(self, rows: torch.Tensor, first: int = 0) -> None:
        """Keeps the rows of long[R], and of their columns those from `first` on."""
        for layer in self.layers:
            layer.select(rows, first)
