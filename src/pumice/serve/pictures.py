"""Chat messages with their pictures counted, weighed and fetched before anything decodes them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from pumice.core.errors import DataError
from pumice.core.images import image_header
from pumice.core.types import Message
from pumice.infer.requests import chat_messages
from pumice.serve.limits import Limits
from pumice.serve.remote_images import fetch_image


def read_messages(messages: list[dict[str, Any]], limits: Limits) -> tuple[Message, ...]:
    """OpenAI chat messages -> ours; DataError for what is wrong in them or over a limit.

    May fetch images (from allowed hosts), so it is not for the event loop.
    """
    places = list(_image_places(messages))
    if len(places) > limits.max_images:
        raise DataError(
            f"the request has {len(places)} images; at most {limits.max_images} are allowed. Send "
            f"fewer."
        )
    for place in places:
        _fetch(place, limits)
    read = chat_messages(messages, images_dir=None)
    _check_texts(read)
    for message in read:
        for number, part in enumerate(message.images, start=1):
            assert isinstance(part.image, bytes)  # data URIs are all that is left
            _check_image(part.image, f"image {number} of a {message.role} message", limits)
    return read


def _image_places(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every content part that is an image, however broken."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "image_url":
                yield part


def _fetch(part: dict[str, Any], limits: Limits) -> None:
    """Puts the bytes of a web address into its place, as a data URI."""
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not url.startswith(("http:", "https:")):
        return
    if not limits.image_hosts:
        raise DataError(
            f"the image {url[:80]!r} is a web address, and this server fetches none; send it as a "
            f"data URI (data:image/png;base64,...)."
        )
    data = fetch_image(
        url, limits.image_hosts, max_bytes=limits.max_image_bytes, seconds=limits.fetch_seconds
    )
    part["image_url"] = {"url": "data:;base64," + base64.b64encode(data).decode()}


def _check_texts(messages: tuple[Message, ...]) -> None:
    for message in messages:
        try:
            message.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"a {message.role} message holds half a character ({error.object[error.start]!r} "
                f"at {error.start}); whole Unicode text is needed."
            ) from error


def _check_image(data: bytes, where: str, limits: Limits) -> None:
    if len(data) > limits.max_image_bytes:
        raise DataError(
            f"{where} has {len(data)} bytes; at most {limits.max_image_bytes} are allowed. Send a "
            f"smaller file."
        )
    width, height = image_header(data, where=where).size
    if width * height > limits.max_pixels:
        raise DataError(
            f"{where} has {width} x {height} pixels; at most {limits.max_pixels} are allowed. "
            f"Shrink it."
        )
