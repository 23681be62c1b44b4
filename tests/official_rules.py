"""The published rules a second time, written from their description alone and in another manner.

Slow and plain on purpose: loops instead of tables, counts instead of sums over names. Nothing is
taken from pumice but the official table of contractions, which is data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

from pumice.eval.answers import CONTRACTIONS

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# --- VQA: three processors -----------------------------------------------------------------------


def white(text: str) -> str:
    return "".join(" " if letter in "\n\t" else letter for letter in text).strip()


def punctuation(text: str) -> str:
    digits_around_comma = any(
        text[n] == "," and text[n - 1].isdecimal() and text[n + 1].isdecimal()
        for n in range(1, len(text) - 1)
    )
    out = []
    for letter in text:
        if letter not in MARKS:
            out.append(letter)
        elif not (digits_around_comma or letter + " " in text or " " + letter in text):
            out.append(" ")
    kept, gone = [], 0
    for place, letter in enumerate(out):
        before_digit = place + 1 < len(out) and out[place + 1].isdecimal()
        if letter == "." and not before_digit and gone < 32:
            gone += 1
        else:
            kept.append(letter)
    return "".join(kept)


def words(text: str) -> str:
    out = []
    for word in text.lower().split():
        if word in NUMBERS:
            word = str(NUMBERS.index(word))
        elif word == "none":
            word = "0"
        if word in ("a", "an", "the"):
            continue
        out.append(CONTRACTIONS[word] if word in CONTRACTIONS else word)
    return " ".join(out)


def vqa(text: str) -> str:
    return words(punctuation(white(text)))


def m4c(text: str) -> str:
    text = re.sub("[,?]", "", text.lower())
    return vqa(" 's".join(text.split("'s")).strip())


def left_out_in_turn(said: str, truths: Sequence[str]) -> Fraction:
    total = Fraction(0)
    for left_out in range(len(truths)):
        others = [truth for n, truth in enumerate(truths) if n != left_out]
        total += min(Fraction(1), Fraction(others.count(said), 3))
    return total / len(truths)


def score_2021(said: str, truths: Sequence[str]) -> Fraction:
    said, truths = white(said), [white(truth) for truth in truths]
    if len(set(truths)) > 1:
        said, truths = words(punctuation(said)), [words(punctuation(truth)) for truth in truths]
    return left_out_in_turn(said, truths)


def score_before_2021(said: str, truths: Sequence[str]) -> Fraction:
    if len(set(truths)) > 1:
        truths = [punctuation(truth) for truth in truths]
    return left_out_in_turn(vqa(said), truths)


def score_always(said: str, truths: Sequence[str]) -> Fraction:
    return left_out_in_turn(vqa(said), [vqa(truth) for truth in truths])


def score_m4c(said: str, truths: Sequence[str]) -> Fraction:
    return left_out_in_turn(m4c(said), [m4c(truth) for truth in truths])


VQA_SCORES: dict[str, Callable[[str, Sequence[str]], Fraction]] = {
    "2021": score_2021,
    "before-2021": score_before_2021,
    "always": score_always,
    "m4c": score_m4c,
}

# --- yes and no ----------------------------------------------------------------------------------


def pope(text: str) -> str:
    sentence = text[: text.index(".")] if "." in text else text
    said = sentence.replace(",", "").split(" ")
    return "no" if "No" in said or "not" in said or "no" in said else "yes"


def pope_f1(told: Iterable[tuple[str, str]]) -> float:
    """F1 in percent of (answer, label) pairs."""
    pairs = [(pope(text), label) for text, label in told]
    hits = pairs.count(("yes", "yes"))
    if not hits:
        return 0.0
    precision = hits / sum(said == "yes" for said, _ in pairs)
    recall = hits / sum(label == "yes" for _, label in pairs)
    return 100 * 2 * precision * recall / (precision + recall)


def mme(text: str) -> str:
    line = (text + "\n").lower()
    if line in ("yes", "no"):
        return line
    for word in ("yes", "no"):
        if word in line[:4]:
            return word
    return "other"


def mme_score(told: Sequence[tuple[str, str]]) -> float:
    """acc + acc+ of one subtask: (answer, label) pairs, two by two about one image."""
    right = [mme(text) == label.lower() for text, label in told]
    both = [first and second for first, second in zip(right[::2], right[1::2], strict=True)]
    return 100 * sum(right) / len(right) + 100 * sum(both) / len(both)


# --- letters -------------------------------------------------------------------------------------


def scienceqa(text: str, choices: int) -> str | None:
    options = "ABCDE"
    if len(text) == 1 and text in options:
        found = text
    elif len(text) >= 3 and text[0] in options and text[1] == "." and text[2] == " ":
        found = text[0]
    else:
        # "The answer is ", a capital of A to Z, and any character but a line break.
        hits = []
        rest = text
        while "The answer is " in rest:
            rest = rest.split("The answer is ", 1)[1]
            if len(rest) >= 2 and "A" <= rest[0] <= "Z" and rest[1] != "\n":
                hits.append(rest[0])
                rest = rest[2:]  # that character is used up, even where another hit would begin
        if len(hits) != 1:
            return None
        found = hits[0]
    return found if found in options[:choices] else None


def gqa(text: str) -> str:
    while text.endswith("."):
        text = text[:-1]
    return text.lower()


def seed(text: str, truth: str) -> bool:
    return text == truth


def option_text(answer: str, options: Mapping[str, str]) -> str | None:
    inside = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return inside[0] if len(inside) == 1 else None


def mmbench_2023(answer: str, options: Mapping[str, str]) -> str | None:
    said = answer.split()
    bare = [letter for letter in "ABCDE" if letter in said]
    if len(bare) == 1 and ("A" not in said or len(said) <= 3):
        return bare[0]
    for form in ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.",
                 ":{})", ":{})."):  # fmt: skip
        found = [letter for letter in "ABCDE" if form.format(letter) in said]
        if len(found) == 1:
            return found[0]
    return option_text(answer, options)


def mmbench_now(answer: str, options: Mapping[str, str]) -> str | None:
    plain = "".join(" " if letter in ".()[],:;!*#{}" else letter for letter in answer)
    said = plain.split()
    letters = [letter for letter in options if letter in said]
    if len(letters) == 1 and letters[0] in (said[-4:] if letters[0] not in said[:-4] else []):
        return letters[0]
    if not letters and "Z" in said:
        return "Z"
    marked = re.search(r"answer\s+is\s+\**([a-d])\**", answer, re.IGNORECASE)
    if marked and marked.group(1).upper() in options:
        return marked.group(1).upper()
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    return option_text(answer, options)


def circular(rows: Iterable[tuple[int, bool]]) -> float:
    """Percent of questions right in every order: (index, right) of each row."""
    groups: dict[int, list[bool]] = {}
    for index, right in rows:
        groups.setdefault(index % 1_000_000, []).append(right)
    return 100 * sum(all(group) for group in groups.values()) / len(groups)
