"""InstructBLIP's Q-Former: a BERT in which learnable queries read the picture and the instruction.

Every weight bears its name in transformers' InstructBlipForConditionalGeneration: `query_tokens`,
`qformer.*`, `language_projection.*`. Of the last block the part for text alone is left out:
nothing reads it, so it would have neither use nor gradient.
Shapes: N views, P features, Dv their width, Q queries, L instruction tokens, S = Q + L, W the
Q-Former's width, D the language model's width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from pumice.core.errors import PumiceError
from pumice.models.connectors.attention import attend, feature_mask
from pumice.models.connectors.base import (
    Connector,
    Instruction,
    Sizes,
    options_dict,
    read_options,
)


@dataclass(frozen=True, slots=True)
class QFormerOptions:
    """What a recipe may say of a Q-Former; the defaults are InstructBLIP's."""

    queries: int = 32
    """Q, the image tokens of one view."""
    width: int = 768
    """W."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    every: int = 2
    """Of so many blocks one reads the picture, beginning with the first."""
    hidden: int | None = None
    """Width of the feed-forward layers; left out, four times W."""
    instruction: bool = True
    """Whether the queries read the instruction too (InstructBLIP), or only the picture (BLIP-2)."""
    vocab_size: int | None = None
    """Ids of the instruction's tokenizer; left out, as many as it has."""
    max_instruction: int = 512
    """The longest instruction in tokens."""
    dropout: float = field(default=0.1, metadata={"below": 1.0})
    """In training, of embeddings, attention and block outputs."""
    norm_eps: float = 1e-12
    """The layer norms' epsilon."""


class Attention(nn.Module):
    """BERT's post-norm attention, to itself or to features of another width."""

    def __init__(self, options: QFormerOptions, key_width: int) -> None:
        super().__init__()
        width = options.width
        self.heads = options.heads
        self.dropout = options.dropout
        self.attention = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(key_width, width),
                "value": nn.Linear(key_width, width),
            }
        )
        self.output = AddNorm(width, options)

    def forward(
        self, states: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """float[N, A, W], float[N, K, key width], bool[N, K] | None -> float[N, A, W]."""
        parts = self.attention
        query, key, value = parts["query"](states), parts["key"](source), parts["value"](source)
        dropout = self.dropout if self.training else 0.0
        added: torch.Tensor = self.output(
            attend(query, key, value, mask, self.heads, dropout), states
        )
        return added


class AddNorm(nn.Module):
    """A linear layer whose output is added to the residual and normalised."""

    def __init__(self, in_width: int, options: QFormerOptions) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, options.width)
        self.LayerNorm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.dropout = options.dropout

    def forward(self, states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """float[..., in width], float[..., W] -> float[..., W]."""
        written = F.dropout(self.dense(states), self.dropout, self.training)
        normed: torch.Tensor = self.LayerNorm(written + residual)
        return normed


class Widen(nn.Module):
    """The first half of a feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """float[..., W] -> float[..., hidden]."""
        return F.gelu(self.dense(states))


class Block(nn.Module):
    """Self-attention over queries and text; the queries read the picture; a feed-forward each."""

    def __init__(self, options: QFormerOptions, hidden: int, feature_width: int, i: int) -> None:
        super().__init__()
        width = options.width
        self.attention = Attention(options, width)
        self.crossattention = Attention(options, feature_width) if i % options.every == 0 else None
        self.intermediate_query = Widen(width, hidden)
        self.output_query = AddNorm(hidden, options)
        self.reads_text = options.instruction
        self.writes_text = options.instruction and i < options.depth - 1
        if self.writes_text:
            self.intermediate = Widen(width, hidden)
            self.output = AddNorm(hidden, options)

    def forward(
        self,
        states: torch.Tensor,
        queries: int,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        seen: torch.Tensor | None,
    ) -> torch.Tensor:
        """float[N, S, W], Q, float[N, P, Dv], bool[N, S], bool[N, P] -> float[N, S or Q, W]."""
        # The text after the last block is read by nobody.
        wanted = states if self.writes_text else states[:, :queries]
        states = self.attention(wanted, states, mask)
        asked, text = states[:, :queries], states[:, queries:]
        if self.crossattention is not None:
            asked = self.crossattention(asked, features, seen)
        asked = self.output_query(self.intermediate_query(asked), asked)
        if not self.writes_text:
            return cast(torch.Tensor, asked)
        text = self.output(self.intermediate(text), text)
        return torch.cat([asked, text], dim=1)


class Embeddings(nn.Module):
    """The queries and, after them, the instruction's words with their positions."""

    def __init__(self, options: QFormerOptions, vocab_size: int) -> None:
        super().__init__()
        if options.instruction:
            self.word_embeddings = nn.Embedding(vocab_size, options.width)
            self.position_embeddings = nn.Embedding(options.max_instruction, options.width)
        self.layernorm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.dropout = options.dropout

    def forward(self, queries: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """float[N, Q, W], long[N, L] | None -> float[N, S, W]."""
        if ids is not None:
            places = self.position_embeddings.weight[: ids.shape[1]]
            queries = torch.cat([queries, self.word_embeddings(ids) + places], dim=1)
        normed: torch.Tensor = self.layernorm(queries)
        return F.dropout(normed, self.dropout, self.training)


class QFormer(Connector):
    """float[N, P, Dv] (+ instruction) -> float[N, Q, D]."""

    def __init__(self, sizes: Sizes, options: QFormerOptions) -> None:
        super().__init__()
        width, hidden = options.width, options.hidden or 4 * options.width
        vocab_size = options.vocab_size or sizes.vocab_size
        self.query_tokens = nn.Parameter(torch.randn(1, options.queries, width) * 0.02)
        blocks = [Block(options, hidden, sizes.in_dim, i) for i in range(options.depth)]
        self.qformer = nn.ModuleDict(
            {
                "embeddings": Embeddings(options, vocab_size),
                "encoder": nn.ModuleDict({"layer": nn.ModuleList(blocks)}),
            }
        )
        self.language_projection = nn.Linear(width, sizes.out_dim)
        self.wants_instruction = options.instruction
        self.vocab_size = vocab_size
        self.max_instruction = options.max_instruction
        self.apply(_init_as_bert)
        resolved = options_dict(options) | {"hidden": hidden}
        if options.instruction:
            resolved["vocab_size"] = vocab_size
        self.describe(sizes, options.queries, None, resolved)

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        instruction: Instruction | None = None,
    ) -> torch.Tensor:
        """float[N, P, Dv], bool[N, P] | None, instructions of N views -> float[N, Q, D]."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        ids, words = self._read(instruction, len(features))
        if words is not None:
            words = F.pad(words, (self.num_tokens, 0), value=True)
        seen = feature_mask(features, mask)
        states = self.qformer["embeddings"](queries, ids)
        for block in self.layers:
            states = block(states, self.num_tokens, features, words, seen)
        tokens: torch.Tensor = self.language_projection(states)
        return tokens

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        blocks = self.qformer["encoder"]["layer"]  # type: ignore[index]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _read(
        self, instruction: Instruction | None, views: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """long[N, L] and bool[N, L] of the instruction; None twice for a Q-Former without."""
        if not self.wants_instruction:
            return None, None
        if instruction is None:
            raise PumiceError(
                "this qformer reads the instruction, and none was given with the picture. Encode "
                "the question with the processor of this model (instruction_ids), or train a "
                "qformer with the option instruction: false."
            )
        ids, mask = instruction
        if ids.shape != mask.shape or ids.shape[0] != views:
            raise PumiceError(
                f"the instructions of {views} views were given as ids {tuple(ids.shape)} and a "
                f"mask {tuple(mask.shape)}; both must be ({views}, length)."
            )
        if ids.shape[1] > self.max_instruction:
            raise PumiceError(
                f"an instruction has {ids.shape[1]} tokens; this qformer reads at most "
                f"{self.max_instruction} and nothing is cut off. Shorten the question."
            )
        return ids, mask


def build_qformer(name: str, sizes: Sizes, options: dict[str, Any]) -> Connector:
    """A Q-Former; `name` is its only spelling."""
    chosen = read_options(QFormerOptions, name, options)
    if chosen.width % chosen.heads:
        raise PumiceError(
            f"a qformer of width {chosen.width} cannot have {chosen.heads} heads: the heads share "
            f"its channels evenly. Choose heads that divide {chosen.width}, or another width."
        )
    return QFormer(sizes, chosen)


def _init_as_bert(module: nn.Module) -> None:
    # BERT's and InstructBLIP's start: weights of std 0.02, biases of zero.
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
