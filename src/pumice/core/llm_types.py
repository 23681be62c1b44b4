"""What goes to a chat endpoint and what comes back: requests, replies, failures, prices."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pumice.core.errors import PumiceError
from pumice.core.files import sha256_bytes
from pumice.core.types import ImagePart, Message, Part

FailureKind = Literal[
    "refused_by_server", "rate_limited", "server_error", "timeout", "connection", "bad_reply",
    "empty", "filtered", "cost_cap", "not_recorded", "stopped",
]  # fmt: skip
"""Why there is no answer. `rate_limited` to `bad_reply` were asked again before they were given up;
`refused_by_server` is a status such as 400 or 401; `empty` and `filtered` are complete replies
without text; the last three were never sent."""

# Bytes of a message's JSON that are no text of its own: role, separators and template.
_MESSAGE_OVERHEAD = 16
_MEDIA_TYPES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"GIF8": "image/gif",
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One call of `/chat/completions`. `draw` tells repeated calls of equal content apart."""

    model: str
    messages: tuple[dict[str, Any], ...]
    """In OpenAI's form; `chat_messages` makes it from ours."""
    max_tokens: int = 1024
    temperature: float = 0.0
    draw: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    """Further keys of the body, such as top_p; None takes a key out."""

    def body(self) -> dict[str, Any]:
        """The JSON body of the call."""
        body = {
            "model": self.model,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            **self.options,
        }
        return {name: value for name, value in body.items() if value is not None}

    @property
    def longest_answer(self) -> int:
        """The most tokens an answer may have, under either of the names endpoints know."""
        return max(self.max_tokens, int(self.options.get("max_completion_tokens") or 0))

    def key(self, url: str) -> str:
        """Names the whole request at one endpoint: its cache key and its idempotency key."""
        whole = json.dumps([url, self.body(), self.draw], sort_keys=True, ensure_ascii=False)
        return sha256_bytes(whole.encode())


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no answer, in a word for programs and a sentence for people."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer with its cost, or a failure; a failure is never an empty text.

    `finish_reason` "length" says that the text was cut at `max_tokens`. `has_text` False: there was
    no text at all (null, as beside a refusal or hidden reasoning), not even an empty one. `cost` is
    what the reply cost when it was paid, in the currency of the prices; None without prices.
    `cached` says that this call cost nothing. `attempts` counts the calls made for it now.
    """

    key: str
    text: str = ""
    has_text: bool = True
    finish_reason: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    cached: bool = False
    attempts: int = 0
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Prices:
    """What a million tokens cost, in any one currency.

    `image_tokens` is the most that one image of a prompt may be counted as.
    """

    prompt: float
    completion: float
    image_tokens: int = 1600

    def __post_init__(self) -> None:
        if not (self.prompt >= 0 and self.completion >= 0 and self.image_tokens >= 0):
            raise PumiceError(
                f"a price is negative or no number: {self}. Give what a million prompt tokens and "
                f"a million completion tokens cost."
            )

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    def most(self, request: ChatRequest) -> float:
        """The most that a request can cost: every byte of its text one token, all it may answer.

        No byte-level or sentencepiece tokenizer makes more tokens than there are bytes.
        """
        tokens = sum(_most_tokens(message, self.image_tokens) for message in request.messages)
        return self.cost(tokens, request.longest_answer)

    def expected(self, request: ChatRequest, completion_tokens: float) -> float:
        """About what a request costs: four bytes of English text make a token."""
        tokens = sum(_most_tokens(message, self.image_tokens) for message in request.messages)
        return self.cost(round(tokens / 4), round(completion_tokens))


def chat_messages(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """Our messages in OpenAI's form: plain text, or parts with images as data URIs.

    The line break between an image and the text behind it is a template's, so the server's own
    template sets it, and it is not sent.
    """
    return tuple(
        {
            "role": message.role,
            "content": _parts(message.content) if message.images else message.text,
        }
        for message in messages
    )


def _parts(content: Sequence[Part]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for before, part in zip((None, *content), content, strict=False):
        if isinstance(part, ImagePart):
            parts.append({"type": "image_url", "image_url": {"url": _data_uri(part)}})
            continue
        text = part.text.removeprefix("\n") if isinstance(before, ImagePart) else part.text
        parts.append({"type": "text", "text": text})
    return parts


def _data_uri(part: ImagePart) -> str:
    """JPEG, PNG and GIF as they are; other formats as PNG. A broken picture is a DataError."""
    # Imported here: work without pictures, such as the data engine's, starts without numpy.
    from pumice.core.images import open_image

    source = part.image
    # Opened in any case: a broken picture must fail here and not at somebody's expense.
    picture = open_image(source)
    data = source.read_bytes() if isinstance(source, Path) else source
    media = None
    if isinstance(data, bytes):
        media = next((name for head, name in _MEDIA_TYPES.items() if data.startswith(head)), None)
    if media is None or not isinstance(data, bytes):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        data, media = buffer.getvalue(), "image/png"
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def _most_tokens(message: dict[str, Any], image_tokens: int) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return _MESSAGE_OVERHEAD + len(content.encode())
    total = _MESSAGE_OVERHEAD
    for part in content or ():
        is_image = part.get("type") == "image_url"
        total += image_tokens if is_image else len(str(part.get("text", "")).encode())
    return total
