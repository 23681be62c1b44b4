"""Clients that close their connection before they have an answer: nothing goes on for them."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request

CLIENT_GONE = 499
"""The HTTP status, nginx's, of what nobody waits for any more."""

# How often a request without stream looks whether its client is still there.
_LOOK = 0.25

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


async def while_there(task: asyncio.Future[T], request: Request) -> T:
    """The result of a task, which goes on; ClientGone as soon as nobody waits for it."""
    while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
        if await request.is_disconnected():
            raise ClientGone
    return task.result()
