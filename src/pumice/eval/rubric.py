"""Scoring free answers without any judge, by their words.

For runs without a key or a network: it moves when a model gets worse, and is comparable with
nothing else. It cannot tell a paraphrase from a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

VERSION = 1
AND, OR = "<AND>", "<OR>"
_TOKEN = re.compile(r"-?\d+(?:[.,]\d+)*|[^\W\d_]+")
_COMMON = frozenset(
    "a an and are as at be been but by can do does for from had has have he her his i if in into "
    "is it its of on or she so some than that the their them there these they this those to was we "
    "were what when where which while who will with you your".split()
)
# A truth of more words than this need not be said word for word.
_PHRASE = 3


def overlap(text: str, truth: str) -> float:
    """F1 of the words of both that carry meaning, in 0..1."""
    said, true = _content(text), _content(truth)
    total = len(said) + len(true)
    return 2 * len(said & true) / total if total else 1.0


def keyword_share(text: str, truth: str) -> float:
    """How much of what MM-Vet's truth asks for is said, in 0..1.

    "a<AND>b" asks for both, "a<OR>b" for one of them. A short part must be said word for word, of
    a longer one the share of its words counts.
    """
    said = _tokens(text)
    return max(
        sum(_part(said, part) for part in option.split(AND)) / len(option.split(AND))
        for option in truth.split(OR)
    )


def plain_truth(truth: str) -> str:
    """An answer that MM-Vet's truth asks for, in plain words."""
    return " and ".join(part.strip() for part in truth.split(OR)[0].split(AND))


def _part(said: Sequence[str], part: str) -> float:
    asked = _tokens(part)
    size = len(asked)
    if any(said[start : start + size] == asked for start in range(len(said) - size + 1)):
        return 1.0
    if size <= _PHRASE:
        return 0.0
    words = _content(part)
    return len(words & set(said)) / len(words)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.casefold())


def _content(text: str) -> set[str]:
    """The words that carry meaning; all of them where none does."""
    words = set(_tokens(text))
    return words - _COMMON or words
