"""The rows in flight: one token each and step, and rows join and leave between steps.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pumice.infer.decoder import Decoder
from pumice.infer.rows import Chosen, Row
from pumice.infer.sampling import choose
from pumice.models.cross_attention import Media


class Running:
    """The rows whose prompts are read."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.rows: list[Row] = []
        self.cache = decoder.cache()
        self.positions = 0
        """Positions that have a place in the cache, padding among them; other threads read it."""
        self._media: Media | None = None

    def join(self, rows: Sequence[Row]) -> None:
        """Rows whose prompts are read and whose first tokens are chosen."""
        caches = [row.cache for row in rows if row.cache is not None]
        if not self.cache.take_over(caches):
            rows = sorted(rows, key=lambda row: -len(row.prompt))
            for row, more in zip(rows, reversed(range(len(rows))), strict=True):
                assert row.cache is not None
                self.cache.join(row.cache, len(row.prompt), more)
        for row in rows:
            row.cache = None
            # The tokens to come look where the last one of the prompt looks.
            row.media = row.media and row.media.after()
            self.rows.append(row)
        self._look()

    def leave(self, rows: Sequence[Row]) -> None:
        """Gives up the places of these rows."""
        # From the last place on, so that no row is moved that then leaves as well.
        for place in sorted(map(self.rows.index, rows), reverse=True):
            self.rows[place] = self.rows[-1]
            self.rows.pop()
            self.cache.leave(place, max((row.length for row in self.rows), default=0))
        self._look()

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row."""
        logits = self._decoder.step(
            [row.last for row in self.rows],
            [row.length for row in self.rows],
            self.cache,
            self._media,
        )
        say(self.rows, logits)
        self._count()

    def _count(self) -> None:
        # A number and no property: the cache is not whole while its own thread changes it.
        self.positions = len(self.rows) * self.cache.width

    @torch.inference_mode()
    def _look(self) -> None:
        self._count()
        self._media = Media.side_by_side([row.media for row in self.rows])


def say(rows: Sequence[Row], logits: torch.Tensor) -> None:
    """float[B, V] -> the next token of each row, chosen by its own settings."""
    tokens = choose(_allowed(rows, logits), [row.sampler for row in rows])
    for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        wanted = row.request.sampling.top_logprobs
        if wanted is not None:
            row.logprobs.append(_logprobs(logits[place], token, wanted))
        row.last = token
        row.answer.push(token)


def _allowed(rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
    """float[B, V] -> float[B, V]: without the tokens that lead to none of a row's choices."""
    guided = [(place, row.answer.guide) for place, row in enumerate(rows) if row.answer.guide]
    if not guided:
        return logits
    left = logits.clone()
    for place, guide in guided:
        tokens = guide.allowed
        left[place] = float("-inf")
        left[place, tokens] = logits[place, tokens]
    return left


def _logprobs(logits: torch.Tensor, token: int, count: int) -> Chosen:
    """float[V] -> the token's log probability, and those of the `count` likeliest."""
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.topk(min(count, len(logprobs)))
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return token, float(logprobs[token]), pairs
