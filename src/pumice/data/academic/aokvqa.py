"""A-OKVQA: multiple choice, every question asked several times with its choices moved on."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import Field

from pumice.core.errors import DataError
from pumice.data.academic.base import Row, Task, clean, image_name, take
from pumice.data.academic.questions import Asked, QuestionRules, question_rows
from pumice.processing.response_formats import choice_lines


class AokvqaRules(QuestionRules):
    """The rules of A-OKVQA."""

    format: str = Field("letter", description="The response format that is asked for; none: none.")
    rotations: int | None = Field(
        None,
        ge=1,
        description="Rows an image; in each the choices are moved on by one. null: one for each "
        "choice.",
    )


class _Problem(NamedTuple):
    image: str
    name: str
    question: str
    choices: list[str]
    right: int


def aokvqa_rows(task: Task[AokvqaRules]) -> Iterator[Row]:
    """For each rotation one row an image; rotation r shows choice (i + r) mod k as number i."""
    problems = [
        _problem(entry, f"{file}, question {number}", task)
        for file, entries in task.official.lists("aokvqa_v1p0_train.json")
        for number, entry in enumerate(entries)
    ]
    most = max((len(problem.choices) for problem in problems), default=0)
    for rotation in range(task.rules.rotations or most):
        # A question with fewer choices is not asked twice in the same order.
        turned = [p for p in problems if rotation < len(p.choices)]
        for row in question_rows((_asked(p, rotation) for p in turned), task.rules, task.tally):
            yield {**row, "id": f"{row['id']}-r{rotation}"}


def _problem(entry: Any, where: str, task: Task[AokvqaRules]) -> _Problem:
    task.tally.read += 1
    image_id = take(entry, "image_id", int, where)
    choices = [clean(choice) for choice in take(entry, "choices", list, where)]
    right = take(entry, "correct_choice_idx", int, where)
    if not 0 <= right < len(choices):
        raise DataError(
            f"{where}: 'correct_choice_idx' is {right} of {len(choices)} choices; 0 to "
            f"{len(choices) - 1} are allowed. Correct it, or take the official file."
        )
    return _Problem(
        image_name(task.rules.image, image_id=image_id),
        take(entry, "question_id", str, where),
        clean(take(entry, "question", str, where)),
        choices,
        right,
    )


def _asked(problem: _Problem, rotation: int) -> Asked:
    count = len(problem.choices)
    turned = problem.choices[rotation:] + problem.choices[:rotation]
    letter = string.ascii_uppercase[(problem.right - rotation) % count]
    lines = "\n".join([problem.question, *choice_lines(turned)]) if problem.question else ""
    return Asked(problem.image, problem.name, lines, letter)
