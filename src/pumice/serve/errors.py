"""What a client is told when something cannot be answered, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

# Seconds after which a client that found no room may try again.
RETRY_AFTER = 1
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error: HTTP status, what happened, and the field that is to blame."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object of OpenAI's API."""
        kind = "server_error" if self.status == 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """As an HTTP answer."""
        headers = {"Retry-After": str(RETRY_AFTER)} if self.status == 429 else None
        return JSONResponse(self.body(), self.status, headers)


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    """An ApiError as its answer."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not what the path takes; the first fault is told, with its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    given = f" (given: {first['input']!r:.80})" if place and "input" in first else ""
    said = str(first["msg"]).removeprefix("Value error, ")
    what = said if not place else f"{place}: {said}{given}"
    return ApiError(400, what, param=place or None).response()
