"""A client of any OpenAI-compatible chat endpoint, for work that must not be paid for twice.

The data engine, the judges and the evaluation of an endpoint share it. Requests run side by side,
within a rate and a budget; what fails in passing is asked again; every reply is kept on disk.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeGuard
from urllib.parse import urlsplit

import httpx2

from pumice.core.errors import PumiceError
from pumice.core.llm_cache import ReplyCache
from pumice.core.llm_limits import Budget, RateLimit
from pumice.core.llm_types import ChatRequest, Failure, FailureKind, Prices, Reply
from pumice.core.log import get_logger

log = get_logger(__name__)

_AHEAD = 8
"""Requests under way or done but not yet handed out, for each one that may run at a time."""
_PASSING = (408, 409, 425, 429)
_Outcome = Reply | Failure


class KeyRefusedError(PumiceError):
    """The endpoint wants another key, or one at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the requests go and how hard it may be pressed."""

    url: str
    """Up to and with the version: `https://host/v1`."""
    api_key: str | None = None
    concurrency: int = 8
    per_minute: float | None = None
    timeout: float = 120.0
    """Seconds without a byte before a call is given up."""
    attempts: int = 6
    first_wait: float = 0.5
    """Seconds before the second attempt; doubled for each further one, with jitter."""
    longest_wait: float = 60.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise PumiceError(
                f"the endpoint is {self.url!r}; it must start with http:// or https://, as "
                f"https://host/v1."
            )
        if not _has_host(self.url):
            raise PumiceError(f"the endpoint {self.url!r} names no host; write https://host/v1.")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            # The key itself is never shown.
            odd = next(i for i, c in enumerate(self.api_key) if not " " <= c <= "~")
            raise PumiceError(
                f"the key for {self.url} has a character at place {odd + 1} of "
                f"{len(self.api_key)} that no key has, such as a line end or a letter with an "
                f"accent. Copy the key again."
            )
        if self.concurrency < 1 or self.attempts < 1 or not 0 < self.timeout < math.inf:
            raise PumiceError(
                f"concurrency and attempts must be at least 1 and the time-out above 0; given "
                f"{self.concurrency}, {self.attempts} and {self.timeout}."
            )
        if self.per_minute is not None and not self.per_minute > 0:
            raise PumiceError(
                f"the rate must be above 0 requests a minute, given {self.per_minute}; leave it "
                f"out for no limit."
            )


def _has_host(url: str) -> bool:
    try:
        return bool(urlsplit(url).hostname)
    except ValueError:
        return False


class LLMClient:
    """Asks an endpoint. Use as a context manager; safe to share between threads.

    `cache` is a file of replies: a request answered there costs nothing, in this run or any later
    one. With `mode` "replay" nothing is sent, and what the file lacks is a failure. `cost_cap`
    covers all runs that wrote to the file. It needs prices and holds whatever the endpoint
    answers: before a call the most it can cost is set aside, and a call whose reply is lost counts
    as that much. Each call carries an Idempotency-Key, so that an endpoint which honours it
    charges nothing twice, even for a reply that was lost on its way.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        cache: Path | None = None,
        prices: Prices | None = None,
        cost_cap: float | None = None,
        mode: Literal["ask", "replay"] = "ask",
    ) -> None:
        if cost_cap is not None and prices is None:
            raise PumiceError(
                f"a cost cap of {cost_cap:g} needs prices; give what a million prompt and "
                f"completion tokens cost, or leave the cap out."
            )
        # Nothing is more than "nan", so it would be no cap at all.
        if cost_cap is not None and not 0 <= cost_cap < math.inf:
            raise PumiceError(
                f"the cost cap is {cost_cap:g}; a number from 0 is needed. Leave it out for no cap."
            )
        if mode == "replay" and (cache is None or not cache.is_file()):
            raise PumiceError(f"a replay needs a file of recorded replies; {cache} is none.")
        self.endpoint, self.prices, self.mode = endpoint, prices, mode
        self.url = endpoint.url.rstrip("/")
        self.cache = ReplyCache(cache) if cache is not None else None
        self.budget = Budget(cost_cap, self.cache.spent if self.cache else 0.0)
        self._rate = RateLimit(endpoint.per_minute)
        self._stop = threading.Event()
        self._stopped = False
        self._cache_lock = threading.Lock()
        self._in_flight: dict[str, threading.Lock] = {}
        # The jitter decides when, never what, so it needs no seed.
        self._random = random.Random()
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._http = httpx2.Client(
            timeout=endpoint.timeout,
            headers=headers,
            limits=httpx2.Limits(max_connections=endpoint.concurrency),
        )

    def __enter__(self) -> LLMClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def stop(self) -> None:
        """Nothing more is sent: calls under way end, retries and waiting requests give up."""
        self._stopped = True
        self._stop.set()

    def close(self) -> None:
        """Ends waiting requests and closes connections and cache."""
        self.stop()
        self._http.close()
        if self.cache is not None:
            self.cache.close()

    def is_cached(self, request: ChatRequest) -> bool:
        """Whether this request would cost nothing."""
        return self.cache is not None and request.key(self.url) in self.cache

    def models(self) -> list[str]:
        """The names of the models the endpoint serves; none where it has no such list.

        Raises PumiceError when it cannot be reached or is elsewhere, and KeyRefusedError.
        """
        try:
            answer = self._http.get(f"{self.url}/models")
        except httpx2.TransportError as error:
            raise PumiceError(
                f"{self.url} cannot be reached ({error!r}). Check the address (up to and with the "
                f"version, as http://host/v1) and whether the server runs."
            ) from error
        if answer.has_redirect_location:
            raise PumiceError(
                f"{self.url} leads on to {answer.headers['location']}. Give the address that "
                f"answers itself."
            )
        if answer.status_code in (401, 403):
            raise KeyRefusedError(
                f"{self.url} refuses the key ({answer.status_code}: {_excerpt(answer)}). Set "
                f"PUMICE_API_KEY or OPENAI_API_KEY to a valid one."
            )
        try:
            return [str(entry["id"]) for entry in answer.json()["data"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []

    def ask(self, request: ChatRequest) -> Reply:
        """The answer to one request, from the cache or the endpoint, or a failure."""
        key = request.key(self.url)
        with self._cache_lock:
            one_at_a_time = self._in_flight.setdefault(key, threading.Lock())
        # Two equal requests at the same time must not be paid for twice.
        with one_at_a_time:
            with self._cache_lock:
                kept = self.cache.get(key) if self.cache else None
            if kept is not None:
                return _checked(kept)
            if self.mode == "replay":
                return _failed(key, "not_recorded", "no reply to this request was recorded")
            return self._ask_with_retries(request, key)

    def ask_all(self, requests: Iterable[ChatRequest]) -> Generator[Reply, None, None]:
        """The replies in the order of the requests, asked side by side.

        Requests are taken as they are needed, so there may be any number of them. One such batch
        at a time: one that is left half-way ends the calls of all.
        """
        window = self.endpoint.concurrency * _AHEAD
        waiting: deque[Future[Reply]] = deque()
        pool = ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="llm")
        finished = False
        try:
            for request in requests:
                waiting.append(pool.submit(self.ask, request))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            finished = True
        finally:
            if not finished:
                # Left half-way: calls under way end and are kept, retries are not waited for.
                self._stop.set()
            pool.shutdown(cancel_futures=True)
            if not self._stopped:
                # Only these requests were given up; the client may be asked others.
                self._stop.clear()

    def _ask_with_retries(self, request: ChatRequest, key: str) -> Reply:
        failure = Failure("stopped", "the client was closed before this request was sent")
        for attempt in range(1, self.endpoint.attempts + 1):
            self._rate.wait(self._stop)
            if self._stop.is_set():
                return Reply(key=key, failure=failure, attempts=attempt - 1)
            most = self.prices.most(request) if self.prices else 0.0
            if not self.budget.reserve(most):
                reason = (
                    f"the next call may cost {most:.4g} and {self.budget.spent:.4g} of the cap of "
                    f"{self.budget.cap:.4g} is spent"
                )
                return _failed(key, "cost_cap", reason, attempt - 1)
            outcome, wait = self._call(request, key, most)
            if isinstance(outcome, Reply):
                return _checked(replace(outcome, attempts=attempt))
            failure = outcome
            if wait is None:
                return Reply(key=key, failure=failure, attempts=attempt)
            if attempt < self.endpoint.attempts:
                log.debug("attempt %d failed (%s), again in %.2g s", attempt, failure.reason, wait)
                self._wait(attempt, wait)
        return Reply(key=key, failure=failure, attempts=self.endpoint.attempts)

    def _wait(self, attempt: int, asked_for: float) -> None:
        """Exponential, with full jitter in its upper half, and at least what the server asked."""
        longest = min(self.endpoint.first_wait * 2 ** (attempt - 1), self.endpoint.longest_wait)
        self._stop.wait(max(asked_for, longest * self._random.uniform(0.5, 1.0)))

    def _call(self, request: ChatRequest, key: str, most: float) -> tuple[_Outcome, float | None]:
        """One call: a reply, or a failure with the least seconds to wait (None: for good)."""
        charged = most
        try:
            answer = self._http.post(
                f"{self.url}/chat/completions",
                json=request.body(),
                headers={"Idempotency-Key": key},
            )
            outcome, wait, charged = self._read(answer, key, most)
        except httpx2.ConnectError as error:
            charged = 0.0
            outcome, wait = Failure("connection", f"{self.url} cannot be reached ({error})"), 0.0
        except httpx2.TimeoutException:
            seconds = f"{self.endpoint.timeout:g}"
            outcome, wait = Failure("timeout", f"no answer within {seconds} seconds"), 0.0
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            outcome, wait = Failure("connection", f"the connection broke ({error!r})"), 0.0
        finally:
            self.budget.settle(most, charged)
        if isinstance(outcome, Failure) and charged and self.cache is not None:
            with self._cache_lock:
                self.cache.add_lost(key, charged)
        return outcome, wait

    def _read(
        self, answer: httpx2.Response, key: str, most: float
    ) -> tuple[_Outcome, float | None, float]:
        """A response as an outcome, the wait before the next call, and what this one cost."""
        status = answer.status_code
        if status == 429:
            wait = self._hold_all(answer)
            return Failure("rate_limited", f"429: {_excerpt(answer)}"), wait, 0.0
        if status >= 500 or status in _PASSING:
            wait = self._hold_all(answer) if "retry-after" in answer.headers else 0.0
            return Failure("server_error", f"{status}: {_excerpt(answer)}"), wait, 0.0
        if status != 200:
            return Failure("refused_by_server", f"{status}: {_excerpt(answer)}"), None, 0.0
        reply = _reply(answer, key, self.prices)
        if reply is None:
            reason = f"200 without a chat completion: {_excerpt(answer)}"
            return Failure("bad_reply", reason), 0.0, most
        if self.prices is not None and reply.cost is None:
            # Without a usage block the cap can only be held by the most it can have cost.
            reply = replace(reply, cost=most)
        if self.cache is not None:
            with self._cache_lock:
                self.cache.add(reply)
        return reply, 0.0, reply.cost or 0.0

    def _hold_all(self, answer: httpx2.Response) -> float:
        """The pause the server asks for, which every other call keeps too."""
        seconds = min(_retry_after(answer.headers.get("retry-after")), self.endpoint.longest_wait)
        self._rate.pause(seconds)
        return seconds


def _reply(answer: httpx2.Response, key: str, prices: Prices | None) -> Reply | None:
    """The reply in a response; None when it is no chat completion."""
    try:
        content = answer.json()
        choice = content["choices"][0]
        text = choice["message"].get("content")
        usage = content.get("usage") or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(text, str | None):
        return None
    reply = Reply(
        key=key,
        text=text or "",
        has_text=text is not None,
        finish_reason=str(choice.get("finish_reason") or ""),
        model=str(content.get("model") or ""),
    )
    # What is no count must not make money: the cap is then held by the most a call can cost.
    if not (_is_count(prompt) and _is_count(completion)):
        return reply
    cost = prices.cost(prompt, completion) if prices else None
    return replace(reply, prompt_tokens=prompt, completion_tokens=completion, cost=cost)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked(reply: Reply) -> Reply:
    """A complete reply without text is a failure, and remains a paid reply in the cache."""
    if reply.finish_reason == "content_filter":
        reason = "the endpoint's content filter withheld the answer"
        return replace(reply, failure=Failure("filtered", reason))
    if not reply.text.strip():
        reason = f"the reply has no text (finish_reason {reply.finish_reason or 'not given'!r})"
        return replace(reply, failure=Failure("empty", reason))
    return reply


def _failed(key: str, kind: FailureKind, reason: str, attempts: int = 0) -> Reply:
    return Reply(key=key, failure=Failure(kind, reason), attempts=attempts)


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 for neither."""
    if not value:
        return 0.0
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _excerpt(answer: httpx2.Response) -> str:
    text: Any = answer.text.strip()
    try:
        content = answer.json()
        error = content.get("error") if isinstance(content, dict) else None
        text = (error.get("message") if isinstance(error, dict) else error) or text
    except (ValueError, RecursionError):
        pass
    return str(text)[:300] or "no text"
