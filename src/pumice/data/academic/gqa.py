"""GQA: compositional questions about Visual Genome's pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pumice.data.academic.base import Row, Task, clean, image_name, take
from pumice.data.academic.questions import Asked, QuestionRules, question_rows


class GqaRules(QuestionRules):
    """The rules of GQA."""

    image: str = Field(
        "gqa/images/{image_id}.jpg", description="How a row names its image, below --images."
    )
    answer: Literal["answer", "fullAnswer"] = Field(
        "answer", description="The short answer, or the sentence."
    )
    balanced: bool = Field(True, description="Balanced questions only.")


def gqa_rows(task: Task[GqaRules]) -> Iterator[Row]:
    """One row an image; questions in the order of their file."""
    return question_rows(_asked(task), task.rules, task.tally)


def _asked(task: Task[GqaRules]) -> Iterator[Asked]:
    rules = task.rules
    for file, questions in task.official.mappings("train_balanced_questions.json"):
        for name, entry in questions.items():
            where = f"{file}, question {name}"
            task.tally.read += 1
            # No `take`: it is the one key whose values are true and false.
            if rules.balanced and not (isinstance(entry, dict) and entry.get("isBalanced", True)):
                task.tally.dropped["question that is not balanced"] += 1
                continue
            image = image_name(rules.image, image_id=take(entry, "imageId", str, where))
            text = clean(take(entry, "question", str, where))
            yield Asked(image, name, text, clean(take(entry, rules.answer, str, where)))
