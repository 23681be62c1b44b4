"""Encoded conversations to one batch, padded or packed.

Shapes: C = conversations, B = rows, T = positions of a row, N = views, S = their side, I = images,
L = tokens of the longest instruction. Padded, B is C and T the longest; packed, B is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pumice.core.errors import PumiceError
from pumice.models.connectors import Instruction
from pumice.models.constants import IGNORE
from pumice.processing.encoded import Encoded
from pumice.processing.view_room import in_one


@dataclass
class Batch:
    """Conversations in rows. Contract 2 (processing -> models).

    `position_ids` restart at each document, and the padding is a document of its own: behind the
    conversation and never learnt, it needs no attention mask in training. `documents` are the
    lengths of the conversations of a packed row, None for padded ones. `grids` are the tiles of
    each image (columns, rows) and `image_sizes` its width and height. `instruction` is what is
    asked of each image, None where the connector does not read it.
    """

    input_ids: torch.Tensor  # long[B, T]
    labels: torch.Tensor  # long[B, T]
    position_ids: torch.Tensor  # long[B, T]
    pixel_values: torch.Tensor  # float[N, 3, S, S]
    grids: torch.Tensor  # long[I, 2]
    lengths: torch.Tensor  # long[C]
    sample_ids: list[str]
    image_sizes: list[tuple[int, int]]
    instruction: Instruction | None = None  # long[I, L], bool[I, L]
    documents: tuple[int, ...] | None = None

    @property
    def num_supervised(self) -> int:
        """How many tokens are learnt; a first token is predicted from nothing and cannot be."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        asked = self.instruction
        return replace(
            self,
            instruction=asked and Instruction(*(part.to(device) for part in asked)),
            **{name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS},
        )


_TENSORS = ("input_ids", "labels", "position_ids", "pixel_values", "grids", "lengths")


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Conversations padded on the right -> long[B, T] ids, labels, positions; float[N, 3, S, S]."""
    _check_some(encoded)
    lengths = [len(one.input_ids) for one in encoded]
    shape = len(encoded), max(lengths)
    # In numpy, which reads a list of numbers in a quarter of torch's time.
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    position_ids = np.empty(shape, np.int64)
    places = np.arange(shape[1])
    for row, (one, length) in enumerate(zip(encoded, lengths, strict=True)):
        input_ids[row, :length] = one.input_ids
        labels[row, :length] = one.labels
        position_ids[row, :length] = places[:length]
        position_ids[row, length:] = places[: shape[1] - length]
    return _batch(encoded, *map(torch.from_numpy, (input_ids, labels, position_ids)))


def collate_packed(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Conversations one after the other in one row -> long[1, T], without any padding.

    The first token of each is predicted from nothing, as in a row of its own, and never learnt.
    """
    _check_some(encoded)
    lengths = tuple(len(one.input_ids) for one in encoded)
    labels = [label for one in encoded for label in (IGNORE, *one.labels[1:])]
    batch = _batch(
        encoded,
        torch.tensor([[token for one in encoded for token in one.input_ids]], dtype=torch.long),
        torch.tensor([labels], dtype=torch.long),
        torch.cat([torch.arange(length) for length in lengths])[None],
    )
    return replace(batch, documents=lengths)


def _batch(
    encoded: Sequence[Encoded],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor,
) -> Batch:
    """Three times long[B, T], and all that belongs to images in reading order."""
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        pixel_values=in_one([one.pixel_values for one in encoded]),
        grids=torch.tensor(
            [grid for one in encoded for grid in one.grids], dtype=torch.long
        ).reshape(-1, 2),
        lengths=torch.tensor([len(one.input_ids) for one in encoded], dtype=torch.long),
        sample_ids=[one.sample_id for one in encoded],
        image_sizes=[size for one in encoded for size in one.image_sizes],
        instruction=pad_instructions([ids for one in encoded for ids in one.instructions]),
    )


def _check_some(encoded: Sequence[Encoded]) -> None:
    if not encoded:
        raise PumiceError(
            "an empty list cannot become a batch; one or more encoded conversations are needed. "
            "Check that the data has rows."
        )


def pad_instructions(instructions: Sequence[Sequence[int]]) -> Instruction | None:
    """The ids of I instructions -> long[I, L] and bool[I, L]; None without any."""
    if not instructions:
        return None
    longest = max(len(ids) for ids in instructions)
    ids = torch.zeros(len(instructions), longest, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, given in enumerate(instructions):
        ids[row, : len(given)] = torch.tensor(given, dtype=torch.long)
        mask[row, : len(given)] = True
    return Instruction(ids, mask)
