"""Causal attention inside the documents of a packed row, on a CPU, out of matrix products.

torch's fused kernel reaches less than half of what a core can multiply, forward and backward. Here
a block of queries meets all keys up to its last one in one product, so that all but a softmax is
left to the library's fastest routine: scores and softmax in float32, the other products in the
lower precision of autocast. Documents are filled up to a multiple of `_UNIT`, because a product of
a new shape is first compiled, which costs as much as a short document.

Shapes: T positions of the one row, H heads, Dh head width, S positions of a document, P those with
what fills it up, B queries of a block, K keys up to its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

# Queries that are computed together: fewer leave products small, more score pairs for nothing.
_BLOCK = 128
_UNIT = 32
# Narrower heads leave little to multiply for each score, and shorter documents little in a block:
# there torch's own kernel is faster.
_NARROWEST, _SHORTEST = 64, 192


def pays(query: torch.Tensor, lengths: Sequence[int], dropout: float) -> bool:
    """Whether float[B, H, T, Dh] is computed here, as one row faster than by torch's own kernel."""
    if query.device.type != "cpu" or len(query) > 1 or query.shape[-1] < _NARROWEST or dropout:
        return False
    return sum(n * n for n in lengths) >= _SHORTEST * sum(lengths)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    lower: torch.dtype,
) -> torch.Tensor:
    """float[1, H, T, Dh] three times -> float[1, T, H, Dh] in the value's type.

    `lengths` are those of the documents, T in all; `lower` is the type of all products but the
    scores', float32 included.
    """
    with torch.autocast("cpu", enabled=False):
        mixed: torch.Tensor = _CausalAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, tuple(lengths), scale, lower
        )
    return mixed


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
        scale: float,
        lower: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.given = lengths, scale, lower
        space = _Space(lower)
        mixed = _rows_like(value)
        for place in _places(lengths):
            q = space.filled("query", query[0, :, place], torch.float32).mul_(scale)
            k = space.filled("key", key[0, :, place], torch.float32)
            v = space.filled("value", value[0, :, place], lower)
            own = mixed[0, :, place]
            for start, stop in _blocks(q.shape[1]):
                shares = space.lowered("shares", _shares(space, q, k, start, stop))
                block = space("mixed", lower, len(q), stop - start, q.shape[2])
                torch.bmm(shares, v[:, :stop], out=block)
                _put(own, start, stop, block)
        return mixed.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        lengths, scale, lower = ctx.given
        of_mixed = gradients[0].transpose(1, 2)
        found = [_rows_like(x) for x in (query, key, value)]
        space = _Space(lower)
        with torch.autocast("cpu", enabled=False):
            for place in _places(lengths):
                parts = [x[0, :, place] for x in (query, key, value, of_mixed)]
                _backward(space, parts, scale, [x[0, :, place] for x in found])
        return (*found, None, None, None)


def _backward(
    space: _Space, states: Sequence[torch.Tensor], scale: float, found: Sequence[torch.Tensor]
) -> None:
    """float[H, S, Dh] of query, key, value and the output's gradient -> the first three's, `found`.

    The shares are computed again: to keep them takes memory of a document's length squared.
    """
    query, key, value, of_mixed = states
    lower = space.lower
    q = space.filled("query", query, torch.float32).mul_(scale)
    k = space.filled("key", key, torch.float32)
    v = space.filled("value", value, lower)
    g = space.filled("of_mixed", of_mixed, lower)
    low_q, low_k = space.lowered("low_query", q), space.lowered("low_key", k)
    of_key = space("of_key", torch.float32, *k.shape).zero_()
    of_value = space("of_value", torch.float32, *v.shape).zero_()
    for start, stop in _blocks(q.shape[1]):
        shares = _shares(space, q, k, start, stop)
        _add(space, of_value, space.lowered("shares", shares), g[:, start:stop])
        of_shares = space("shares", lower, *shares.shape)
        torch.bmm(g[:, start:stop], v[:, :stop].transpose(1, 2), out=of_shares)
        wide = space.widened("of_shares", of_shares)
        torch.ops.aten._softmax_backward_data.out(wide, shares, -1, torch.float32, grad_input=wide)
        of_scores = space.lowered("shares", wide)
        block = space("mixed", lower, len(q), stop - start, q.shape[2])
        torch.bmm(of_scores, low_k[:, :stop], out=block)
        _put(found[0], start, stop, block.mul_(scale))
        _add(space, of_key, of_scores, low_q[:, start:stop])
    length = query.shape[1]
    found[1].copy_(of_key[:, :length])
    found[2].copy_(of_value[:, :length])


class _Space:
    """Memory in which one document after the other is computed.

    Fresh pages for each product cost a third of the whole time.
    """

    def __init__(self, lower: torch.dtype) -> None:
        self.lower = lower
        self.flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        # Nothing is to be seen of what comes later.
        self.hidden = torch.full((_BLOCK, _BLOCK), -math.inf).triu(1)

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor of this shape, which holds anything; the next of its name takes its place."""
        size, known = math.prod(shape), self.flat.get((name, dtype))
        if known is None or len(known) < size:
            known = self.flat[name, dtype] = torch.empty(size, dtype=dtype)
        return known[:size].view(shape)

    def filled(self, name: str, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float[H, S, Dh] -> float[H, P, Dh], with zeros behind."""
        heads, length, width = part.shape
        space = self(name, dtype, heads, -(-length // _UNIT) * _UNIT, width)
        space[:, :length] = part
        space[:, length:] = 0
        return space

    def lowered(self, name: str, wide: torch.Tensor) -> torch.Tensor:
        """The same in the lower precision; itself, where that is float32."""
        return wide if self.lower == wide.dtype else self(name, self.lower, *wide.shape).copy_(wide)

    def widened(self, name: str, low: torch.Tensor) -> torch.Tensor:
        """The same in float32; itself, where it is that already."""
        wide = torch.float32
        return low if low.dtype == wide else self(name, wide, *low.shape).copy_(low)


def _shares(
    space: _Space, query: torch.Tensor, key: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """float32[H, P, Dh] twice -> float32[H, B, K]: how each query shares itself out over keys."""
    scores = space("scores", torch.float32, len(query), stop - start, stop)
    torch.bmm(query[:, start:stop], key[:, :stop].transpose(1, 2), out=scores)
    scores[:, :, start:] += space.hidden[: stop - start, : stop - start]
    return torch.softmax(scores, -1, out=scores)


def _add(space: _Space, total: torch.Tensor, shares: torch.Tensor, part: torch.Tensor) -> None:
    """float32[H, P, Dh] += float[H, B, K] transposed times float[H, B, Dh]."""
    keys = shares.shape[2]
    product = space("product", space.lower, len(total), keys, total.shape[2])
    torch.bmm(shares.transpose(1, 2), part, out=product)
    # Widened first: an addition of two types is many times slower.
    total[:, :keys] += space.widened("wide_product", product)


def _put(into: torch.Tensor, start: int, stop: int, block: torch.Tensor) -> None:
    """Writes float[H, B, Dh] to its place in float[H, S, Dh], without what filled it up."""
    stop = min(stop, into.shape[1])
    into[:, start:stop] = block[:, : stop - start]


def _rows_like(states: torch.Tensor) -> torch.Tensor:
    """An empty float[1, H, T, Dh] whose heads of one position lie together."""
    return torch.empty_like(
        states.transpose(1, 2), memory_format=torch.contiguous_format
    ).transpose(1, 2)


def _places(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, _BLOCK):
        yield start, min(start + _BLOCK, length)
