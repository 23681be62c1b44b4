"""Answers for many threads at once: `submit` a request, read its pieces, cancel it.

One thread of its own steps the scheduler; requests join and leave between steps. Nothing here
knows of HTTP: a server turns its requests into `Request`, iterates a `Handle` (in a thread, or with
`async for`), and cancels it when its client is gone.

    with Online(engine, token_budget=20_000, max_waiting=64) as online:
        handle = online.submit(Request((user("What is this?", image),)))
        for piece in handle:
            ...
        result = handle.result()
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType

from pumice.core.errors import PumiceError
from pumice.core.types import Request, Result, TokenLogprob
from pumice.infer.answer import Decode
from pumice.infer.engine import Engine
from pumice.infer.features import Key, Opened
from pumice.infer.rows import Row
from pumice.infer.scheduler import Limits
from pumice.models.modes import evaluating

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of an answer: whole characters, and the tokens that end in them.

    `logprobs` are there where the request asks for them; those of all pieces together are the
    result's. A last piece may have tokens and no text: a stop string leaves none.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...]


Event = Piece | Result


class BusyError(PumiceError):
    """There is no room for another request now; it may be sent again later."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What goes on at this moment, and what has been done since the engine was made."""

    waiting: int
    """Requests that have not begun."""
    reading: int
    """Requests whose prompt is being read."""
    running: int
    """Requests that get a token at every step."""
    positions: int
    """Positions the running requests hold in the cache, padding among them."""
    reserved: int
    """Positions that all requests on their way may come to need, those that wait among them."""
    token_budget: int | None
    """The most positions that running requests may hold."""
    prefix_positions: int
    prefix_bytes: int
    feature_bytes: int
    """What is kept for later requests."""
    finished: int
    failed: int
    cancelled: int
    """Requests that are over."""
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    """Positions of prompts, those of them known from before, and generated tokens."""
    images_encoded: int
    steps: int


class Handle:
    """One request on its way. Pieces are whole characters; together they are the result's text.

    Iterate it once: its texts in a thread, or its `pieces` with `async for`. An error is raised
    when the pieces end.
    """

    def __init__(self, row: Row, decode: Decode, wake: Callable[[], None]) -> None:
        self._row = row
        self._decode = decode
        self._wake = wake
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener: Callable[[], None] | None = None
        self._done = threading.Event()
        self._result: Result | None = None
        self._told = 0
        self._told_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt, known before anything is read."""
        return len(self._row.prompt)

    def cancel(self) -> None:
        """Ends the request and frees its place before the next token; harmless when it is over."""
        self._row.cancelled = True
        self._wake()

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end; a cancelled request has the text so far and says `cancelled`.

        Raises TimeoutError after `timeout` seconds. An error is in the result, never raised here.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"{self._row.where} is not answered after {timeout} seconds")
        assert self._result is not None
        return self._result

    def __iter__(self) -> Iterator[str]:
        while True:
            event = self._events.get()
            if isinstance(event, Result):
                _raise_error(event)
                return
            if event.text:
                yield event.text

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece as it comes."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._listener = lambda: _call_in(loop, arrived.set)
        while True:
            arrived.clear()
            while not self._events.empty():
                event = self._events.get()
                if isinstance(event, Result):
                    _raise_error(event)
                    return
                yield event
            # What came after the last look has set it again.
            if self._events.empty():
                await arrived.wait()

    def _tell(self, event: Event) -> None:
        self._events.put(event)
        if isinstance(event, Result):
            self._result = event
            self._done.set()
        if self._listener is not None:
            self._listener()

    def _speak(self) -> None:
        """Passes on what can no longer change of the answer."""
        answer = self._row.answer
        settled = answer.settled
        if len(settled) > self._told:
            self._tell(self._piece(settled, answer.settled_tokens))

    def _end(self, result: Result) -> None:
        if result.error is None:
            last = self._piece(result.text, len(self._row.answer.ids))
            if last.text or last.logprobs:
                self._tell(last)
        self._tell(result)

    def _piece(self, text: str, tokens: int) -> Piece:
        """What `text` and its first `tokens` tokens have beyond what was told."""
        logprobs = self._row.told(self._decode, self._told_tokens, tokens)
        piece = Piece(text[self._told :], logprobs)
        self._told, self._told_tokens = len(text), tokens
        return piece


class Online:
    """Answers requests as they come, with the scheduler of `Engine.generate`.

    `token_budget` bounds the positions that running requests may hold (rows times the longest of
    them), `max_waiting` the requests and `max_waiting_tokens` the positions that wait for a place
    beside those: beyond them `submit` raises BusyError. The model stays in evaluation mode until
    `close`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int | None = None,
        token_budget: int | None = None,
        max_waiting: int = 256,
        max_waiting_tokens: int | None = None,
        prefill_chunk: int = 256,
    ) -> None:
        self._engine = engine
        limits = Limits(max_batch or engine.max_batch, prefill_chunk, token_budget)
        self._scheduler = engine.scheduler(limits)
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._changed = threading.Condition()
        self._arrived: list[tuple[Handle, dict[Key, Opened]]] = []
        self._handles: dict[Row, Handle] = {}
        self._closing = False
        self._draining = False
        self._modes = ExitStack()
        self._modes.enter_context(evaluating(engine.lmm))
        self._thread = threading.Thread(target=self._loop, name="pumice-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Tokenises the request and opens its images in the caller's thread, then queues it.

        Raises PumiceError when it cannot be answered, whatever the load (with what is wrong), and
        BusyError when there is no room now. May block for as long as images take to decode.
        """
        [handle] = self.submit_together([request])
        return handle

    def submit_together(self, requests: Sequence[Request]) -> list[Handle]:
        """Queues several requests, or none of them, as `submit` does one.

        They are let in as soon as the first of them is. An image that they share is opened once.
        """
        with self._changed:
            self._check_room()
        rows = self._engine.rows_together(requests)
        for row in rows:
            self._check_budget(row)
        opened = self._engine.open_images(rows)
        handles = [Handle(row, self._engine.processor.decode, self._notify) for row in rows]
        with self._changed:
            self._check_room(rows)
            self._handles |= zip(rows, handles, strict=True)
            self._arrived += [(handle, opened) for handle in handles]
            self._changed.notify_all()
        return handles

    @property
    def broken(self) -> bool:
        """Whether a mistake of ours has ended it: it answers nothing any more."""
        return not self._closing and not self._thread.is_alive()

    def counters(self) -> Counters:
        """A snapshot for metrics."""
        scheduler, memory = self._scheduler, self._engine.memory
        with self._changed:
            rows = list(self._handles)
            arrived = len(self._arrived)
        running = len(scheduler.running.rows)
        return Counters(
            waiting=arrived + len(scheduler.waiting),
            reading=len(scheduler.reading),
            running=running,
            positions=scheduler.running.positions,
            reserved=sum(row.max_positions for row in rows),
            token_budget=scheduler.limits.token_budget,
            prefix_positions=memory.prefixes.positions,
            prefix_bytes=memory.prefixes.bytes,
            feature_bytes=memory.features.bytes,
            finished=memory.totals.finished,
            failed=memory.totals.failed,
            cancelled=memory.totals.cancelled,
            prompt_tokens=memory.totals.prompt_tokens,
            reused_tokens=memory.totals.reused_tokens,
            new_tokens=memory.totals.new_tokens,
            images_encoded=memory.features.encoded,
            steps=memory.totals.steps,
        )

    def close(self, drain: float = 0.0) -> None:
        """Ends: takes no new requests, lets those on their way go on for `drain` seconds, then
        cancels them, which a second call may do sooner. Every handle gets its result."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._handles, timeout=drain)
            self._closing = True
            for row in self._handles:
                row.cancelled = True
            self._changed.notify_all()
        self._thread.join()
        self._modes.close()

    def __enter__(self) -> Online:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_budget(self, row: Row) -> None:
        budget = self._scheduler.limits.token_budget
        if budget is not None and row.max_positions > budget:
            raise PumiceError(
                f"{row.where} may come to {row.max_positions} positions ({len(row.prompt)} of the "
                f"prompt and {row.max_positions - len(row.prompt)} new ones), and at most {budget} "
                f"are held. Shorten it, or ask for fewer new tokens."
            )

    def _check_room(self, rows: Sequence[Row] = ()) -> None:
        """Whether rows may come; without any, whether one could."""
        if self.broken:
            raise BusyError("the engine has stopped by a fault of its own; the log says which.")
        if self._draining:
            raise BusyError("the engine is closing and takes no more requests.")
        waiting = self._without_place(rows)
        before = len(waiting) - len(rows)
        if before < 0 or not waiting:
            return  # the first of them begins at once
        if before + max(1, len(rows)) > self._max_waiting:
            raise BusyError(
                f"{before} requests are waiting, and at most {self._max_waiting} may. Send the "
                f"request again later."
            )
        limit = self._max_waiting_tokens
        held, more = (
            sum(row.max_positions for row in part) for part in (waiting[:before], waiting[before:])
        )
        if limit is not None and before and held + more > limit:
            raise BusyError(
                f"the waiting requests need {held} positions, this one {more}, and at most "
                f"{limit} may wait. Send the request again later."
            )

    def _without_place(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the requests, with `rows` behind them, that cannot begin at the next step.

        One that can does not wait, however slow the step before it is.
        """
        known = [row for row in self._handles if not row.over]
        begun = [row for row in known if row.begun]
        queue = [*(row for row in known if not row.begun), *rows]
        longest = max((row.max_positions for row in begun), default=0)
        for place, row in enumerate(queue):
            longest = max(longest, row.max_positions)
            if not self._scheduler.limits.hold(len(begun) + place + 1, longest):
                return queue[place:]
        return []

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _loop(self) -> None:
        try:
            with self._scheduler.at_work():
                while self._next():
                    self._step()
        finally:
            # Also when a mistake of ours ends the thread: nobody may wait for ever.
            with self._changed:
                self._draining = True
                left, self._handles = self._handles, {}
            for row, handle in left.items():
                handle._end(Result(id=row.request.id, error="the engine has stopped; see its log"))

    def _next(self) -> bool:
        """Waits for work and takes in what has arrived; False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._arrived or self._closing or not self._scheduler.idle
            )
            for handle, opened in self._arrived:
                self._scheduler.add(handle._row, opened)
            self._arrived.clear()
            return not (self._closing and self._scheduler.idle)

    def _step(self) -> None:
        try:
            over = self._scheduler.step()
        except (MemoryError, PumiceError, RuntimeError) as error:
            # No memory, say: what is on its way fails, and the engine lives.
            log.exception("a step of the engine failed")
            over = self._scheduler.abandon(f"the engine failed: {type(error).__name__}: {error}")
        for row in self._scheduler.running.rows:
            self._handles[row]._speak()
        for row in over:
            result = row.result(self._engine.processor.decode)
            with self._changed:
                handle = self._handles.pop(row)
                self._changed.notify_all()
            handle._end(result)


def _raise_error(result: Result) -> None:
    if result.error is not None:
        raise PumiceError(result.error)


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop of a client that has gone may be closed already
        loop.call_soon_threadsafe(call)
