"""How MMBench finds an option's letter in a free answer: its code of 2023, and its code now.

Both give up on what they cannot read and leave it to a language model; here such an answer stays
unread. Full-width letters and brackets are unread in both. A good sixth of answers made to be hard
are read differently by the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from pumice.core.registry import Registry

Options = Mapping[str, str]
REFUSED = "Z"
"""No option: the answer refuses, which is wrong whatever the truth."""

_LETTERS_2023 = "ABCDE"
# What stands before and after a letter, tried in this order.
_AROUND_2023 = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""),
    (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_MOST_WORDS = 3
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 5
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILED = "Failed to obtain answer via API"
_ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def letter_2023(answer: str, options: Options) -> str | None:
    """The rule of the paper's time. `options` are the options by their letter."""
    if _API_FAILED not in answer and (letter := _letter_2023(answer.split())):
        return letter
    return _only_option_in(answer.lower(), options)


def letter_now(answer: str, options: Options) -> str | None:
    """The rule of VLMEvalKit as of 2026; REFUSED for a refusal."""
    if _API_FAILED not in answer and (letter := _letter_now(answer, options)):
        return letter
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    return _only_option_in(answer.lower(), options)


def _letter_2023(words: list[str]) -> str | None:
    # E is looked for although no question has it.
    bare = [letter for letter in _LETTERS_2023 if letter in words]
    # "A" among more than three words may be the article, and then no bare letter is trusted.
    if len(bare) == 1 and not ("A" in words and len(words) > _MOST_WORDS):
        return bare[0]
    for before, after in _AROUND_2023:
        dressed = [letter for letter in _LETTERS_2023 if f"{before}{letter}{after}" in words]
        if len(dressed) == 1:
            return dressed[0]
    return None


def _letter_now(answer: str, options: Options) -> str | None:
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    words = answer.translate(_MARKS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - _LAST_WORDS:
        return found[0]
    if not found and REFUSED in words:
        return REFUSED
    said = _ANSWER_IS.search(answer)
    letter = said.group(1).upper() if said else None
    return letter if letter in options else None


def _only_option_in(answer: str, options: Options) -> str | None:
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else None


LETTER_RULES: Registry[Callable[[str, Options], str | None]] = Registry(
    "letter rule", {"2023": letter_2023, "now": letter_now}
)
