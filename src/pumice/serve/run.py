"""Running the server on a port, and ending it without cutting anybody off."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from pumice.core.errors import PumiceError
from pumice.serve.headers import InTime

# What is written already when the engine has ended may take this long to reach the clients.
_LAST_BYTES = 5


class Served(Protocol):
    """What is answered with."""

    app: FastAPI

    async def stop(self, *, at_once: bool = False) -> None:
        """Takes nothing new and lets what is on its way end; `at_once` breaks it off."""


class Stopping(uvicorn.Server):
    """uvicorn, but the first signal leaves the port open, so that new requests are told 503.

    A second signal breaks off what is on its way, whose clients are told so. Once all that is left
    are last bytes, it does not wait for these either.
    """

    def __init__(self, config: uvicorn.Config, server: Served) -> None:
        super().__init__(config)
        self._server = server
        self._asked = 0
        self._ending: list[asyncio.Task[None]] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or Ctrl-C."""
        self._asked += 1
        if self.should_exit:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        while len(self._ending) < min(self._asked, 2):
            stopping = self._server.stop(at_once=bool(self._ending))
            self._ending.append(asyncio.create_task(stopping))
        if self._ending and all(task.done() for task in self._ending):
            for task in self._ending:
                task.result()
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A port to answer on, taken before a model is loaded for it; 0 takes any that is free.

    `::` is every address of this machine, those of IPv4 among them where the system can do that.
    """
    if not host.strip():
        raise PumiceError(
            f"--host is {host!r}, an empty name, which would be all addresses of this machine. "
            f"Give 127.0.0.1 for this machine alone, or 0.0.0.0 if others are to reach it."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            (host, port), family=family, backlog=2048, dualstack_ipv6=both
        )
    except OSError as error:
        raise PumiceError(
            f"cannot listen on {host} port {port}: {error.strerror}. Choose another with --port "
            f"(0 takes any that is free) or --host."
        ) from error
    # Every connection inherits it. asyncio sets it on sockets made for TCP by name alone, and these
    # are not; without it a piece waits until the one before is acknowledged, 40 ms on most systems.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def run(server: Served, listener: socket.socket) -> None:
    """Answers until a signal comes, and then until the requests on their way are answered."""
    config = uvicorn.Config(
        server.app,
        http=InTime,
        log_level="warning",
        timeout_graceful_shutdown=_LAST_BYTES,
        lifespan="on",
    )
    Stopping(config, server).run([listener])
