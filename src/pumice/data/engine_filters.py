"""Why a generated conversation is not kept. Each rule gives a reason, or None."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pumice.data.engine_prompts import Kind, Pair

_REFUSAL = re.compile(
    r"\b(i'?m sorry|i am sorry|i apologi[sz]e|i (can'?t|cannot|am unable to|am not able to) "
    r"(help|assist|see|view|provide|answer|fulfil)|as an ai\b|language model)",
    re.IGNORECASE,
)
_MENTION = re.compile(
    r"\b((the|these|given|provided|first|each|image) captions?|captions? (mention|say|state|"
    r"describe)s?|bounding box(es)?|coordinates?|(the|given|provided) (sentences|information "
    r"provided|text provided)|provided (description|information|text)|(as|is) described in the)\b"
    r"|\[\s*[01]?\.\d+\s*,",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_ARTICLES = frozenset(("a", "an", "the"))
_ENGLISH = frozenset(
    "a an and are as at be by for from has have he her his i in is it its of on or she some that "
    "the their there they this to was were what which who with you yes no can not".split()
)
_ENOUGH_WORDS = 8
# Of all answers together, and of one: a good caption may have a single small word in ten.
_LEAST_ENGLISH, _LEAST_IN_ONE = 0.12, 0.05
_MOST_FOREIGN = 0.1
_SHARED = 0.9
"""The share of a long answer's different words that its question may hold."""


def fault_of(kind: Kind, pairs: Sequence[Pair], language: str) -> str | None:
    """The first rule that a conversation breaks, as `name: what was found`.

    refusal | mention | count | length | duplicate_question | leak | language
    """
    for says in (says for _, says in pairs):
        if found := _REFUSAL.search(says):
            return f"refusal: {found[0]!r}"
    for text in (text for pair in pairs for text in pair):
        if found := _MENTION.search(text):
            return f"mention: {found[0]!r}"
    if not kind.pairs[0] <= len(pairs) <= kind.pairs[1]:
        return f"count: {len(pairs)} questions, allowed {kind.pairs[0]} to {kind.pairs[1]}"
    if fault := _fault_of_a_pair(kind, pairs):
        return fault
    return _fault_of_language(pairs) if language == "en" else None


def _fault_of_language(pairs: Sequence[Pair]) -> str | None:
    for _, says in pairs:
        if not is_english(says, _LEAST_IN_ONE):
            return f"language: {says!r} is not English"
    if not is_english(" ".join(says for _, says in pairs)):
        return "language: the answers together are not English"
    return None


def _fault_of_a_pair(kind: Kind, pairs: Sequence[Pair]) -> str | None:
    asked: set[str] = set()
    for asks, says in pairs:
        words = len(says.split())
        if not kind.words[0] <= words <= kind.words[1]:
            return f"length: {words} words, allowed {kind.words[0]} to {kind.words[1]}"
        if (name := plain(asks)) in asked:
            return f"duplicate_question: {asks!r}"
        asked.add(name)
        if leaks(asks, says):
            return f"leak: {asks!r} holds {says!r}"
    return None


def plain(text: str) -> str:
    """A text without case, punctuation and spacing, to compare by."""
    return " ".join(_WORD.findall(text.lower()))


def leaks(question: str, answer: str) -> bool:
    """Whether a question holds its answer.

    A yes or no confirms its question and a choice ("... or ...") must name its answer: no leaks.
    """
    asks, says = (
        [word for word in _WORD.findall(text.lower()) if word not in _ARTICLES]
        for text in (question, answer)
    )
    if not says or says[0] in ("yes", "no") or "or" in asks:
        return False
    if len(says) <= 3:
        return any(asks[at : at + len(says)] == says for at in range(len(asks)))
    words = set(says)
    return len(words & set(asks)) >= _SHARED * len(words)


def is_english(text: str, least: float = _LEAST_ENGLISH) -> bool:
    """Latin letters and, in texts long enough to tell, the small words of English."""
    letters = [letter for letter in text if letter.isalpha()]
    foreign = sum("LATIN" not in unicodedata.name(letter, "") for letter in letters)
    if foreign > _MOST_FOREIGN * max(len(letters), 1):
        return False
    words = _WORD.findall(text.lower())
    if len(words) < _ENOUGH_WORDS:
        return True
    return sum(word in _ENGLISH for word in words) >= least * len(words)
