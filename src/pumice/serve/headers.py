"""Connections on which no request comes, or never the whole of its headers: closed after a time.

uvicorn has a time for what is idle after an answer, and none for this; each holds one of the files
that the process may have open, and with enough of them nobody else gets in.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

SECONDS = 30.0
"""How long the headers of a request may take, from the first sign of them or the connection."""

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
else:
    Protocol = AutoHTTPProtocol


class InTime(Protocol):
    """uvicorn's HTTP, with a time for headers; what happens after them is not its business."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has come; nothing is known of what it wants."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Any part of a request, of its headers or its body."""
        super().data_received(data)
        if self._timer is None and self._without_request:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    @property
    def _without_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        self._timer = self.loop.call_later(SECONDS, self._look, self.cycle)

    def _look(self, before: object) -> None:
        """Closes what waits for the same headers as a while ago, when `before` was answered."""
        self._timer = None
        if not self._without_request:
            return
        if self.cycle is before:
            self.transport.close()
        else:
            self._watch()
