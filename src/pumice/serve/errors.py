"""What a client is told when something cannot be answered, in the shape of OpenAI's API."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pumice.serve.leaving import CLIENT_GONE
from pumice.serve.messages import TAG

log = logging.getLogger(__name__)

# Seconds after which a client that found no room may try again, where nothing better is known.
RETRY_AFTER = 1
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "timeout_error",
}
_NO_JSON = "the body must be a JSON object, sent with Content-Type: application/json"
_LONGEST = 200
# Where Pydantic speaks to programmers.
_SAID = {
    "extra_forbidden": "no such field is known here; leave it out",
    "missing": "this field is needed",
    "model_attributes_type": "an object is needed",
}


class Fault(BaseModel):
    """What is wrong, of which kind, and in which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: Fault


class ApiError(Exception):
    """An answer that is an error: HTTP status, what happened, and the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = RETRY_AFTER,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object of OpenAI's API."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        fault = Fault(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorBody(error=fault).model_dump()

    def response(self) -> JSONResponse:
        """As an HTTP answer."""
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def event(data: dict[str, Any]) -> str:
    """One server-sent event, an error or a piece of an answer."""
    text = json.dumps(data, ensure_ascii=False)
    # Python's clients read line by line, and to them these signs end lines as well.
    for sign in "\x85\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f"data: {text}\n\n"


def answer_errors(app: FastAPI) -> None:
    """Whatever an application raises is told as OpenAI's API tells it."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(ClientDisconnect, _answer_gone)
    app.add_exception_handler(Exception, _answer_fault)


async def _answer_api_error(request: Request, error: Exception) -> JSONResponse:
    """An ApiError as its answer."""
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_gone(request: Request, error: Exception) -> Response:
    """Nothing, for a client that left before its body had come."""
    return Response(status_code=CLIENT_GONE)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """An unknown path or method, or a body that is no JSON for another reason than its signs."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _answer_gone(request, error)
    if error.status_code == 400 and error.__cause__ is not None:
        # What FastAPI says of a body that it cannot parse leaves the cause out.
        response = ApiError(400, f"{_NO_JSON} ({_short(str(error.__cause__))})").response()
    else:
        message = f"{request.method} {_short(request.url.path)}: {error.detail}"
        allowed = _allowed(request, error)
        if allowed:
            message += f"; allowed: {allowed}."
        response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not what the path takes; the first fault is told, with its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    said = _SAID.get(first["type"], str(first["msg"]).removeprefix("Value error, "))
    if first["type"] == "json_invalid":
        at = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return ApiError(400, f"{_NO_JSON} ({at})").response()
    steps = [str(step) for step in first["loc"] if step not in ("body", "query")]
    place = _short(".".join(step for step in steps if not step.startswith(TAG)))
    if not place and not isinstance(first.get("input"), dict):
        return ApiError(400, f"{_NO_JSON} ({said})").response()
    given = f" (given: {first['input']!r:.80})" if place and "input" in first else ""
    what = said if not place else f"{place}: {said}{given}"
    param = place or first.get("ctx", {}).get("param")
    return ApiError(400, what, param=param).response()


async def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    """A fault of ours: logged with its trace, told without it."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, "the server made a mistake; its log says which.").response()


def _allowed(request: Request, error: HTTPException) -> str:
    """The methods of a path that is known, or the paths that are."""
    if error.status_code == 405:
        return (error.headers or {}).get("Allow", "")
    if error.status_code == 404:
        return ", ".join(sorted({route.path for route in request.app.routes}))
    return ""


def _short(text: str) -> str:
    """A client's own words, not sent back at any length."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
