"""Texts that nearly repeat an earlier one, by the runs of three words that both hold.

How near two texts are is Jaccard's measure of their sets of runs. The search is exact: two sets
that reach the measure t share an element among the first n - ceil(t n) + 1 of each, in any order
that both are put in. So only those are looked up (prefix filtering: Chaudhuri et al. 2006, Bayardo
et al. 2007).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from pumice.data.scripts import UNSPACED, script_of

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_RUN = 3
# Less than the rounding of t * n can hide.
_ROUNDING = 1e-9

_Runs = np.ndarray[tuple[int], np.dtype[np.uint64]]


def words_of(text: str) -> list[str]:
    """Words without case and punctuation; in scripts without spaces each letter is one."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if script_of(word[0]) in UNSPACED:
            found += word
        else:
            found.append(word)
    return found


class NearTexts:
    """Texts that were kept, with names, and which of them a new one nearly repeats."""

    def __init__(self, least: float) -> None:
        self.least = least
        self._names: list[str] = []
        self._runs: list[_Runs] = []
        self._by_run: defaultdict[int, list[int]] = defaultdict(list)

    def find(self, text: str) -> tuple[str, float] | None:
        """The name of the nearest kept text and its measure, if that reaches `least`.

        Of several equally near ones it is the first that was kept.
        """
        runs, first = self._prepared(text)
        near = {place for run in first for place in self._by_run.get(run, ())}
        best: tuple[str, float] | None = None
        for place in sorted(near):
            measure = _measure(runs, self._runs[place])
            if measure >= self.least - _ROUNDING and (best is None or measure > best[1]):
                best = self._names[place], measure
        return best

    def keep(self, name: str, text: str) -> None:
        """From now on `text` is found."""
        runs, first = self._prepared(text)
        for run in first:
            self._by_run[run].append(len(self._names))
        self._names.append(name)
        self._runs.append(runs)

    def _prepared(self, text: str) -> tuple[_Runs, list[int]]:
        """All runs of a text, and those to look up: long ones, which few texts hold."""
        runs = sorted(_runs(words_of(text)), key=lambda run: (-len(run), run))
        count = len(runs) - math.ceil(self.least * len(runs) - _ROUNDING) + 1
        codes = [_code(run) for run in runs]
        return np.sort(np.array(codes, dtype=np.uint64)), codes[:count]


def nearness(one: str, other: str) -> float:
    """The share of their different runs that both texts hold, 0 to 1."""
    first, second = _runs(words_of(one)), _runs(words_of(other))
    return len(first & second) / len(first | second)


def _runs(words: Sequence[str]) -> set[str]:
    """A text of fewer words is one run."""
    count = max(len(words) - _RUN + 1, 1)
    return {" ".join(words[start : start + _RUN]) for start in range(count)}


def _code(run: str) -> int:
    """Eight bytes instead of the text: a million rows fit into memory."""
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big")


def _measure(one: _Runs, other: _Runs) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
