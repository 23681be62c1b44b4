"""What happens to every request before its path: the key, the size of its body, and its count."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pumice.serve.errors import ApiError

# A page that asks for the key, and a health check that has none.
_OPEN = ("/", "/health")
_OPEN_UNDER = "/page/"

Counted = Callable[[str, int, float], None]


class Guard:
    """Refuses without reading on: a wrong key with 401, a body that is too large with 413."""

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int, counted: Counted
    ) -> None:
        self._app, self._key, self._most, self._counted = app, api_key, max_body_bytes, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 499

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        finally:
            self._counted(_route(scope), status, time.monotonic() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        guarded = self._key is not None and path not in _OPEN and not path.startswith(_OPEN_UNDER)
        if guarded:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                return ApiError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Counts what comes, for bodies that do not say how long they are."""
        read = 0

        async def receiving() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                # The one kind of error that FastAPI passes on while it reads a body.
                raise HTTPException(413, self._too_large().message)
            return message

        return receiving

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._most} bytes; send fewer or smaller images.",
            code="request_too_large",
        )


def _route(scope: Scope) -> str:
    """The path as it is declared; what is not declared counts together."""
    route = scope.get("route")
    return getattr(route, "path", "other")
