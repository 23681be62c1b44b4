"""Chat messages as OpenAI's API writes them: roles, texts, and images at their places in them.

Only what a model here can be shown is let through; a field that would be passed over is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

# Pydantic puts the tags of a union into the place of an error; these can be told from fields.
TAG = "("
# What OpenAI's own answers hold, so that an answer can be sent back as a part of the talk.
_EMPTY = ("refusal", "tool_calls", "function_call", "audio", "annotations", "name", "reasoning")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(_Strict):
    """Where an image is: a data URI, or a web address where the server fetches any.

    `auto` and `high` show it as the recipe does, which is all that the model can see; `low` asks
    for one view, so it is refused where the recipe cuts tiles.
    """

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(_Strict):
    """A text inside a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image inside a message."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        """Some clients send the address alone."""
        if isinstance(data, dict) and isinstance(data.get("image_url"), str):
            return {**data, "image_url": {"url": data["image_url"]}}
        return data


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return {"text": "(text)", "image_url": "(image)"}.get(kind) if isinstance(kind, str) else None


def _content_tag(content: Any) -> str | None:
    if isinstance(content, str):
        return "(string)"
    return "(parts)" if isinstance(content, list) else None


Part = Annotated[
    Annotated[TextPart, Tag("(text)")] | Annotated[ImagePart, Tag("(image)")],
    Discriminator(
        _part_tag,
        custom_error_type="part",
        custom_error_message="a content part is an object with the type text or image_url",
    ),
]
Content = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[Part], Field(min_length=1), Tag("(parts)")],
    Discriminator(
        _content_tag,
        custom_error_type="content",
        custom_error_message="a string or a list of content parts is needed",
    ),
]


class ChatMessage(_Strict):
    """One turn of a talk; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if k not in _EMPTY or v not in (None, [])}
