"""Who is read and who speaks next: requests join the running batch and leave it at every step.

A step reads some positions of the prompts that are on their way and then says one token of every
row in flight, so that a long prompt holds nobody up. What a request gets depends on its own
messages, settings and seed alone, never on who runs beside it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain

import torch

from pumice.infer.cache import PromptCache
from pumice.infer.decoder import Chunk, Decoder
from pumice.infer.decoding import Running, say
from pumice.infer.features import ImageFeatures, Key, Opened, Shown
from pumice.infer.prefixes import PrefixStore, common_length
from pumice.infer.rows import Row, features_between
from pumice.models.cross_attention import Media
from pumice.models.lmm import LMM

# A shorter common beginning is not worth the copy, nor the wait for who reads it first.
_LEAST_SHARED = 8
_WORTH_WAITING = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What runs at once."""

    max_batch: int
    """Rows that are read or in flight."""
    prefill_chunk: int = 2048
    """Prompt positions that are read before every row in flight gets its next token."""
    token_budget: int | None = None
    """Positions that the rows in flight may come to hold, padding among them; None for no limit."""
    look_ahead: bool = False
    """Whether images of waiting rows are encoded together with those that are needed now. That is
    quicker for all and slower for the first."""

    def hold(self, rows: int, longest: int) -> bool:
        """Whether so many rows may be on their way, of which none comes to more positions."""
        if rows > self.max_batch:
            return False
        return self.token_budget is None or rows * longest <= self.token_budget


@dataclass(slots=True)
class Totals:
    """What has been done since the engine was made."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    """Positions of prompts, read or known already."""
    reused_tokens: int = 0
    """Those of them that were known already."""
    new_tokens: int = 0
    steps: int = 0


@dataclass(slots=True)
class Memory:
    """What outlives a request, shared by all schedulers of one engine; `lock` guards all of it."""

    features: ImageFeatures
    prefixes: PrefixStore
    totals: Totals
    lock: threading.RLock


class Scheduler:
    """Takes rows, and answers them step by step."""

    def __init__(self, lmm: LMM, decoder: Decoder, memory: Memory, limits: Limits) -> None:
        self._lmm = lmm
        self._decoder = decoder
        self._memory = memory
        self.limits = limits
        self.waiting: deque[Row] = deque()
        self.reading: list[Row] = []
        self.running = Running(decoder)
        self._opened: dict[Row, dict[Key, Opened]] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.reading or self.running.rows)

    def at_work(self) -> AbstractContextManager[object]:
        """What a thread holds while it takes steps."""
        return self._decoder.at_work()

    def add(self, row: Row, opened: dict[Key, Opened] | None = None) -> None:
        """Queues a row; `opened` are images of it that are decoded already."""
        self.waiting.append(row)
        if opened:
            self._opened[row] = opened

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Reads, then says a token of every row in flight; -> the rows that are over."""
        with self._memory.lock:
            self._memory.totals.steps += 1
            over = self._drop_cancelled()
            over += self._admit()
            over += self._read()
            if self.running.rows:
                self.running.step()
                over += self._leave([row for row in self.running.rows if row.over])
            for row in over:
                self._count(row)
            return over

    def abandon(self, error: str) -> list[Row]:
        """Gives up every row with this error; -> all of them."""
        with self._memory.lock:
            rows = [*self.waiting, *self.reading, *self.running.rows]
            self.waiting.clear()
            self.reading.clear()
            self._opened.clear()
            self.running = Running(self._decoder)
            for row in rows:
                row.error, row.cache = error, None
                self._count(row)
            return rows

    def _drop_cancelled(self) -> list[Row]:
        """Frees what cancelled rows hold, wherever they are."""
        # Each row is looked at once, for its client may leave between two looks.
        gone = {row: None for row in (*self.waiting, *self.reading) if row.cancelled}
        for row in gone:
            row.cache = None
            self._opened.pop(row, None)
        self.waiting = deque(row for row in self.waiting if row not in gone)
        self.reading = [row for row in self.reading if row not in gone]
        return [*gone, *self._leave([row for row in self.running.rows if row.cancelled])]

    def _leave(self, rows: Sequence[Row]) -> list[Row]:
        for row in rows:
            # The next turn of a conversation goes on from here.
            if not row.cancelled:
                spoken = row.symbols + row.answer.ids[: row.length - len(row.prompt)]
                place = self.running.rows.index(row)
                first = self.running.cache.first_column(row.length)
                self._memory.prefixes.add(spoken, self.running.cache, place, first)
        if rows:
            self.running.leave(rows)
        return list(rows)

    # reading

    def _admit(self) -> list[Row]:
        """Takes rows from the queue while there is room; -> those whose images cannot be shown."""
        chosen = self._choose()
        opened: dict[Key, Opened] = {}
        needed = []
        caches = self._decoder.caches([len(row.prompt) for row in chosen])
        for row, cache in zip(chosen, caches, strict=True):
            row.cache = cache
            opened |= self._opened.pop(row, {})
            needed.append((row.where, self._begin(row, cache)))
        features = self._memory.features
        errors = features.encode([*needed, *self._ahead(needed)], opened) if chosen else []
        for row, error in zip(chosen, errors[: len(chosen)], strict=True):
            row.error = error
            if error is None:
                row.features = [features.get(span.shown) for span in row.spans]
                row.media = self._media(row)
                self.reading.append(row)
        return [row for row in chosen if row.error is not None]

    def _ahead(self, needed: Sequence[tuple[str, list[Shown]]]) -> list[tuple[str, list[Shown]]]:
        """Further images of waiting rows, if any is encoded now: at most a batch of all together.

        One that cannot be shown is told when its row's turn comes.
        """
        features = self._memory.features

        def unknown(images: Iterable[Shown]) -> dict[Key, Shown]:
            return {shown.key: shown for shown in images if features.get(shown) is None}

        fresh = unknown(shown for _, images in needed for shown in images)
        ahead = []
        for row in self.waiting if self.limits.look_ahead and fresh else ():
            more = {key: shown for key, shown in unknown(row.images).items() if key not in fresh}
            if len(fresh) + len(more) > self.limits.max_batch:
                break
            fresh |= more
            ahead.append((row.where, list(more.values())))
        return ahead

    def _begin(self, row: Row, cache: PromptCache) -> list[Shown]:
        """Takes over what is known of the prompt; -> the images whose features are needed."""
        # The last position is always read: its logits are wanted.
        prompt = row.symbols[:-1]
        if self._memory.prefixes.known(prompt) >= _LEAST_SHARED:
            row.read = row.reused = self._memory.prefixes.fill(prompt, cache)
        gated = self._lmm.cross_attention is not None
        return [span.shown for span in row.spans if gated or span.last > row.read]

    def _media(self, row: Row) -> Media | None:
        if self._lmm.cross_attention is None:
            return None
        ids = torch.tensor([row.prompt], device=self._lmm.device)
        return self._lmm.media(ids, [image for image in row.features if image is not None])

    def _choose(self) -> list[Row]:
        chosen: list[Row] = []
        passed: list[Row] = []
        look = len(self.waiting)
        while self.waiting and len(chosen) + len(passed) < look:
            if len(passed) > self.limits.max_batch or not self._fits(self.waiting[0], chosen):
                break
            row = self.waiting.popleft()
            if self._better_later(row, (*self.reading, *chosen)):
                passed.append(row)
            else:
                chosen.append(row)
        self.waiting.extendleft(reversed(passed))
        return chosen

    def _fits(self, row: Row, chosen: Sequence[Row]) -> bool:
        """Whether there is a place for it until it is done, beside all that are on their way."""
        others = (*self.running.rows, *self.reading, *chosen)
        longest = max(other.max_positions for other in (*others, row))
        return self.limits.hold(len(others) + 1, longest)

    def _better_later(self, row: Row, ahead: Iterable[Row]) -> bool:
        """Whether a row ahead is about to read much of what this one begins with."""
        if not self._memory.prefixes.max_bytes:
            return False  # it would be forgotten
        known = self._memory.prefixes.known(row.symbols)
        return any(
            common_length(row.symbols, other.symbols) - max(known, other.read) >= _WORTH_WAITING
            for other in ahead
        )

    def _read(self) -> list[Row]:
        """Reads the next positions of prompts; rows that are through join the batch."""
        left = self.limits.prefill_chunk
        ends: dict[Row, int] = {}
        for row in self.reading:
            if left <= 0:
                break
            ends[row] = min(len(row.prompt), row.read + left)
            left -= ends[row] - row.read
        if not ends:
            return []
        rows, chunks = list(ends), self._chunks(ends)
        logits = self._decoder.read(chunks)
        ready = []
        for row, chunk in zip(rows, chunks, strict=True):
            row.read = chunk.first + len(chunk.embeds)
            if chunk.ends:
                ready.append(row)
        self.reading = [row for row in self.reading if row not in ready]
        if ready:
            say(ready, torch.stack(logits))
        for row in ready:
            assert row.cache is not None
            self._memory.prefixes.add(row.symbols, row.cache, 0, 0)
            row.features = []
        over = [row for row in ready if row.over]
        # Who is cancelled from here on leaves the batch, and must not be over twice.
        if goes_on := [row for row in ready if row not in over]:
            self.running.join(goes_on)
        return over

    def _chunks(self, ends: Mapping[Row, int]) -> list[Chunk]:
        """The next positions of these rows, up to where each is to be read now."""
        ids = [row.prompt[row.read : last] for row, last in ends.items()]
        shown = [
            image
            for row, last in ends.items()
            for image in features_between(row.spans, row.features, row.read, last)
        ]
        together = torch.tensor([list(chain.from_iterable(ids))], device=self._lmm.device)
        embeds = torch.split(self._lmm.embed(together, shown)[0], list(map(len, ids)))
        chunks = []
        for (row, last), part in zip(ends.items(), embeds, strict=True):
            assert row.cache is not None
            media = row.media and row.media.window(row.read, last)
            chunks.append(Chunk(part, row.read, row.cache, media, last == len(row.prompt)))
        return chunks

    def _count(self, row: Row) -> None:
        totals = self._memory.totals
        if row.error is not None:
            totals.failed += 1
            return
        done = row.answer.finish_reason is not None
        totals.finished += done
        totals.cancelled += not done
        totals.prompt_tokens += row.read
        totals.reused_tokens += row.reused
        totals.new_tokens += row.answer.new_tokens
