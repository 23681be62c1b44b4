"""What one request may cost, and what the server holds at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from pumice.core.images import MAX_PIXELS

MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Beyond any of these a request is refused, with the limit and what was given."""

    max_images: int = 16
    max_image_bytes: int = 20 * MEBIBYTE
    max_pixels: int = MAX_PIXELS
    max_side: int = 65_535
    """No JPEG is longer, and to shrink a square of a longer side takes gigabytes."""
    max_body_bytes: int = 64 * MEBIBYTE
    max_held_bytes: int = 1024 * MEBIBYTE
    """Bodies of all requests that are being read or answered, together."""
    large_pixels: int = 16_000_000
    """Requests whose images have more than these are decoded one at a time, for memory's sake."""
    max_new_tokens: int = 1024
    """Also how long an answer gets whose request names no limit."""
    seconds: float = 300.0
    """From the request to its last token."""
    image_hosts: frozenset[str] = field(default_factory=frozenset)
    """Hosts images are fetched from; none by default, so that no address of a client is opened."""
    fetch_seconds: float = 10.0
    token_budget: int | None = None
    """Positions that the requests in flight may hold together."""
    max_waiting: int = 256
    """Requests that may wait for a place; beyond it they are told to come again."""
    max_waiting_tokens: int | None = None
    """Positions that requests which wait may come to need together."""
    drain_seconds: float = 20.0
    """How long requests on their way may go on when the server is asked to stop."""
