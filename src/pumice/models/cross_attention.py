"""Gated cross-attention: a decoder looks at pictures from layers put between its blocks.

The text holds one placeholder an image; what the picture shows comes in through attention behind
tanh gates that begin at zero, so a fresh model is its language model unchanged. Each position sees
the last image before it, as in Flamingo (arXiv 2204.14198, section 2.2 and appendix A.1.2).
The layers hang on forward pre-hooks of the decoder's blocks: no code for a family, no new names
in the language model's state dict.
Shapes: B batch, T positions, K latents of a row's images, Dm their width, D model width, H heads,
Dh head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pumice.core.errors import PumiceError
from pumice.models.connectors.base import Connector
from pumice.models.connectors.perceiver import GatedOptions, Perceiver, activate, norm_heads
from pumice.models.connectors.reduction import ReducedConnector
from pumice.models.constants import IMAGE_ID
from pumice.models.language import LanguageModel

Projected = tuple[torch.Tensor, torch.Tensor]
# For each document of a packed row the number of its positions, and of the latents of its images.
Documents = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Media:
    """The images of a batch, and which of them each position sees."""

    states: torch.Tensor
    """float[B, K, Dm], the latents of a row's images one after the other, then padding."""
    owner: torch.Tensor
    """long[B, K], the index in its row of the image a latent belongs to; -1 is padding."""
    seen: torch.Tensor
    """long[B, T], the index of the last image up to each position; -1 when there is none."""
    projected: dict[int, Projected] = field(default_factory=dict)
    """Keys and values of each layer, kept while no gradient is wanted: decoding needs them at
    every token."""
    documents: Documents | None = None
    """Those of a packed row, B = 1: each is looked through on its own."""

    def after(self) -> Media:
        """The same images for the one token that follows: it sees what the last position saw."""
        return Media(self.states, self.owner, self.seen[:, -1:], self.projected)

    def window(self, first: int, last: int) -> Media:
        """The same images for the positions from `first` to before `last`."""
        return Media(self.states, self.owner, self.seen[:, first:last], self.projected)

    @staticmethod
    def side_by_side(rows: Sequence[Media | None]) -> Media | None:
        """One row and one position each, as `after` gives them -> all in one; None without any."""
        some = next((row for row in rows if row is not None), None)
        if some is None:
            return None
        blind = Media(some.states[:, :0], some.owner[:, :0], torch.full_like(some.seen, -1))
        blind.projected = {n: (k[:, :, :0], v[:, :, :0]) for n, (k, v) in some.projected.items()}
        given = [blind if row is None else row for row in rows]
        width = max(row.owner.shape[1] for row in given)

        def padded(parts: Sequence[torch.Tensor], value: float = 0) -> torch.Tensor:
            """float[1, ..., K, D] each -> float[B, ..., K, D]."""
            return torch.cat(
                [F.pad(part, (0, 0, 0, width - part.shape[-2]), value=value) for part in parts]
            )

        return Media(
            padded([row.states for row in given]),
            padded([row.owner.unsqueeze(-1) for row in given], -1).squeeze(-1),
            torch.cat([row.seen for row in given]),
            {
                layer: (
                    padded([row.projected[layer][0] for row in given]),
                    padded([row.projected[layer][1] for row in given]),
                )
                for layer in some.projected
            },
        )


def media_for(
    ids: torch.Tensor,
    latents: Sequence[Sequence[torch.Tensor] | torch.Tensor],
    position_ids: torch.Tensor | None = None,
    documents: Sequence[int] | None = None,
) -> Media | None:
    """long[B, T], for each row float[Ki, Dm] of each image -> Media; None without any image.

    Where `position_ids`, long[B, T], restart at 0 a new document begins, which sees no image of
    the one before it. `documents` are the lengths of those of a packed row.
    """
    is_image = ids == IMAGE_ID
    places = is_image.sum(1).tolist()
    for row, (wanted, given) in enumerate(zip(places, latents, strict=True)):
        if wanted != len(given):
            raise PumiceError(
                f"row {row} has {wanted} image placeholders and {len(given)} images; with gated "
                f"cross-attention both must be equal. Encode the text with the processor of this "
                f"model, and pass exactly the images it names."
            )
    if not any(places):
        return None
    rows = [torch.cat(list(images)) if len(images) else None for images in latents]
    some = next(row for row in rows if row is not None)
    width = max(len(row) for row in rows if row is not None)
    padded = [F.pad(some[:0] if row is None else row, (0, 0, 0, width)) for row in rows]
    owners = [
        [place for place, image in enumerate(images) for _ in range(len(image))]
        for images in latents
    ]
    owner = torch.tensor([(row + [-1] * width)[:width] for row in owners], device=ids.device)
    states = torch.stack([row[:width] for row in padded])
    looked = None if documents is None else _documents(is_image[0], latents[0], documents)
    return Media(states, owner, _last_image(is_image, position_ids), documents=looked)


def _documents(
    is_image: torch.Tensor, latents: Sequence[torch.Tensor] | torch.Tensor, lengths: Sequence[int]
) -> Documents:
    """bool[T], float[Ki, Dm] of each image -> positions and latents of each document."""
    images = iter(latents)
    counts = [int(part.sum()) for part in torch.split(is_image.cpu(), list(lengths))]
    return tuple(
        (length, sum(len(next(images)) for _ in range(count)))
        for length, count in zip(lengths, counts, strict=True)
    )


def by_row(
    ids: torch.Tensor, latents: Sequence[torch.Tensor] | torch.Tensor | None
) -> list[list[torch.Tensor]]:
    """long[B, T], latents of all images in reading order -> those of each row."""
    counts = (ids == IMAGE_ID).sum(1).tolist()
    images = [] if latents is None else list(latents)
    if sum(counts) != len(images):
        raise PumiceError(
            f"the text has {sum(counts)} image placeholders and {len(images)} images are given; "
            f"with gated cross-attention both must be equal. Encode the text with the processor of "
            f"this model, and pass exactly the images it names."
        )
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [images[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _last_image(is_image: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """bool[B, T] -> long[B, T], the index of the last image up to each position, or -1."""
    met = is_image.long().cumsum(1)
    if position_ids is None:
        return met - 1
    before = met - is_image.long()
    # How many images the row has shown when the document of a position begins.
    gone = before.masked_fill(position_ids != 0, 0).cummax(1).values
    return torch.where(met > gone, met - 1, -1)


class GatedLayer(nn.Module):
    """Attention to the latents, then a feed-forward layer, each behind its tanh gate."""

    def __init__(self, width: int, media_width: int, heads: int, options: GatedOptions) -> None:
        super().__init__()
        head_width = options.cross_head_width or width // heads
        inner = heads * head_width
        self.heads = heads
        self.attention_norm = _norm(width, options)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(media_width, inner, bias=False)
        self.value = nn.Linear(media_width, inner, bias=False)
        self.query_norm = _norm(head_width, options) if options.qk_norm else None
        self.key_norm = _norm(head_width, options) if options.qk_norm else None
        self.out = nn.Linear(inner, width, bias=False)
        gates = width if options.gate == "vector" else 1
        self.attention_gate = nn.Parameter(torch.zeros(gates))
        self.feed_norm = _norm(width, options)
        hidden = options.feed_forward_width or 4 * width
        self.activation = options.activation
        self.gate = nn.Linear(width, hidden, bias=False) if options.feed_forward == "glu" else None
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.feed_gate = nn.Parameter(torch.zeros(gates))

    def project(self, states: torch.Tensor) -> Projected:
        """float[B, K, Dm] -> keys and values, each float[B, H, K, Dh]."""
        key = norm_heads(self.key(states), self.heads, self.key_norm)
        return self._split(key), self._split(self.value(states))

    def forward(
        self,
        hidden: torch.Tensor,
        states: torch.Tensor | None = None,
        owner: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
        documents: Documents | None = None,
        projected: Projected | None = None,
    ) -> torch.Tensor:
        """float[B, T, D], float[B, K, Dm], long[B, K], long[B, T] -> float[B, T, D].

        Where no image is seen, attention adds exactly nothing; the feed-forward layer stays.
        `projected` is what `project` makes of the states, when it is known already.
        """
        if states is not None:
            assert owner is not None and seen is not None
            keys, values = projected or self.project(states)
            mixed = self._attend(hidden, keys, values, owner, seen, documents)
            hidden = hidden + self.attention_gate.tanh() * mixed
        normed = self.feed_norm(hidden)
        inner = self.up(normed)
        if self.gate is None:
            inner = activate(inner, self.activation)
        else:
            inner = activate(self.gate(normed), self.activation) * inner
        fed: torch.Tensor = self.down(inner)
        return hidden + self.feed_gate.tanh() * fed

    def _attend(
        self,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        owner: torch.Tensor,
        seen: torch.Tensor,
        documents: Documents | None,
    ) -> torch.Tensor:
        query = norm_heads(self.query(self.attention_norm(hidden)), self.heads, self.query_norm)
        query, blind = self._split(query), seen < 0
        # A softmax over nothing has no value; such positions see all latents, and drop the result.
        if documents is None:
            mixed = _look(query, keys, values, owner, seen)
        else:
            positions, latents = (list(counts) for counts in zip(*documents, strict=True))
            pieces = zip(
                torch.split(query, positions, 2),
                torch.split(keys, latents, 2),
                torch.split(values, latents, 2),
                torch.split(owner, latents, 1),
                torch.split(seen, positions, 1),
                strict=True,
            )
            # A document without images is blind all through.
            mixed = torch.cat([_look(*p) if p[1].shape[2] else p[0] for p in pieces], 2)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out.masked_fill(blind[..., None], 0.0)

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], self.heads, -1).transpose(1, 2)


def _look(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    owner: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """float[B, H, T, Dh], twice float[B, H, K, Dh], and which of them to see -> [B, H, T, Dh]."""
    allowed = (owner[:, None] == seen[..., None]) | (seen < 0)[..., None]
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, keys, values, allowed[:, None])
    # On CPU the fused kernel is slower at these sizes, in bfloat16 several times.
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    mixed: torch.Tensor = scores.softmax(-1, torch.float32).to(values.dtype) @ values
    return mixed


class CrossAttentionLayers(nn.Module):
    """The gated layers of one language model, and the embedding of its image placeholders."""

    def __init__(self, language: LanguageModel, media_width: int, options: GatedOptions) -> None:
        super().__init__()
        width, blocks = language.hidden_size, len(decoder_blocks(language))
        heads = options.cross_heads or _text_config(language).num_attention_heads
        if options.cross_head_width is None and width % heads:
            raise PumiceError(
                f"gated cross-attention has {heads} heads, and the language model's width is "
                f"{width}: the heads share it evenly. Set cross_heads to a divisor of {width}, or "
                f"cross_head_width."
            )
        self.every = options.every
        self.layers = nn.ModuleList(
            GatedLayer(width, media_width, heads, options) for _ in range(0, blocks, options.every)
        )
        # An average token to begin with, whatever the scale of the language model's embeddings.
        self.marker = nn.Parameter(language.token_embeddings.detach().float().mean(0))
        self._media: Media | None = None

    def attach(self, language: LanguageModel) -> None:
        """Puts the layers before blocks 0, `every`, 2 `every` ... of the language model; once."""
        for index, block in enumerate(decoder_blocks(language)[:: self.every]):
            block.register_forward_pre_hook(partial(self._before_block, index), with_kwargs=True)

    @contextmanager
    def using(self, media: Media | None) -> Iterator[None]:
        """Within it the language model sees these images; outside, and with None, none at all."""
        before, self._media = self._media, media
        try:
            yield
        finally:
            self._media = before

    def mark(self, embeds: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
        """float[B, T, D], bool[B, T] -> float[B, T, D] with the marker at the placeholders."""
        return torch.where(is_image[..., None], self.marker.to(embeds.dtype), embeds)

    def _before_block(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._look(index, block, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._look(index, block, kwargs["hidden_states"])}

    def _look(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        layer, media = self.layers[index], self._media
        assert isinstance(layer, GatedLayer)
        if media is not None and media.seen.shape != hidden.shape[:2]:
            raise PumiceError(
                f"the language model reads {tuple(hidden.shape[:2])} rows and positions, and the "
                f"images are laid out for {tuple(media.seen.shape)}; both must be equal. Make the "
                f"media from the same ids, and `Media.after` for each token that follows."
            )
        given: tuple[Any, ...] = (hidden,)
        if media is not None:
            given = (hidden, media.states, media.owner, media.seen, media.documents)
        if torch.is_grad_enabled():
            # The block recomputes only itself; its gated layer follows its example.
            if getattr(block, "gradient_checkpointing", False) and block.training:
                recomputed: torch.Tensor = checkpoint(layer, *given, use_reentrant=False)
                return recomputed
            looked: torch.Tensor = layer(*given)
            return looked
        projected = None
        if media is not None:
            if index not in media.projected:
                media.projected[index] = layer.project(media.states)
            projected = media.projected[index]
        looked = layer(*given, projected=projected)
        return looked


def build_cross_attention(
    connector: Connector, language: LanguageModel
) -> CrossAttentionLayers | None:
    """The gated layers that a connector's latents need, attached; None when there are none.

    All other connectors give image tokens that stand in the text themselves.
    """
    if isinstance(connector, ReducedConnector):
        connector = connector.inner
    if not isinstance(connector, Perceiver):
        return None
    layers = CrossAttentionLayers(language, connector.media_width, connector.gated)
    layers.attach(language)
    return layers


def decoder_blocks(language: LanguageModel) -> nn.ModuleList:
    """The blocks of any decoder: the outermost list that has as many as its config says."""
    blocks = _text_config(language).num_hidden_layers
    for module in language.model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == blocks:
            return module
    raise PumiceError(
        f"the blocks of the language model are needed (gated cross-attention, checkpointing, "
        f"compile), and no list of {blocks} blocks was found in {type(language.model).__name__}. "
        f"Decoders such as Llama, Qwen, Phi and Gemma are allowed; choose one, or go without."
    )


def _text_config(language: LanguageModel) -> Any:
    return language.config.get_text_config()


def _norm(width: int, options: GatedOptions) -> nn.Module:
    kind = nn.RMSNorm if options.norm == "rms" else nn.LayerNorm
    return kind(width, eps=options.norm_eps)
