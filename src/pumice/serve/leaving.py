"""Clients that close their connection before they have an answer: nothing goes on for them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request

CLIENT_GONE = 499
"""The HTTP status, nginx's, of what nobody waits for any more."""

# How often a request without stream looks whether its client is still there.
_LOOK = 0.25

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


@dataclass(slots=True)
class Wanted:
    """Until when an answer is wanted; threads that work for it look here, for nothing ends them."""

    until: float
    """In time.monotonic's seconds, which are the event loop's, too."""
    gone: bool = False
    """Nobody waits any more, though there is time."""

    @property
    def left(self) -> float:
        """Seconds; none where nobody waits any more."""
        return 0.0 if self.gone else max(0.0, self.until - time.monotonic())


def still(wanted: Wanted) -> None:
    """Raises TimeoutError where nobody waits for the answer any more."""
    if not wanted.left:
        raise TimeoutError("nobody waits for the answer any more")


async def while_there(task: asyncio.Future[T], request: Request) -> T:
    """The result of a task, which goes on; ClientGone as soon as nobody waits for it."""
    while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
        if await request.is_disconnected():
            raise ClientGone
    return task.result()
