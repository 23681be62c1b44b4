"""One request on its way through the engine: what it asks, how far it is, what it has said."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pumice.core.types import Request, Result, TokenLogprob
from pumice.infer.answer import Answer, Decode
from pumice.infer.cache import PromptCache
from pumice.infer.features import Shown
from pumice.infer.sampling import Sampler
from pumice.models.constants import IMAGE_ID
from pumice.models.cross_attention import Media

# Positions of one image before the next image's numbers begin.
_IMAGE_STRIDE = 1 << 32

Chosen = tuple[int, float, list[tuple[int, float]]]
"""A token, its log probability, and the likeliest tokens with theirs."""


@dataclass(frozen=True, slots=True)
class Span:
    """The positions of one image in a prompt: `first` up to but not including `last`."""

    first: int
    last: int
    shown: Shown


@dataclass(slots=True, eq=False)
class Row:
    """One request: checked and tokenised when it is made, then read, then answered."""

    request: Request
    prompt: list[int]
    """Ids, with IMAGE_ID at the placeholders."""
    spans: list[Span]
    sampler: Sampler
    answer: Answer
    max_positions: int
    """Prompt and longest possible answer together."""
    symbols: list[int] = field(default_factory=list)
    """What stands at each position: equal beginnings have equal keys and values."""
    cache: PromptCache | None = None
    """Keys and values while the prompt is read; afterwards those of the batch have them."""
    features: list[torch.Tensor | None] = field(default_factory=list)
    """float[Qi, D] of each image while the prompt is read; None where it is known as a prefix."""
    media: Media | None = None
    """What gated layers look at, from every position of the prompt, then from its last."""
    read: int = 0
    """Positions of the prompt that are read."""
    reused: int = 0
    """Those of them that were known already."""
    last: int = 0
    """The token that was chosen last."""
    error: str | None = None
    cancelled: bool = False
    logprobs: list[Chosen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.symbols = symbols_of(self.prompt, self.spans)

    @property
    def length(self) -> int:
        """Positions that have keys and values: the prompt and every token but the newest."""
        return len(self.prompt) + max(self.answer.new_tokens - 1, 0)

    @property
    def where(self) -> str:
        """How errors name the request."""
        return name_of(self.request)

    @property
    def images(self) -> list[Shown]:
        """The images in reading order."""
        return [span.shown for span in self.spans]

    @property
    def begun(self) -> bool:
        """Whether its prompt is being read, or was."""
        return self.cache is not None or self.answer.new_tokens > 0

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        done = self.answer.finish_reason is not None
        return done or self.cancelled or self.error is not None

    def result(self, decode: Decode) -> Result:
        """What came of the request."""
        if self.error is not None:
            return Result(id=self.request.id, error=self.error)
        reason = self.answer.finish_reason
        wanted = self.request.sampling.top_logprobs is not None
        return Result(
            id=self.request.id,
            text=self.answer.text if reason else self.answer.settled,
            finish_reason=reason or "cancelled",
            prompt_tokens=len(self.prompt),
            image_tokens=self.prompt.count(IMAGE_ID),
            new_tokens=self.answer.new_tokens,
            cached_tokens=self.reused,
            logprobs=self.told(decode, 0, len(self.answer.ids)) if wanted else None,
        )

    def told(self, decode: Decode, first: int, last: int) -> tuple[TokenLogprob, ...]:
        """The log probabilities of the tokens `first` to `last`; none where none are wanted."""
        return tuple(
            TokenLogprob(
                token,
                _text_of(token, decode, place),
                logprob,
                tuple((other, _text_of(other, decode, place), value) for other, value in top),
            )
            for place, (token, logprob, top) in enumerate(self.logprobs[first:last], first)
        )


def name_of(request: Request) -> str:
    """How errors name a request."""
    return f"request {request.id!r}" if request.id else "the prompt"


def _text_of(token: int, decode: Decode, place: int) -> str:
    """What a token adds to an answer in which it stands at `place`.

    Many decoders drop the blank before the first word, so a later token is read behind itself.
    """
    alone = decode([token])
    behind = decode([token, token]) if place else ""
    return behind[len(alone) :] if behind.startswith(alone) else alone


def symbols_of(prompt: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """Prompt ids with a number of its own at every image position: the image's and the place's."""
    symbols = list(prompt)
    for span in spans:
        digest = hashlib.sha256(repr(span.shown.key).encode()).digest()
        start = -(int.from_bytes(digest[:12], "big") + 1) * _IMAGE_STRIDE
        symbols[span.first : span.last] = range(start, start + span.last - span.first)
    return symbols


def features_between(
    spans: Sequence[Span], features: Sequence[torch.Tensor | None], first: int, last: int
) -> list[torch.Tensor]:
    """The features float[n, D] of each image that stand at positions `first` to `last`."""
    found = []
    for span, image in zip(spans, features, strict=True):
        start, end = max(span.first, first), min(span.last, last)
        if start < end:
            assert image is not None
            found.append(image[start - span.first : end - span.first])
    return found
