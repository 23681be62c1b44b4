"""The page in front of an endpoint elsewhere, which answers: vLLM, SGLang, or any of OpenAI's kind.

A browser may speak only to where the page came from, so two paths are passed on, as they are. Needs
no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from pumice.core.llm_client import Endpoint
from pumice.serve.errors import ApiError, answer_errors, event
from pumice.serve.guard import Guard
from pumice.serve.leaving import CLIENT_GONE, ClientGone, while_there
from pumice.serve.limits import Limits
from pumice.serve.page import add_page, settings

# What a client of the page must know of an answer.
_PASSED_ON = ("content-type", "cache-control", "retry-after")


class Forwarder:
    """The page for one model of an endpoint; `app` is what uvicorn runs.

    The endpoint's key stays here: it goes with every request, and without one the client's own
    does. `api_key` is what clients of the page must send themselves, `local_host` what
    `host_names.local_host` says of the port.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        limits: Limits,
        api_key: str | None = None,
        local_host: str | None = None,
    ) -> None:
        self.url = endpoint.url.rstrip("/")
        self.model = model
        self.limits = limits
        self._key = endpoint.api_key
        self._takes_key = api_key is not None or not endpoint.api_key
        self._http = httpx2.AsyncClient(timeout=endpoint.timeout)
        self.app = self._app(api_key, local_host)

    async def stop(self, *, at_once: bool = False) -> None:
        """Nothing waits here: answers on their way end with their connections."""

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions: the endpoint's answer, piece by piece."""
        # A page of another site can send a form, but not JSON; it must not spend the key.
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise ApiError(400, "send JSON, with Content-Type: application/json.")
        return await self._pass_on("chat/completions", request, await request.body())

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the endpoint's own."""
        return await self._pass_on("models", request, b"")

    def page_settings(self) -> dict[str, Any]:
        """GET /page/settings."""
        return settings(self.model, self.limits.max_new_tokens, takes_key=self._takes_key)

    def image_plan(self) -> None:
        """GET /page/image-plan: null, since only the endpoint knows what becomes of a picture."""

    async def _pass_on(self, path: str, request: Request, body: bytes) -> Response:
        given = request.headers.get("authorization")
        key = f"Bearer {self._key}" if self._key else given
        call = self._http.build_request(
            request.method,
            f"{self.url}/{path}",
            content=body,
            headers={"Content-Type": "application/json", **({"Authorization": key} if key else {})},
        )
        sending = asyncio.create_task(self._sent(call))
        try:
            answer = await while_there(sending, request)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        except httpx2.RequestError as error:
            raise self._silent(error) from error
        finally:
            sending.cancel()  # by which the endpoint knows that nobody listens
        headers = {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
        if answer.is_closed:
            return Response(answer.content, answer.status_code, headers)
        return StreamingResponse(self._pieces(answer), answer.status_code, headers)

    async def _sent(self, call: httpx2.Request) -> httpx2.Response:
        """The answer, whole unless it is a stream: one that breaks off can still be told then."""
        answer = await self._http.send(call, stream=True)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(answer.aclose)
            if answer.has_redirect_location:
                raise ApiError(
                    502,
                    f"the endpoint {self.url} leads on to {answer.headers['location']}; give "
                    f"`pumice page` the address that answers itself.",
                )
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                await answer.aread()
            stack.pop_all()
        return answer

    async def _pieces(self, answer: httpx2.Response) -> AsyncIterator[bytes]:
        """The lines of a stream, whole ones: an error is told after them, and not within one."""
        rest = b""
        try:
            async for piece in answer.aiter_bytes():
                whole, end, more = piece.rpartition(b"\n")
                if end:
                    yield rest + whole + end
                    rest = b""
                rest += more
            yield rest
        except httpx2.RequestError as error:
            cut = ApiError(502, f"the endpoint {self.url} broke off its answer: {error!r}.")
            yield b"\n" + event(cut.body()).encode()
        finally:
            # Also when the client is gone.
            await answer.aclose()

    def _silent(self, error: httpx2.RequestError) -> ApiError:
        return ApiError(502, f"the endpoint {self.url} does not answer: {error!r}.")

    def _app(self, api_key: str | None, local_host: str | None) -> FastAPI:
        @asynccontextmanager
        async def life(app: FastAPI) -> AsyncIterator[None]:
            yield
            await self._http.aclose()

        app = FastAPI(title="pumice page", lifespan=life, openapi_url=None)
        add = app.add_api_route
        add("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        add("/v1/models", self.models, methods=["GET"], response_model=None)
        add("/page/settings", self.page_settings, methods=["GET"])
        add("/page/image-plan", self.image_plan, methods=["GET"])
        add_page(app)
        answer_errors(app)
        app.add_middleware(
            Guard,
            api_key=api_key,
            local_host=local_host,
            limits=self.limits,
            counted=_uncounted,
        )
        return app


def _uncounted(path: str, status: int, seconds: float) -> None:
    """The endpoint has numbers of its own."""
