"""ScienceQA: school questions with a lecture and a solution, as LLaVA writes them (QCM-LEA)."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from pumice.core.errors import DataError
from pumice.data.academic.base import Row, Rules, Task, image_name, llava_row, take
from pumice.data.row_layouts import SLOT
from pumice.processing.response_formats import letter_prompt


class ScienceQaRules(Rules):
    """The rules of ScienceQA."""

    image: str = Field(
        "{split}/{problem}/{image}", description="How a row names its image, below --images."
    )
    split: str = Field("train", description="A name of pid_splits.json.")
    style: Literal["lea", "letter"] = Field(
        "lea",
        description="lea: context, options in one line, answered with lecture, solution and "
        "letter. letter: as LLaVA-1.5 asks, answered with the letter.",
    )


def scienceqa_rows(task: Task[ScienceQaRules]) -> Iterator[Row]:
    """One row a problem of the split, in its order."""
    rules = task.rules
    split_file, splits = task.official.with_key(rules.split, "pid_splits.json")
    names = take(splits, rules.split, list, str(split_file))
    others = [(f, c) for f, c in task.official.mappings("problems.json") if f != split_file]
    if len(others) != 1:
        raise DataError(
            f"{len(others)} files stand beside {split_file}; exactly one must, problems.json. "
            f"Give it with --annotations."
        )
    file, problems = others[0]
    task.tally.read += len(problems)
    task.tally.dropped["problem of another split"] += len(problems) - len(names)
    for name in names:
        if name not in problems:
            raise DataError(
                f"{split_file}: problem {name} of {rules.split} is not in {file}; both files must "
                f"be of one release. Take both anew."
            )
        yield _row(str(name), problems[name], f"{file}, problem {name}", rules)


def _row(name: str, problem: Any, where: str, rules: ScienceQaRules) -> Row:
    question, hint = take(problem, "question", str, where), take(problem, "hint", str, where)
    choices, right = take(problem, "choices", list, where), take(problem, "answer", int, where)
    if not 0 <= right < len(choices):
        raise DataError(
            f"{where}: 'answer' is {right} of {len(choices)} choices; 0 to {len(choices) - 1} are "
            f"allowed. Correct it, or take the official file."
        )
    letter = string.ascii_uppercase[right]
    picture = problem.get("image")
    image = None
    if picture is not None:
        known = {"split": rules.split, "problem": name, "image": take(problem, "image", str, where)}
        image = image_name(rules.image, **known)
    if rules.style == "letter":
        return llava_row(name, image, [(letter_prompt(question, choices, hint), letter)])
    options = " ".join(
        f"({sign}) {choice}" for sign, choice in zip(string.ascii_uppercase, choices, strict=False)
    )
    asked = f"{question}\nContext: {hint.strip() or 'N/A'}\nOptions: {options}\n"
    lecture, solution = take(problem, "lecture", str, where), take(problem, "solution", str, where)
    answer = f"{lecture} {solution} The answer is {letter}."
    # Once only, so three spaces become two: that is what the published rows went through.
    asked, answer = (text.replace("  ", " ").strip() for text in (asked, answer))
    row = llava_row(name, image, [(asked, answer)])
    row["conversations"][0]["value"] = asked if image is None else f"{asked}\n{SLOT}"
    return row
