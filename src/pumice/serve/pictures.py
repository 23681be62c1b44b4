"""Chat messages with their pictures counted, weighed and fetched before anything decodes them."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pumice.core.errors import DataError
from pumice.core.images import image_header
from pumice.core.types import Message
from pumice.infer.requests import chat_messages
from pumice.serve.leaving import Wanted, still
from pumice.serve.limits import Limits
from pumice.serve.messages import ChatMessage, ImagePart, ImageUrl
from pumice.serve.remote_images import fetch_image

# Web images of one request that are fetched at the same time.
_AT_ONCE = 4


class Read(NamedTuple):
    """Messages ready for the engine, and the pixels that decoding their images will make."""

    messages: tuple[Message, ...]
    pixels: int


def read_messages(
    messages: list[ChatMessage], limits: Limits, wanted: Wanted, *, tiled: bool
) -> Read:
    """OpenAI chat messages -> ours; DataError for what is wrong in them or over a limit.

    `tiled` says whether the model sees images in tiles, so that `detail: low` would be another.
    Raises TimeoutError when the time in which the answer is wanted is over.

    May fetch images (from allowed hosts), so it is not for the event loop.
    """
    images = [
        part.image_url
        for message in messages
        for part in message.content
        if isinstance(part, ImagePart)
    ]
    if len(images) > limits.max_images:
        raise DataError(
            f"the request has {len(images)} images; at most {limits.max_images} are allowed. Send "
            f"fewer."
        )
    for image in images:
        if tiled and image.detail == "low":
            raise DataError(
                "an image has detail 'low'; this model was trained on tiles and is shown all of "
                "them. Leave detail out, or shrink the image: fewer tiles are cut from it."
            )
    _fetch([image for image in images if _is_web(image.url)], limits, wanted)
    still(wanted)
    read = chat_messages([_row(message) for message in messages], images_dir=None)
    _check_texts(read)
    pixels = 0
    for message in read:
        for number, part in enumerate(message.images, start=1):
            assert isinstance(part.image, bytes)  # data URIs are all that is left
            pixels += _pixels(part.image, f"image {number} of a {message.role} message", limits)
    return Read(read, pixels)


def fetches(messages: list[ChatMessage], limits: Limits) -> bool:
    """Whether reading these messages waits for other hosts."""
    return bool(limits.image_hosts) and any(
        isinstance(part, ImagePart) and _is_web(part.image_url.url)
        for message in messages
        for part in message.content
    )


def _row(message: ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    return {**message.model_dump(), "role": role}


def _fetch(images: list[ImageUrl], limits: Limits, wanted: Wanted) -> None:
    """Puts the bytes of web addresses into their places, as data URIs; some are fetched at once."""
    if not images:
        return
    if not limits.image_hosts:
        raise DataError(
            f"the image {images[0].url[:80]!r} is a web address, and this server fetches none; "
            f"send it as a data URI (data:image/png;base64,...)."
        )

    def fetched(image: ImageUrl) -> bytes:
        still(wanted)
        seconds = min(limits.fetch_seconds, wanted.left)
        return fetch_image(
            image.url, limits.image_hosts, max_bytes=limits.max_image_bytes, seconds=seconds
        )

    try:
        with ThreadPoolExecutor(_AT_ONCE, "fetch") as pool:
            found = list(pool.map(fetched, images))
    except DataError:
        still(wanted)  # otherwise it was not the image that took too long
        raise
    for image, data in zip(images, found, strict=True):
        image.url = "data:;base64," + base64.b64encode(data).decode()


def _is_web(url: str) -> bool:
    return url[:6].lower().startswith(("http:", "https:"))


def _check_texts(messages: tuple[Message, ...]) -> None:
    for message in messages:
        try:
            message.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"a {message.role} message holds half a character ({error.object[error.start]!r} "
                f"at {error.start}); whole Unicode text is needed."
            ) from error


def _pixels(data: bytes, where: str, limits: Limits) -> int:
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
    if max(width, height) > limits.max_side:
        raise DataError(
            f"{where} has {width} x {height} pixels; at most {limits.max_side} along a side are "
            f"allowed. Cut it into parts."
        )
    return width * height
