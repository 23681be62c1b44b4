"""One request from its arrival to its last token; it lets go when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from fastapi import Request

from pumice.core.errors import PumiceError
from pumice.core.types import Result
from pumice.infer.online import Handle, Piece
from pumice.serve.errors import ApiError, event
from pumice.serve.leaving import Wanted, while_there
from pumice.serve.replies import Reply, logprobs

# An event tells that a result is there a moment before the result can be read.
_MOMENT = 10.0


async def queued(
    submit: Callable[[], Awaitable[list[Handle]]], request: Request, wanted: Wanted
) -> list[Handle]:
    """The handles of a request that a thread reads and queues.

    Raises TimeoutError or ClientGone where that takes longer than anybody waits; what the thread
    queues afterwards is cancelled.
    """
    task = asyncio.ensure_future(submit())
    handles = None
    try:
        async with asyncio.timeout_at(wanted.until):
            handles = await while_there(task, request)
        return handles
    finally:
        # Not asked of the task: what it queued just before would go on for nobody.
        if handles is None:
            wanted.gone = True
            task.add_done_callback(_let_go)


async def whole_answers(handles: list[Handle], request: Request, wanted: Wanted) -> list[Result]:
    """The results of all choices; whatever happens, no request goes on afterwards.

    Raises TimeoutError when they take too long, and ClientGone when nobody waits for them.
    """
    task = asyncio.create_task(_all_finished(handles))
    try:
        async with asyncio.timeout_at(wanted.until):
            results = await while_there(task, request)
        return [_sound(result) for result in results]
    finally:
        _cancel(handles)
        task.cancel()


async def streamed(
    handles: list[Handle],
    reply: Reply,
    *,
    wanted: Wanted,
    seconds: float,
    with_usage: bool,
    first_piece: Callable[[], None],
    ended: Callable[[], None],
) -> AsyncIterator[str]:
    """Server-sent events of all choices; an error is an event, after which nothing comes.

    `seconds` is what is told of an answer that takes too long.
    """
    events: asyncio.Queue[tuple[int, Piece | Result]] = asyncio.Queue()

    async def listen(index: int, handle: Handle) -> None:
        with suppress(PumiceError):  # it stands in the result as well
            async for piece in handle.pieces():
                await events.put((index, piece))
        await events.put((index, handle.result(_MOMENT)))

    tasks = [asyncio.create_task(listen(index, handle)) for index, handle in enumerate(handles)]
    results: dict[int, Result] = {}
    try:
        for index in range(len(handles)):
            yield event(reply.chunk(index, {"role": "assistant", "content": ""}))
        while len(results) < len(handles):
            index, told = await asyncio.wait_for(events.get(), wanted.left)
            first_piece()
            if isinstance(told, Piece):
                delta = {"content": told.text}
                yield event(reply.chunk(index, delta, told=logprobs(told.logprobs or None)))
                continue
            results[index] = _sound(told)
            yield event(reply.chunk(index, {}, told.finish_reason))
        if with_usage:
            yield event(reply.usage_chunk([results[index] for index in range(len(handles))]))
        yield "data: [DONE]\n\n"
    except TimeoutError:
        yield event(too_slow(seconds).body())
    except ApiError as error:
        yield event(error.body())
    finally:
        # Also when the client is gone: the server then closes this generator.
        ended()
        _cancel(handles)
        for task in tasks:
            task.cancel()


def too_slow(seconds: float) -> ApiError:
    """The answer took longer than a request may."""
    return ApiError(
        504,
        f"the answer was not ready after {seconds:g} seconds, the most a request may take here; "
        f"ask for fewer tokens (max_tokens), or again later.",
    )


async def _all_finished(handles: list[Handle]) -> list[Result]:
    # A task around it, because a gathering that is cancelled itself is a stack in the log.
    return list(await asyncio.gather(*(_finished(handle) for handle in handles)))


async def _finished(handle: Handle) -> Result:
    with suppress(PumiceError):  # it stands in the result as well
        async for _ in handle.pieces():
            pass
    return handle.result(_MOMENT)


def _sound(result: Result) -> Result:
    """A result that is no error. What is wrong with a request was found before it was queued."""
    if result.error is not None:
        raise ApiError(500, f"the request could not be answered: {result.error}")
    if result.finish_reason == "cancelled":
        raise ApiError(503, "the server is stopping; the answer was not finished.")
    return result


def _let_go(task: asyncio.Future[list[Handle]]) -> None:
    """Cancels what was queued for nobody."""
    if not task.cancelled() and task.exception() is None:
        _cancel(task.result())


def _cancel(handles: list[Handle]) -> None:
    for handle in handles:
        handle.cancel()
