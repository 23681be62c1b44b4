"""The nouns that travel between rooms: messages, samples, requests, results and predictions.

No tensors here, so importing this file costs nothing; the tensor side is
`processing.collate.Batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import PIL.Image

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text inside a message; never interpreted ('<image>' in it is plain text)."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image at its place inside a message: a file, encoded bytes, or an opened picture."""

    image: Path | bytes | PIL.Image.Image


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts joined; images leave no trace."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """The images of this turn in reading order."""
        return tuple(part for part in self.content if isinstance(part, ImagePart))


def user(text: str, *images: Path | bytes | PIL.Image.Image) -> Message:
    """A user turn as LLaVA writes it: the images, a line break, the text."""
    parts: list[Part] = [ImagePart(image) for image in images]
    parts.append(TextPart(f"\n{text}" if images else text))
    return Message("user", tuple(parts))


def assistant(text: str) -> Message:
    """An assistant turn."""
    return Message("assistant", (TextPart(text),))


@dataclass(frozen=True, slots=True)
class Sample:
    """One training conversation. Contract 1 (data -> processing).

    `id` and `source` (file and row) name it in every error.
    """

    id: str
    messages: tuple[Message, ...]
    source: str = ""

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """All images in reading order."""
        return tuple(image for message in self.messages for image in message.images)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when to stop. Temperature 0 is greedy.

    `top_logprobs` asks for log probabilities: of the chosen tokens (0), and of so many of the
    likeliest beside each (1 and more); None for none. With `choices` the answer is one of them:
    at each token the model chooses among those that lead to one.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token with its natural log probability under the model, before any sampling.

    `token` is what it adds to the text, with the blank before a word that is not the first.
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """Id, text and log probability of the likeliest tokens, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Request:
    """A question to the engine: the messages so far. Contract 3 (serve, eval -> infer)."""

    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An answer, or an error; an error is never an empty answer. Contract 3 (infer -> serve, eval).

    `prompt_tokens` counts every position of the prompt, `image_tokens` the ones among them that
    hold image features; `new_tokens` counts generated tokens including the end token.
    `cached_tokens` are the positions of the prompt that were known from earlier requests; they
    change the time of an answer and nothing else. `logprobs` has one entry a token of the text.
    """

    id: str = ""
    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    image_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = field(default=0, compare=False)
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One line of predictions.jsonl. Contract 4 (eval -> study).

    `text` is the raw answer; `parsed` what the benchmark's own rule read in it (None: unparsed);
    `score` its score (None: not scored, see `error`). `extra` holds the benchmark's own columns.
    """

    id: str
    prompt_hash: str
    text: str
    parsed: str | None
    score: float | None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The line as an object; `extra` is the prediction's own, no copy (asdict makes many)."""
        return {name: getattr(self, name) for name in self.__slots__}
