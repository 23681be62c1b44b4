"""One answer as it grows: when it ends, and which text it is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence

from pumice.core.types import FinishReason
from pumice.infer.choices import Guide

Decode = Callable[[Sequence[int]], str]

# What decoders write for bytes that are no character, or not yet.
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Answer:
    """Takes tokens one by one and knows when to stop; an end token ends it and leaves no text.

    With a `guide` it also ends when that is at its end.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        end_tokens: Collection[int],
        stop: Sequence[str],
        max_tokens: int,
        guide: Guide | None = None,
    ) -> None:
        self._decode = decode
        self._end_tokens = end_tokens
        self._stop = tuple(stop)
        self.max_tokens = max_tokens
        self._reader = _Reader(decode)
        self.guide = guide
        self.ids: list[int] = []
        self.new_tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, token: int) -> bool:
        """Takes the next token; True when the answer is complete."""
        self.new_tokens += 1
        guide = self.guide
        if token in self._end_tokens if guide is None else not guide.goes_on_with(token):
            self.finish_reason = "stop"
            return True
        self.ids.append(token)
        if guide is not None and guide.take(token):
            self.finish_reason = "stop"
        elif self._stop and self._reached_stop():
            self.finish_reason = "stop"
        elif self.new_tokens >= self.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """The text so far: cut before a stop string, without outer blanks or half a character."""
        whole = self._decode(self.ids)
        # Read at once where possible; broken bytes read differently at once and token by token.
        if _BROKEN in whole:
            whole = self._reader.read(self.ids) + self._reader.rest(self.ids)
        places = [place for stop in self._stop if (place := whole.find(stop)) >= 0]
        return whole[: min(places)].strip() if places else whole.strip()

    @property
    def settled(self) -> str:
        """The beginning of `text` that no later token can change."""
        if self.finish_reason is not None:
            return self.text
        return self._sure.strip()

    @property
    def settled_tokens(self) -> int:
        """How many tokens have all of their text in `settled`, or in the blanks around it."""
        if self.finish_reason is not None:
            return len(self.ids)
        return self._reader.tokens_within(len(self._sure))

    @property
    def _sure(self) -> str:
        text = self._reader.read(self.ids)
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return text[: len(text) - held]

    def _reached_stop(self) -> bool:
        known = len(self._reader.text)
        text = self._reader.read(self.ids)
        return any(text.find(stop, max(0, known - len(stop))) >= 0 for stop in self._stop)


class _Reader:
    """Tokens to text in steps of whole characters, each step reading two short runs of tokens."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._seen = 0
        # Decoders treat the first token of a run in their own way (they drop its space), so each
        # step reads from `_start`, one step back, and keeps what goes beyond `_end`.
        self._start = 0
        self._end = 0
        self.text = ""
        # After each step of whole characters: the tokens read, and the length of their text.
        self._tokens = [0]
        self._lengths = [0]

    def read(self, ids: Sequence[int]) -> str:
        """The text of all whole characters; `ids` may only grow from call to call."""
        while self._seen < len(ids):
            self._seen += 1
            fresh = self._beyond(ids)
            if fresh and not fresh.endswith(_BROKEN):
                self.text += fresh
                self._start, self._end = self._end, self._seen
                self._tokens.append(self._seen)
                self._lengths.append(len(self.text))
        return self.text

    def tokens_within(self, length: int) -> int:
        """How many tokens the first `length` characters of the text hold whole."""
        return self._tokens[bisect_right(self._lengths, length) - 1]

    def rest(self, ids: Sequence[int]) -> str:
        """What stands behind the whole characters once the last token is there."""
        return self._beyond(ids).rstrip(_BROKEN)

    def _beyond(self, ids: Sequence[int]) -> str:
        before = self._decode(ids[self._start : self._end])
        return self._decode(ids[self._start : self._seen])[len(before) :]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    sizes = range(min(len(text), len(stop)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
