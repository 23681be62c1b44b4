"""Judges: language models that read answers, and how they are asked.

A judge is any OpenAI-compatible endpoint or a local model. Its replies are kept in a file the
moment they arrive; verdicts are made from them, so a stopped judging goes on and nothing is paid
twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Literal, Protocol

from pumice.core.errors import PumiceError
from pumice.core.llm_client import LLMClient
from pumice.core.llm_types import ChatRequest, Failure, Reply
from pumice.core.log import get_logger

By = Literal["endpoint", "local model", "reviews"]
# Past so many calls in a row that failed the others would fail too, each after its retries.
GIVE_UP_AFTER = 24
# Replies that have arrived, only not in a form that can be read.
_ARRIVED = ("empty", "filtered")

log = get_logger(__name__)


class Chat(Protocol):
    """What a judge is asked through."""

    def ask_all(self, requests: Iterable[ChatRequest]) -> Iterator[Reply]:
        """The replies in the order of the requests."""

    def is_cached(self, request: ChatRequest) -> bool:
        """Whether this reply is at hand."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Who judges: `model` as the endpoint calls it, or a local model's name and weights.

    `runs` None is what the benchmark's authors use. Without a `chat` only verdicts given earlier
    are known: they were read from a file, or belong to a run that is looked at again.
    """

    by: By
    model: str
    runs: int | None = None
    chat: Chat | None = None

    def __post_init__(self) -> None:
        if self.runs is not None and self.runs < 1:
            raise PumiceError(f"a judge must be asked at least once, given {self.runs} runs.")


def arrived(reply: Reply) -> bool:
    """True when the judge has answered, however; False when it must be asked again."""
    return reply.failure is None or reply.failure.kind in _ARRIVED


def while_alive(replies: Iterator[Reply], count: int) -> Iterator[Reply]:
    """These `count` replies, until many in a row were lost: then the rest is not asked for.

    What was not asked is a failure that says why. A spent budget is no such loss: a cheaper call
    may still be within it, and refusing one takes no time.
    """
    given = lost = 0
    for reply in replies:
        yield reply
        given += 1
        failure = reply.failure
        failed = failure is not None and not arrived(reply) and failure.kind != "cost_cap"
        lost = lost + 1 if failed else 0
        if lost >= GIVE_UP_AFTER and failure is not None:
            reason = f"not asked: the last {lost} calls all failed ({failure.reason})"
            yield from repeat(Reply(key="", failure=Failure("stopped", reason)), count - given)
            return


def announce(judge: Judge, name: str, requests: Sequence[ChatRequest]) -> None:
    """Says what is about to be asked, and what it will cost where that is known."""
    assert judge.chat is not None
    fresh = [request for request in requests if not judge.chat.is_cached(request)]
    told = f"{name}: {len(requests)} verdicts of {judge.model}"
    told += f", {len(requests) - len(fresh)} of them at hand" if len(fresh) < len(requests) else ""
    prices = judge.chat.prices if isinstance(judge.chat, LLMClient) else None
    if prices is not None and fresh:
        usual = sum(request.longest_answer for request in fresh) / len(fresh) / 4
        expected = sum(prices.expected(request, usual) for request in fresh)
        most = sum(prices.most(request) for request in fresh)
        told += f"; the rest costs about {expected:.4g}, at most {most:.4g}"
    log.info("%s", told)
