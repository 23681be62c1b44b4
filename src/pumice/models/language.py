"""Any Hugging Face decoder as a language model that reads embeddings and answers with logits.

Shapes: B batch, T positions, D model width, V vocabulary, K kept positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pumice.core.errors import PumiceError
from pumice.models.head_loss import WHOLE, has_plain_head, head_loss
from pumice.models.modes import evaluating
from pumice.models.packed_attention import Documents
from pumice.models.pretrained import (
    default_attention,
    load_pretrained,
    read_config,
    without_init,
)

# Since this function exists, every decoder gathers bool[B, T] positions before its LM head.
_GATHERS_BEFORE_HEAD = hasattr(transformers.modeling_utils, "slice_logits_to_keep")


class LanguageModel(nn.Module):
    """A decoder of transformers; `from_folder` reads weights, `from_config` makes new ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self.hidden_size: int = embeddings.weight.shape[1]
        self.vocab_size: int = embeddings.weight.shape[0]
        self.plain_head: bool | None = None
        """What `has_plain_head` has found; None before it was asked."""

    @classmethod
    def from_config(
        cls, config: Any, *, attention: str | None = None, init: bool = True
    ) -> LanguageModel:
        """A new float32 language model of this shape."""
        try:
            with without_init(not init):
                model = AutoModelForCausalLM.from_config(
                    config,
                    dtype=torch.float32,
                    attn_implementation=attention or default_attention(),
                )
        except ValueError as error:
            raise PumiceError(
                f"model_type {config.model_type!r} cannot be a language model: {error}. A decoder "
                f"that transformers' AutoModelForCausalLM knows is allowed."
            ) from error
        model.tie_weights()
        return cls(model)

    @classmethod
    def from_folder(cls, path: Path | str, *, attention: str | None = None) -> LanguageModel:
        """The language model of a Hugging Face folder, in float32."""
        config = read_config(path, part="language model")
        return cls(
            load_pretrained(
                AutoModelForCausalLM,
                Path(path),
                config,
                attention,
                part="language model",
            )
        )

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and answer together; huge when the config has no limit."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2**31)

    @property
    def token_embeddings(self) -> torch.Tensor:
        """The table float[V, D]."""
        table: torch.Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return table

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embeddings.device

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """long[B, T] -> float[B, T, D]."""
        embedded: torch.Tensor = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        return embedded

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        keep: torch.Tensor | None = None,
        documents: Sequence[int] | None = None,
        head: bool = True,
    ) -> torch.Tensor:
        """float[B, T, D] -> float[B, T, V], or float[K, V] for the K True positions of bool[B, T].

        Without mask and cache, documents packed into one row stay apart when their `position_ids`
        restart at 0; a mask or transformers' own default cache would let them see each other.
        `documents`, the lengths of those of the one row, spares what is between them; before that
        `packed_attention.attend_to_documents` must have prepared and checked the decoder.
        Without `head` comes what the output head would read, float[K, D].
        """
        gathers = keep is not None and _GATHERS_BEFORE_HEAD
        extra: dict[str, Any] = {"logits_to_keep": keep} if gathers else {}
        if documents is not None:
            assert attention_mask is None and cache is None
            extra["documents"] = Documents(documents)
        with nullcontext() if head else self._headless():
            logits: torch.Tensor = self.model(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=cache is not None,
                **extra,
            ).logits
        return logits[keep] if keep is not None and not gathers else logits

    def loss(
        self,
        inputs_embeds: torch.Tensor,
        targets: torch.Tensor,
        keep: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        documents: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """float[B, T, D], long[K], bool[B, T] with K True -> float[], the summed cross entropy."""
        places: dict[str, Any] = {"position_ids": position_ids, "documents": documents}
        if not self.loss_in_pieces(len(targets)):
            logits = self(inputs_embeds, keep=keep, **places)
            return F.cross_entropy(logits.float(), targets, reduction="sum")
        output: nn.Linear = self.model.get_output_embeddings()  # type: ignore[operator]
        hidden = self(inputs_embeds, keep=keep, head=False, **places)
        return head_loss(hidden, output.weight, output.bias, targets)

    def loss_in_pieces(self, count: int) -> bool:
        """Whether the loss of so many tokens is computed a piece at a time.

        The first time the model itself is asked, so not while it looks at images.
        """
        return count * self.vocab_size > WHOLE and self.has_plain_head()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Without dropout and gradients, for a while."""
        with evaluating(self), torch.no_grad():
            yield

    def has_plain_head(self) -> bool:
        """Whether the loss may be computed a piece at a time; tried on the model the first time."""
        if self.plain_head is None:
            self.plain_head = has_plain_head(self)
        return self.plain_head

    @contextmanager
    def _headless(self) -> Iterator[None]:
        """The output head gives back what it gets, for a while."""
        output: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        output.forward = lambda hidden: hidden
        try:
            yield
        finally:
            del output.forward
