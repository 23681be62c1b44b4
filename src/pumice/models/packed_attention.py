"""Attention inside each document of a packed row, for any decoder that asks transformers' table.

One document after the other is attended to as if it were alone: no mask of a row's length squared
is ever made, and nothing is computed for pairs of positions of different documents.
Shapes: T positions of the one row, H heads, Hk key heads, Dh head width, S positions of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from pumice.core.errors import PumiceError
from pumice.models import causal_attention

if TYPE_CHECKING:
    from pumice.models.language import LanguageModel

NAME = "pumice_documents"
# Queries of a long document go in blocks of so many: what lies above the diagonal is never scored.
_BLOCK = 128
# The check: documents of three, four and five tokens.
_CHECK = (3, 4, 5)
_TOLERANCE = {torch.float32: 1e-3}
_COARSE = 5e-2


class Documents:
    """The lengths of a row's documents, which torch.compile does not look into.

    A tuple of numbers would be compiled for, anew for each row.
    """

    __slots__ = ("lengths",)

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)


def document_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    documents: Documents | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """float[1, H, T, Dh], twice float[1, Hk, T, Dh] -> float[1, T, H, Dh], causal in each document.

    `documents` are their lengths, T in all; without them each of B rows is one document, whose
    first positions may be keys and values of a cache alone. Called by transformers, with what the
    family needs: a window, a cap of the scores, a sink for each head.
    """
    if attention_mask is not None or rest.get("position_bias") is not None:
        raise PumiceError(
            f"{type(module).__name__} gives its attention a mask or a bias, which packed documents "
            f"cannot have. Set packing to null, or choose a decoder with rotary positions."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    wanted, groups = value.dtype, query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    lengths = [query.shape[2]] if documents is None else documents.lengths
    # Behind a cache stand the next words of an answer, as validation asks for them.
    of_keys = [key.shape[2]] if documents is None else documents.lengths
    plain = softcap is None and s_aux is None and of_keys == lengths
    if sliding_window is not None and sliding_window >= max(of_keys):
        sliding_window = None
    if plain and sliding_window is None and causal_attention.pays(query, lengths, dropout):
        lower = _lower_precision("cpu") or torch.float32
        return causal_attention.attend(query, key, value, lengths, scale, lower), None
    query, key, value = _in_one_precision(query, key, value)
    mixed = []
    with torch.autocast(query.device.type, enabled=False):
        parts = [torch.split(key, of_keys, 2), torch.split(value, of_keys, 2)]
        for q, k, v in zip(torch.split(query, lengths, 2), *parts, strict=True):
            if plain and (sliding_window is None or q.shape[2] <= sliding_window):
                mixed.append(
                    F.scaled_dot_product_attention(
                        q, k, v, dropout_p=dropout, is_causal=True, scale=scale
                    )
                )
            else:
                mixed.append(_attend(q * scale, k, v, dropout, sliding_window, softcap, s_aux))
    return torch.cat(mixed, 2).to(wanted).transpose(1, 2).contiguous(), None


def _lower_precision(device: str) -> torch.dtype | None:
    """That of autocast, where it is on."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _in_one_precision(*states: torch.Tensor) -> list[torch.Tensor]:
    """All in the lower precision of autocast on a GPU, and in float32 on a CPU.

    There the fused kernel of float32 is the faster one.
    """
    device = states[0].device.type
    lower = torch.float32 if device == "cpu" else _lower_precision(device)
    return list(states) if lower is None else [part.to(lower) for part in states]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """float[B, H, T, Dh], the last of a document and scaled, twice float[B, H, S, Dh] -> as query.

    Each of B rows is one document of S positions.
    """
    length, mixed = key.shape[2], []
    places = torch.arange(length, device=query.device)
    before = length - query.shape[2]
    for first in range(before, length, _BLOCK):
        last = min(first + _BLOCK, length)
        start = 0 if window is None else max(0, first - window + 1)
        asking = query[:, :, first - before : last - before]
        scores = asking @ key[:, :, start:last].transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = places[first:last, None] - places[None, start:last]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            # One more score a head, which takes its share of the softmax and gives nothing.
            sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        share = scores.softmax(-1, torch.float32)[..., : last - start].to(value.dtype)
        mixed.append(F.dropout(share, dropout) @ value[:, :, start:last])
    return torch.cat(mixed, 2)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Packed rows are not padded, and documents are told apart without a mask."""


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, _no_mask)


def attend_to_documents(language: LanguageModel) -> None:
    """Prepare a language model for packed rows, or refuse with what the check found.

    Positions that restart and this attention keep documents apart in most decoders, not in all:
    one with a state, or with a bias of its own, mixes them without a word. So twelve tokens in
    three documents go through this very model, packed and one by one, and must agree.
    """
    with language.answering():
        ids = torch.linspace(0, language.vocab_size - 1, sum(_CHECK), device=language.device).long()
        hidden = language.embed(ids[None])
        parts = torch.split(hidden, list(_CHECK), 1)
        alone = [language(part, _positions((part.shape[1],), part)) for part in parts]
        expected = torch.cat(alone, 1).float()
        use_document_attention(language)
        packed = language(hidden, _positions(_CHECK, hidden), documents=_CHECK).float()
    difference, size = float((packed - expected).abs().max()), float(expected.abs().max())
    allowed = _TOLERANCE.get(hidden.dtype, _COARSE) * size
    # Not "more than": a difference that is no number fails as well.
    if not difference <= allowed:
        raise PumiceError(
            f"packing cannot be used with {type(language.model).__name__}: of three documents in "
            f"one row, logits differ by {difference:.3g} from those of each alone (up to "
            f"{allowed:.2g} is rounding), so it lets documents see each other. Set packing to "
            f"null, or choose another language model (Llama, Qwen, Mistral, Gemma, Phi, OPT ... "
            f"keep them apart)."
        )


def use_document_attention(language: LanguageModel) -> None:
    """Let a decoder that was found fit, here or in another process, read packed rows."""
    # For good, as a block recomputed in the backward pass asks for its attention again.
    language.model.set_attn_implementation(NAME)  # type: ignore[operator]


def _positions(lengths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.arange(n, device=like.device) for n in lengths])[None]
