"""Other people's request formats as ours: OpenAI chat messages and LLaVA's question rows."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from pumice.core.errors import DataError
from pumice.core.types import ImagePart, Message, Part, Request, Sampling, TextPart, user

_ROLES = ("system", "user", "assistant")
# The names of the OpenAI API beside ours.
_SAMPLING_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "guided_choice": "choices",
    **{field.name: field.name for field in fields(Sampling)},
}
_LISTS = ("stop", "choices")


def read_request(
    row: Mapping[str, Any],
    *,
    images_dir: Path | None,
    sampling: Sampling | None = None,
    where: str = "",
) -> Request:
    """One request row: {"id", "messages"} with chat messages, or {"question_id", "image", "text"}.

    `images_dir` is what file names are relative to. A row may set its own sampling ("max_tokens",
    "temperature", ...); `sampling` holds for the rest. `where` names the row in errors.
    """
    sampling = _sampling(row, sampling or Sampling(), where)
    if "messages" in row:
        messages = chat_messages(row["messages"], images_dir=images_dir, where=where)
        return Request(messages, sampling, id=str(row.get("id", "")))
    if "text" in row:
        text = _string(row["text"], "text", where)
        images = row.get("image") or []
        names = [images] if isinstance(images, str) else images
        if not isinstance(names, list):
            raise _error(where, f"image is {names!r}; a file name or a list of them is needed")
        files = [_image(name, images_dir, where) for name in names]
        identity = row.get("question_id", row.get("id", ""))
        return Request((user(text, *files),), sampling, id=str(identity))
    raise _error(
        where,
        f"the row has the fields {', '.join(row) or 'none'}; needed: messages (chat messages), or "
        f"text (with question_id and image, as LLaVA's question files)",
    )


def chat_messages(
    messages: Any, *, images_dir: Path | None, where: str = ""
) -> tuple[Message, ...]:
    """OpenAI chat messages -> ours. Images: data URIs, and files when `images_dir` is given.

    Images that all stand before or all after the text of a user turn go in front of it, as in
    LLaVA's training data (OpenAI's own examples put them last); between texts they keep their
    places.
    """
    if not isinstance(messages, list) or not messages:
        raise _error(where, "messages must be a list of at least one chat message")
    return tuple(_message(message, images_dir, where) for message in messages)


def _message(message: Any, images_dir: Path | None, where: str) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        given = message.get("role") if isinstance(message, Mapping) else message
        raise _error(
            where,
            f'a message has the role {given!r}; needed: {{"role": ..., "content": ...}} with the '
            f"role {', '.join(_ROLES)}",
        )
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return Message(role, (TextPart(content),))
    if not isinstance(content, list):
        raise _error(where, f"content is {content!r}; a string or a list of parts is needed")
    return Message(role, _in_llava_order([_part(part, images_dir, where) for part in content]))


def _part(part: Any, images_dir: Path | None, where: str) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return TextPart(_string(part.get("text"), "text", where))
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        return ImagePart(_image(url, images_dir, where))
    raise _error(where, f"a content part has the type {kind!r}; allowed: text, image_url")


def _in_llava_order(parts: Sequence[Part]) -> tuple[Part, ...]:
    is_image = [isinstance(part, ImagePart) for part in parts]
    if not any(is_image) or all(is_image):
        return tuple(parts)
    if is_image in (sorted(is_image), sorted(is_image, reverse=True)):
        images = [part.image for part in parts if isinstance(part, ImagePart)]
        return user("".join(p.text for p in parts if isinstance(p, TextPart)), *images).content
    # Interleaved: a line break after each image that text follows, as training data has it.
    out: list[Part] = []
    for part in parts:
        follows = out and isinstance(out[-1], ImagePart) and isinstance(part, TextPart)
        if follows and isinstance(part, TextPart) and not part.text.startswith("\n"):
            part = TextPart(f"\n{part.text}")
        out.append(part)
    return tuple(out)


def _image(source: Any, images_dir: Path | None, where: str) -> Path | bytes:
    if not isinstance(source, str) or not source:
        raise _error(where, f"an image is {source!r}; a data URI or a file name is needed")
    scheme = source[:8].lower()  # addresses begin in either case
    if scheme.startswith("data:"):
        return _data_uri(source, where)
    if scheme.startswith(("http://", "https://")):
        raise _error(
            where,
            f"the image {source[:80]} is a web address, and nothing is fetched from the network; "
            f"send it as a data URI (data:image/png;base64,...)",
        )
    if images_dir is None:
        raise _error(
            where,
            f"the image {source[:80]!r} is no data URI, and only data URIs are allowed here "
            f"(data:image/png;base64,...)",
        )
    return images_dir / source.removeprefix("file://")


def _data_uri(source: str, where: str) -> bytes:
    head, comma, body = source.partition(",")
    if not comma:
        raise _error(where, f"the data URI {head[:40]!r} has no comma before its data")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        # Line breaks are what the command base64 writes, and browsers pass over them.
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _error(where, f"the data URI {head[:40]!r} is not valid base64: {error}") from error


def _sampling(row: Mapping[str, Any], sampling: Sampling, where: str) -> Sampling:
    given: dict[str, Any] = {}
    for name, ours in _SAMPLING_NAMES.items():
        value = row.get(name)
        if value is None:
            continue
        if ours in _LISTS:
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise _error(where, f"{name} is {value!r}; a string or a list of them is needed")
            given[ours] = tuple(texts)
            continue
        real = ours in ("temperature", "top_p")
        kinds = (int, float) if real else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "number" if real else "whole number"
            raise _error(where, f"{name} is {value!r}; a {kind} is needed")
        given[ours] = value
    return replace(sampling, **given)


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise _error(where, f"{name} is {value!r}; a string is needed")
    return value


def _error(where: str, what: str) -> DataError:
    return DataError(f"{where or 'request'}: {what}.")
