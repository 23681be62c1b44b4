"""What happens to every request before its path: its host, key, size of its body, and its count."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pumice.serve.errors import ApiError, event
from pumice.serve.host_names import foreign_host
from pumice.serve.limits import Limits

# A page that asks for the key, and a health check that has none.
_OPEN = ("/", "/health")
_OPEN_UNDER = "/page/"

Counted = Callable[[str, int, float], None]


class Guard:
    """Refuses without reading on: a wrong key with 401, a body that is too large with 413.

    A body that takes longer than a request may gets 408, or slow ones would fill the room for all.

    `local_host` is the host that was bound where only this machine reaches the port; without a
    key, requests for other hosts get 403 then.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        local_host: str | None,
        limits: Limits,
        counted: Counted,
    ) -> None:
        self._app, self._key, self._limits, self._counted = app, api_key, limits, counted
        self._local = local_host if api_key is None else None
        self._held = 0
        """Bytes of all bodies that are being read or answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, path = time.monotonic(), _route(scope)
        # An answer to a fault of ours is sent outside of this.
        status, headers = 500, None

        async def sending(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message["headers"])
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except asyncio.CancelledError:
            # The server is at its end and has waited for this one. To pass it on would be a stack
            # in the log, and a client cut off without a word.
            cut = ApiError(503, "the server is stopping; the answer was not finished.")
            if headers is None:
                await cut.response()(scope, receive, sending)
            elif headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                told = f"\n{event(cut.body())}".encode()  # not within a line that is cut
                await send({"type": "http.response.body", "body": told})
            else:
                raise
        finally:
            self._counted(path, status, time.monotonic() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        body = _Body(receive, asyncio.get_running_loop().time() + self._limits.seconds)
        try:
            await self._app(scope, self._limited(body), send)
        finally:
            self._held -= body.read

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._local is not None:
            foreign = foreign_host(headers.get(b"host", b""), self._local)
            if foreign is not None:
                return foreign
        guarded = self._key is not None and path not in _OPEN and not path.startswith(_OPEN_UNDER)
        if guarded:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), str(self._key).encode())
            if scheme.lower() != b"bearer" or not right:
                return ApiError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            return self._too_large()
        return None

    def _limited(self, body: _Body) -> Receive:
        """Counts what comes, for bodies that do not say how long they are."""

        async def receiving() -> Message:
            try:
                async with asyncio.timeout_at(None if body.whole else body.deadline):
                    message = await body.receive()
            except TimeoutError as error:
                raise self._too_slow() from error
            body.whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            body.read += size
            self._held += size
            # HTTPException is the one kind of error that FastAPI passes on while it reads a body.
            if body.read > self._limits.max_body_bytes:
                raise HTTPException(413, self._too_large().message)
            if self._held > self._limits.max_held_bytes:
                raise HTTPException(429, "too much is being sent at this moment; try again later.")
            return message

        return receiving

    def _too_slow(self) -> HTTPException:
        told = f"the body has not come within {self._limits.seconds:g} seconds; send it faster."
        return HTTPException(408, told, headers={"Connection": "close"})

    def _too_large(self) -> ApiError:
        most = self._limits.max_body_bytes
        return ApiError(
            413,
            f"the request is larger than {most} bytes; send fewer or smaller images.",
            code="request_too_large",
        )


@dataclass(slots=True)
class _Body:
    """A body as it comes, and how much of it has come, in bytes."""

    receive: Receive
    deadline: float
    """The time of the event loop by which all of it must have come."""
    read: int = 0
    whole: bool = False


def _route(scope: Scope) -> str:
    """The path as it is declared, also of what is refused; what is not declared counts together."""
    for route in scope["app"].routes:
        if route.matches(scope)[0] is not Match.NONE:
            return str(route.path)
    return "other"
