"""The HTTP server: OpenAI's chat API on one model, its health and numbers, and the page on /.

The engine runs in a thread of its own (`infer.online`); paths here check what came, hand it over,
and pass the answer on. Whatever a client sends, the process goes on.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Annotated, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from pumice.core.errors import PumiceError
from pumice.core.memory import give_back_heap
from pumice.core.types import Message, Sampling
from pumice.core.types import Request as Question
from pumice.infer.choices import ChoiceError, LongChoiceError
from pumice.infer.model import Model
from pumice.infer.online import BusyError, Handle, Online
from pumice.serve.answers import queued, streamed, too_slow, whole_answers
from pumice.serve.errors import (
    RETRY_AFTER,
    ApiError,
    ErrorBody,
    answer_errors,
)
from pumice.serve.guard import Guard
from pumice.serve.leaving import CLIENT_GONE, ClientGone, Wanted, still
from pumice.serve.limits import Limits
from pumice.serve.metrics import Metrics
from pumice.serve.page import add_page, settings
from pumice.serve.pictures import fetches, read_messages
from pumice.serve.replies import Reply
from pumice.serve.schema import ChatRequest

VERSION = metadata.version("pumice")
Side = Annotated[int, Query(ge=1, le=1_000_000)]
# Threads that check requests and decode their images; each may hold one large picture's pixels.
_READERS = 8
# Those that wait for other hosts first, so that a slow one does not hold up every request.
_FETCHERS = 8
_LONGEST_RETRY = 60
# It takes about 4 ms, in which no other thread is held up for long.
_TIDY_SECONDS = 10.0
# From so many of the last answers is guessed when there will be room again.
_RECENT = 32
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered as it is"},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now"},
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}


class Server:
    """One model with its engine, limits and numbers; `app` is what uvicorn runs.

    `local_host` is what `host_names.local_host` says of the port.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        limits: Limits | None = None,
        api_key: str | None = None,
        local_host: str | None = None,
    ) -> None:
        self.model, self.name = model, name
        self.limits = limits or Limits()
        self.started = int(time.time())
        model.engine.prepare()
        self.online = Online(
            model.engine,
            token_budget=self.limits.token_budget,
            max_waiting=self.limits.max_waiting,
            max_waiting_tokens=self.limits.max_waiting_tokens,
        )
        self.stopping = False
        self._readers, self._fetchers = CapacityLimiter(_READERS), CapacityLimiter(_FETCHERS)
        self._large = threading.Lock()
        self._answers: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        """When each of the last answers was asked for, and when it ended."""
        self.metrics = Metrics(self.online.counters)
        self._takes_key = api_key is not None
        self.app = self._app(api_key, local_host)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        if self.stopping:
            raise ApiError(503, "the server is stopping and takes no more requests.")
        self._check_model(body.model)
        start = time.monotonic()
        wanted = Wanted(start + self.limits.seconds)
        limiter = self._fetchers if fetches(body.messages, self.limits) else self._readers
        reply = Reply(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), self.name)
        try:
            submit = partial(run_sync, self._submit, body, wanted, limiter=limiter)
            handles = await queued(submit, request, wanted)
            if not body.stream:
                try:
                    results = await whole_answers(handles, request, wanted)
                finally:
                    self._answers.append((start, time.monotonic()))
                return JSONResponse(reply.whole(results))
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        except TimeoutError as error:
            raise too_slow(self.limits.seconds) from error
        told = False

        def first_piece() -> None:
            nonlocal told
            if not told:
                self.metrics.first_token.observe(time.monotonic() - start)
            told = True

        events = streamed(
            handles,
            reply,
            wanted=wanted,
            seconds=self.limits.seconds,
            with_usage=bool(body.stream_options and body.stream_options.include_usage),
            first_piece=first_piece,
            ended=lambda: self._answers.append((start, time.monotonic())),
        )
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        entry = {"id": self.name, "object": "model", "created": self.started, "owned_by": "pumice"}
        return {"object": "list", "data": [entry]}

    def one_model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        self._check_model(name)
        [entry] = self.models()["data"]
        return dict(entry)

    async def stop(self, *, at_once: bool = False) -> None:
        """Takes no new requests and lets those on their way go on, as long as `drain_seconds`.

        `at_once` breaks them off, also for an earlier call that waits.
        """
        self.stopping = True
        await run_sync(self.online.close, 0.0 if at_once else self.limits.drain_seconds)

    def health(self) -> dict[str, Any]:
        """GET /health; 503 once the server has been asked to stop, or cannot answer any more."""
        if self.stopping:
            raise ApiError(503, "the server is stopping and takes no more requests.")
        if self.online.broken:
            raise ApiError(503, "the engine has stopped; see the log, and start the server again.")
        now = self.online.counters()
        return {
            "status": "ok",
            "model": self.name,
            "version": VERSION,
            "running": now.running + now.reading,
            "waiting": now.waiting,
        }

    def page_settings(self) -> dict[str, Any]:
        """GET /page/settings: what the page must know of this server."""
        return settings(self.name, self.limits.max_new_tokens, takes_key=self._takes_key)

    def image_plan(self, width: Side, height: Side) -> dict[str, Any]:
        """GET /page/image-plan: what becomes of a picture of this size; the page draws it.

        `plan` is null where every picture is one view, which `mode` says how to make.
        """
        processor = self.model.processor
        plan = processor.plan((width, height))
        return {
            "image_tokens": processor.image_positions(plan),
            "mode": processor.image_spec.mode,
            "view": processor.image_spec.size,
            "plan": None if plan is None else plan.to_dict(),
        }

    def _submit(self, body: ChatRequest, wanted: Wanted) -> list[Handle]:
        """Checks and queues every choice, or none of them."""
        try:
            tiled = self.model.processor.image_spec.tiling is not None
            messages, pixels = read_messages(body.messages, self.limits, wanted, tiled=tiled)
            sampling = body.sampling(self.limits.max_new_tokens)
            if sampling.max_new_tokens > self.limits.max_new_tokens:
                raise ApiError(
                    400,
                    f"max_tokens is {sampling.max_new_tokens}; at most "
                    f"{self.limits.max_new_tokens} are answered here.",
                    param="max_tokens",
                )
            with self._large if pixels > self.limits.large_pixels else nullcontext():
                still(wanted)
                return self.online.submit_together(_choices(messages, sampling, body.n))
        except BusyError as error:
            raise self._no_room(error) from error
        except LongChoiceError as error:
            raise _long_choice(error, body, self.limits.max_new_tokens) from error
        except ChoiceError as error:
            raise ApiError(400, str(error), param=body.choices_field) from error
        except PumiceError as error:
            raise ApiError(400, str(error), param="messages") from error

    def _no_room(self, error: BusyError) -> ApiError:
        if self.stopping or self.online.broken:
            return ApiError(503, str(error))
        wait = RETRY_AFTER
        # A copy, since the event loop adds to it while this thread looks.
        if answers := self._answers.copy():
            seconds_each = _busy_seconds(answers) / len(answers)
            wait = math.ceil(seconds_each * self.online.counters().waiting)
        wait = min(max(wait, RETRY_AFTER), _LONGEST_RETRY)
        return ApiError(429, str(error), code="rate_limit_exceeded", retry_after=wait)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name!r:.80} is not served here; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    def _app(self, api_key: str | None, local_host: str | None) -> FastAPI:
        @asynccontextmanager
        async def life(app: FastAPI) -> AsyncIterator[None]:
            tidying = asyncio.create_task(_tidy())
            yield
            tidying.cancel()
            await self.stop()

        app = FastAPI(
            title="pumice",
            version=VERSION,
            lifespan=life,
            docs_url=None,
            redoc_url=None,
            responses=_ERRORS,
        )
        add = app.add_api_route
        add("/v1/chat/completions", self.chat, methods=["POST"], response_model=None,
            responses=_STREAM)  # fmt: skip
        add("/v1/models", self.models, methods=["GET"])
        add("/v1/models/{name:path}", self.one_model, methods=["GET"])
        add("/health", self.health, methods=["GET"])
        # What watches a server often asks so, to be spared the body.
        add("/health", self.health, methods=["HEAD"], include_in_schema=False)
        add("/metrics", self._metrics, methods=["GET"], response_class=PlainTextResponse)
        add("/page/settings", self.page_settings, methods=["GET"])
        add("/page/image-plan", self.image_plan, methods=["GET"])
        add_page(app)
        answer_errors(app)
        app.add_middleware(
            Guard,
            api_key=api_key,
            local_host=local_host,
            limits=self.limits,
            counted=self._count,
        )
        return app

    def _metrics(self) -> Response:
        """GET /metrics: Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _count(self, path: str, status: int, seconds: float) -> None:
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)


def _choices(messages: tuple[Message, ...], sampling: Sampling, count: int) -> list[Question]:
    """The same question for every choice, each with a seed of its own."""
    return [
        Question(messages, replace(sampling, seed=sampling.seed + index)) for index in range(count)
    ]


def _long_choice(error: LongChoiceError, body: ChatRequest, most: int) -> ApiError:
    """In the API's words; what bounds the answer may be the request, the server or the model."""
    asked, field = body.max_completion_tokens or body.max_tokens, body.choices_field
    advice = "Shorten the choices."
    if asked == error.most < most:
        field = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        advice = f"Raise {field}, or shorten the choices."
    elif error.most < (asked or most):
        advice = "Shorten the choices, or the messages before them."
    message = f"the longest choice has {error.longest} tokens, and the answer may have at most "
    return ApiError(400, f"{message}{error.most}. {advice}", param=field)


def _busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """How long anything went on, of spans that may overlap and leave gaps."""
    busy, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy


async def _tidy() -> None:
    """Gives back what the allocator keeps in pieces between answers of many sizes."""
    while True:
        await asyncio.sleep(_TIDY_SECONDS)
        await run_sync(give_back_heap)
