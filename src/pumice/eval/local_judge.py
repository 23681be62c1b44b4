"""A model in this process as a judge, where there is no endpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pumice.core.llm_cache import ReplyCache
from pumice.core.llm_types import ChatRequest, Failure, Reply
from pumice.core.types import Message, Request, Result, Sampling, TextPart
from pumice.eval.runner import Answerer


class LocalChat:
    """A model in this process, asked as an endpoint would be; replies are kept in `cache`.

    `weights` is the hash that names the model: replies of another one are never taken.
    """

    def __init__(self, answer: Answerer, weights: str, cache: Path) -> None:
        self._answer = answer
        self._url = f"weights:{weights}"
        self.cache = ReplyCache(cache)

    def close(self) -> None:
        """Lets the next process use the file of replies."""
        self.cache.close()

    def is_cached(self, request: ChatRequest) -> bool:
        """Whether this reply is at hand."""
        return request.key(self._url) in self.cache

    def ask_all(self, requests: Iterable[ChatRequest]) -> Iterator[Reply]:
        """The replies in the order of the requests; those not at hand are made together."""
        wanted = [(request.key(self._url), request) for request in requests]
        failed: dict[str, Reply] = {}

        def keep(result: Result) -> None:
            if result.id in self.cache or result.id in failed:
                return
            reply = _reply(result)
            if reply.failure is None:
                self.cache.add(reply)
            else:
                failed[result.id] = reply

        fresh = {key: request for key, request in wanted if key not in self.cache}
        if fresh:
            for result in self._answer([_request(r, key) for key, r in fresh.items()], keep):
                keep(result)
        for key, _ in wanted:
            yield self.cache.get(key) or failed[key]


def _request(asked: ChatRequest, key: str) -> Request:
    messages = tuple(
        Message(message["role"], (TextPart(message["content"]),)) for message in asked.messages
    )
    sampling = Sampling(
        max_new_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.draw
    )
    return Request(messages, sampling, key)


def _reply(result: Result) -> Reply:
    if result.error is not None:
        return Reply(key=result.id, failure=Failure("server_error", result.error))
    return Reply(
        key=result.id,
        text=result.text,
        finish_reason=result.finish_reason or "",
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.new_tokens,
    )
