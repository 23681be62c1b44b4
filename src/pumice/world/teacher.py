"""A scripted LLM behind an OpenAI-compatible local server, for work with endpoints offline.

It answers the data engine from the captions and boxes in its prompt, and the judges' prompts by
counting words. On request it fails as real endpoints do. Every answer is a function of seed and
request, and no request fails in passing more than `MOST_FAILURES` times.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.registry import check_choice
from pumice.world.teacher_answers import answer

MODEL = "pumice-teacher"
MOST_FAILURES = 2
PASSING = ("rate_limit", "server_error", "timeout", "broken")
"""Failures that go away when asked again: 429 with Retry-After, 500, no answer in time, half a
response."""
LASTING = ("truncated", "malformed", "refusal", "mention", "leak")
"""Flaws of the text, which stay: cut short, in no form, refused, talking of captions, and a
question that holds its answer."""
FAULTS = (*PASSING, *LASTING)


@dataclass(slots=True)
class Teacher:
    """What the server knows. `faults` gives the share of requests that meet each fault.

    `idempotent` False forgets Idempotency-Keys, so that a repeated request is charged again.
    """

    seed: int = 0
    faults: Mapping[str, float] = field(default_factory=dict)
    latency: float = 0.0
    """Seconds before each answer."""
    hang: float = 30.0
    """Seconds that a call hangs which is to time out."""
    retry_after: float = 0.05
    idempotent: bool = True
    calls: int = 0
    paid: Counter[str] = field(default_factory=Counter)
    """How often each request was answered at somebody's expense."""
    met: Counter[str] = field(default_factory=Counter)
    _failures: Counter[str] = field(default_factory=Counter)
    _given: dict[str, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for name, share in self.faults.items():
            check_choice("a fault of the teacher", name, FAULTS)
            if not 0 <= share <= 1:
                raise PumiceError(f"the share of {name} is {share}; allowed: 0 to 1.")

    def passing_fault(self, request: str) -> str | None:
        """What this call fails with, if it does."""
        with self._lock:
            self.calls += 1
            failures = self._failures[request]
            if failures >= MOST_FAILURES:
                return None
            fault = self._drawn(PASSING, f"{request} {failures}")
            if fault is not None:
                self._failures[request] += 1
                self.met[fault] += 1
            return fault

    def completion(self, body: dict[str, Any], request: str, key: str | None) -> bytes:
        """The response body, charged unless the same Idempotency-Key was answered before."""
        with self._lock:
            if self.idempotent and key is not None and key in self._given:
                return self._given[key]
            fault = self._drawn(LASTING, request)
            if fault is not None:
                self.met[fault] += 1
            text = answer(body["messages"], random.Random(f"{self.seed} {request}"), fault)
            response = json.dumps(_completion(body, request, text, fault)).encode()
            self.paid[request] += 1
            if key is not None:
                self._given[key] = response
            return response

    def forget(self) -> None:
        """As if nothing had been asked yet."""
        with self._lock:
            self.calls = 0
            for table in (self.paid, self.met, self._failures, self._given):
                table.clear()

    def stats(self) -> dict[str, Any]:
        """What was asked, answered and charged so far."""
        with self._lock:
            return {
                "calls": self.calls,
                "paid": self.paid.total(),
                "requests": len(self.paid),
                "faults": dict(self.met),
            }

    def _drawn(self, names: tuple[str, ...], request: str) -> str | None:
        draw = random.Random(f"{self.seed} {names[0]} {request}").random()
        for name in names:
            draw -= self.faults.get(name, 0.0)
            if draw < 0:
                return name
        return None


def parse_faults(words: list[str]) -> dict[str, float]:
    """["rate_limit=0.1", ...] as a table; the teacher checks names and shares."""
    faults = {}
    for word in words:
        name, _, share = word.partition("=")
        try:
            faults[name] = float(share)
        except ValueError as error:
            raise PumiceError(
                f"a fault is written NAME=SHARE, as rate_limit=0.1; given {word!r}. Names: "
                f"{', '.join(FAULTS)}."
            ) from error
    return faults


@contextmanager
def teaching(teacher: Teacher, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """Serves in the background while the block runs; gives the endpoint's URL.

    Port 0 takes a free one.
    """
    server = _server(teacher, host, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _server(teacher: Teacher, host: str, port: int) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"teacher": teacher})
    ThreadingHTTPServer.daemon_threads = True
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise PumiceError(
            f"port {port} of {host} cannot be used ({error.strerror}). Give another --port."
        ) from error


class _Handler(BaseHTTPRequestHandler):
    teacher: Teacher
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            models = [{"id": MODEL, "object": "model", "owned_by": "pumice"}]
            self._send(200, {"object": "list", "data": models})
        elif self.path in ("/stats", "/v1/stats"):
            self._send(200, self.teacher.stats())
        else:
            self._fail(404, f"no such page: {self.path}")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/chat/completions":
            return self._fail(404, f"no such page: {self.path}")
        try:
            body = json.loads(content)
            messages = body["messages"]
            if not messages or any("content" not in message for message in messages):
                raise ValueError("messages need content")
        except (ValueError, KeyError, TypeError) as error:
            return self._fail(400, f"not a chat request: {error}")
        request = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        time.sleep(self.teacher.latency)
        fault = self.teacher.passing_fault(request)
        if fault == "rate_limit":
            wait = {"Retry-After": f"{self.teacher.retry_after:g}"}
            return self._fail(429, "too many requests", wait)
        if fault == "server_error":
            return self._fail(500, "the server had an error")
        if fault == "timeout":
            time.sleep(self.teacher.hang)
            self.close_connection = True
            return None
        response = self.teacher.completion(body, request, self.headers.get("Idempotency-Key"))
        self._send_bytes(200, response[: len(response) // 2] if fault == "broken" else response)

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""

    def _fail(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"error": {"message": message, "code": status}}, headers)

    def _send(
        self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        self._send_bytes(status, json.dumps(content).encode(), headers)

    def _send_bytes(
        self, status: int, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            # The client is gone: killed, or out of patience.
            self.close_connection = True


def _completion(body: dict[str, Any], request: str, text: str, fault: str | None) -> dict[str, Any]:
    """An OpenAI chat completion; a token is a word here."""
    prompt_tokens = sum(len(str(message["content"]).split()) for message in body["messages"])
    words = text.split()
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(words)
    cut = fault == "truncated" or len(words) > limit
    if cut:
        limit = min(limit, max(len(words) // 2, 1))
        text = " ".join(text.split(" ")[:limit])
    return {
        "id": f"chatcmpl-{request[:16]}",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model") or MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length" if cut else "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(text.split()),
            "total_tokens": prompt_tokens + len(text.split()),
        },
    }
