"""The next token of a single row, in numpy.

A token of a small model is some sixty small operations, and of one that does not fit into the
processor's cache hardly more than the reading of its weights. numpy starts an operation in a third
of torch's time, and its BLAS reads a matrix faster for one row than torch's on some processors.
Shapes: L layers, H heads, Hk key heads, Dh head width, S columns, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from pumice.infer.attending import attention
from pumice.infer.plain_blocks import Block
from pumice.infer.products import Norm, Product

Array = NDArray[np.float32]

# Bytes of weights from which reading them by several threads saves more than waking those takes.
_WORTH_THREADS = 16 * 1024**2
# Bytes of a layer's keys and values from which torch's threads read them faster than one of numpy.
_WORTH_TORCH = 512 * 1024


class OneRow:
    """A decoder's blocks, run for one row on the CPU in float32; SiLU is its activation."""

    def __init__(
        self,
        blocks: Sequence[Block],
        norm: Norm,
        head: Product,
        heads: tuple[int, int],
        read: int,
    ) -> None:
        """`heads`: of queries and of keys; `read`: bytes of float32 weights."""
        self._blocks, self._norm, self._head = blocks, norm, head
        self._heads, self._key_heads = heads
        self._worth_threads = read >= _WORTH_THREADS

    def at_work(self) -> AbstractContextManager[object]:
        """While a thread holds this, numpy's products take as many threads as are worth it.

        Its BLAS has threads of its own, by default as many as cores, and knows nothing of torch's.
        Taking hold is too slow for every token.
        """
        limit: AbstractContextManager[object] = _blas().limit(
            limits=torch.get_num_threads() if self._worth_threads else 1
        )
        return limit

    def __call__(self, hidden: Array, turns: NDArray[np.complex64], known: Array) -> Array:
        """float[D], complex[Dh / 2], float[L, 2, Hk, S, Dh] -> float[V].

        `known` are keys and values, those of this position to be written into its last column.
        """
        # What is off the scale comes out as infinite or no number, as it does of torch.
        with np.errstate(all="ignore"):
            for block, kept in zip(self._blocks, known, strict=True):
                states = self._states(block, hidden, turns)
                kept[:, :, -1] = states[self._heads :].reshape(2, self._key_heads, -1)
                mixed = self._attention(states[: self._heads], kept, block.scaling)
                hidden = block.out.one(mixed, hidden)
                both = block.gate_up.one(block.feed_norm.one(hidden))
                hidden = block.down.one(_gated(both), hidden)
            return self._head.one(self._norm.one(hidden))

    def _states(self, block: Block, hidden: Array, turns: NDArray[np.complex64]) -> Array:
        """float[D] -> float[H + 2 Hk, Dh]: queries, keys and values; the former turned."""
        turned = self._heads + self._key_heads
        states = block.qkv.one(block.norm.one(hidden)).reshape(turned + self._key_heads, -1)
        if block.query_norm is not None and block.key_norm is not None:
            states[: self._heads] = block.query_norm.heads(states[: self._heads])
            states[self._heads : turned] = block.key_norm.heads(states[self._heads : turned])
        pairs = states[:turned].view(np.complex64)
        np.multiply(pairs, turns, out=pairs)
        return states

    def _attention(self, query: Array, known: Array, scaling: float) -> Array:
        """float[H, Dh], float[2, Hk, S, Dh] -> float[H Dh]."""
        if known.nbytes >= _WORTH_TORCH and torch.get_num_threads() > 1 and not self._worth_threads:
            one, every = torch.from_numpy(query[None, None]), torch.from_numpy(known[:, None])
            mixed: Array = attention(one, every, self._heads, scaling, None).numpy()
            return mixed.reshape(-1)
        keys, values = known
        query = (query * np.float32(scaling)).reshape(self._key_heads, -1, query.shape[-1])
        scores = np.matmul(query, keys.transpose(0, 2, 1))
        scores -= np.maximum.reduce(scores, -1, keepdims=True)
        np.exp(scores, out=scores)
        found: Array = np.matmul(scores, values)
        found /= np.add.reduce(scores, -1, keepdims=True)
        return found.reshape(-1)


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of this process, among them numpy's; none that threadpoolctl knows not."""
    return ThreadpoolController().select(user_api="blas")


def _gated(both: Array) -> Array:
    """float[2 F], gate and up -> float[F]: SiLU of the gate, times up."""
    gate, up = both[: len(both) // 2], both[len(both) // 2 :]
    out: Array = np.negative(gate)
    np.exp(out, out=out)
    out += np.float32(1)
    np.divide(gate, out, out=out)
    out *= up
    return out
