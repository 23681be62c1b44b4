"""Why a generated conversation is not kept. Each rule gives a reason, or None."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pumice.core.errors import PumiceError
from pumice.data.engine_prompts import Kind, Pair
from pumice.data.near_texts import nearness
from pumice.data.scripts import read_scripts, script_share

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
NEAR = 0.8
"""The share of three-word runs from which on two texts are taken for one."""
_SCRIPT = "script:"
_SHARED = 0.9
"""The share of a long answer's different words that its question may hold."""


def fault_of(kind: Kind, pairs: Sequence[Pair], language: str, near: float = NEAR) -> str | None:
    """The first rule that a conversation breaks, as `name: what was found`.

    refusal | mention | count | length | duplicate_question | near_question | leak | language
    """
    for says in (says for _, says in pairs):
        if found := _REFUSAL.search(says):
            return f"refusal: {found[0]!r}"
    for text in (text for pair in pairs for text in pair):
        if found := _MENTION.search(text):
            return f"mention: {found[0]!r}"
    if not kind.pairs[0] <= len(pairs) <= kind.pairs[1]:
        return f"count: {len(pairs)} questions, allowed {kind.pairs[0]} to {kind.pairs[1]}"
    if fault := _fault_of_a_pair(kind, pairs, near):
        return fault
    if language.startswith(_SCRIPT):
        return _fault_of_script(pairs, read_scripts(language.removeprefix(_SCRIPT)))
    return _fault_of_language(pairs) if language == "en" else None


def check_language(language: str) -> None:
    """`en`, `any` or `script:NAME,...`; anything else is an error."""
    if language.startswith(_SCRIPT):
        read_scripts(language.removeprefix(_SCRIPT))
    elif language not in ("en", "any"):
        raise PumiceError(
            f"--language is {language!r}; allowed: en, any (no check), or {_SCRIPT}NAME for the "
            f"letters that answers are written in, such as {_SCRIPT}han or {_SCRIPT}latin,greek."
        )


def _fault_of_script(pairs: Sequence[Pair], scripts: tuple[str, ...]) -> str | None:
    for _, says in pairs:
        if (share := script_share(says, scripts)) < 1 - _MOST_FOREIGN:
            return f"language: {share:.0%} of the letters of {says!r} are {' or '.join(scripts)}"
    return None


def _fault_of_language(pairs: Sequence[Pair]) -> str | None:
    for _, says in pairs:
        if not is_english(says, _LEAST_IN_ONE):
            return f"language: {says!r} is not English"
    if not is_english(" ".join(says for _, says in pairs)):
        return "language: the answers together are not English"
    return None


def _fault_of_a_pair(kind: Kind, pairs: Sequence[Pair], near: float) -> str | None:
    asked: dict[str, str] = {}
    for asks, says in pairs:
        words = len(says.split())
        if not kind.words[0] <= words <= kind.words[1]:
            return f"length: {words} words, allowed {kind.words[0]} to {kind.words[1]}"
        if (name := plain(asks)) in asked:
            return f"duplicate_question: {asks!r}"
        for before in asked.values():
            if near < 1 and nearness(before, asks) >= near:
                return f"near_question: {asks!r} after {before!r}"
        asked[name] = asks
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
    if script_share(text, ("latin",)) < 1 - _MOST_FOREIGN:
        return False
    words = _WORD.findall(text.lower())
    if len(words) < _ENOUGH_WORDS:
        return True
    return sum(word in _ENGLISH for word in words) >= least * len(words)
