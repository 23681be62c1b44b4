"""Questions with a short answer: merging those of an image, and where the format prompt stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from pumice.data.academic.base import (
    COCO_IMAGE,
    Row,
    Rules,
    Tally,
    grouped,
    llava_row,
    segments,
    stem,
)
from pumice.processing.response_formats import FORMATS, with_format


class QuestionRules(Rules):
    """The rules of every set of questions."""

    image: str = Field(COCO_IMAGE, description="How a row names its image, below --images.")
    format: str = Field("short", description="The response format that is asked for; none: none.")
    format_place: Literal["first", "every"] = Field(
        "first", description="Whether the first or every question of a row asks for the format."
    )
    merge: bool = Field(True, description="All questions of an image in one row, turn by turn.")
    rounds: int | None = Field(
        None, ge=1, description="So many questions a row at most; an image with more has more rows."
    )
    capitalise: bool = Field(
        True, description="Answers begin with a capital, as those of LLaVA-1.5 do."
    )


class Asked(NamedTuple):
    """A question about an image, its answer, and the name of a row that holds it alone."""

    image: str
    name: str
    question: str
    answer: str


def question_rows(asked: Iterable[Asked], rules: QuestionRules, tally: Tally) -> Iterator[Row]:
    """Rows of questions; one without text or answer is dropped and counted."""
    FORMATS[rules.format]
    kept = _answered(asked, tally)
    groups = (
        [(stem(image), some) for image, some in grouped((a.image, a) for a in kept).items()]
        if rules.merge
        else [(one.name, [one]) for one in kept]
    )
    for name, some in groups:
        pieces = segments(some, rules.rounds)
        for number, piece in enumerate(pieces, start=1):
            row_name = name if len(pieces) == 1 else f"{name}-{number}"
            yield llava_row(row_name, piece[0].image, list(_rounds(piece, rules)))


def _answered(asked: Iterable[Asked], tally: Tally) -> Iterator[Asked]:
    for one in asked:
        if not one.question:
            tally.dropped["question without text"] += 1
        elif not one.answer:
            tally.dropped["question without answer"] += 1
        else:
            yield one


def _rounds(asked: Sequence[Asked], rules: QuestionRules) -> Iterator[tuple[str, str]]:
    for number, one in enumerate(asked):
        told = number == 0 or rules.format_place == "every"
        question = with_format(one.question, rules.format) if told else one.question
        answer = one.answer[:1].upper() + one.answer[1:] if rules.capitalise else one.answer
        yield question, answer


def most_frequent(answers: Sequence[str], official: str | None = None) -> tuple[str, bool]:
    """The answer that most annotators gave, and whether others were given as often.

    Of several, the official choice; where the set names none, the one that was given first.
    """
    counts = Counter(answers)
    most = max(counts.values(), default=0)
    first = [answer for answer, count in counts.items() if count == most]
    if not first:
        return "", False
    return (official if official in first else first[0]), len(first) > 1
