"""OCR-VQA: questions about book covers, of which LLaVA-1.5 draws 80,000 conversations."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from pumice.core.errors import DataError
from pumice.data.academic.base import Row, Task, clean, drawn, image_name, take
from pumice.data.academic.questions import Asked, QuestionRules, question_rows


class OcrVqaRules(QuestionRules):
    """The rules of OCR-VQA."""

    image: str = Field(
        "ocr_vqa/images/{image_id}.jpg",
        description="How a row names its image, below --images; LLaVA saves all as .jpg.",
    )
    split: int = Field(1, ge=1, le=3, description="1 train, 2 validation, 3 test.")
    sample: int | None = Field(
        80_000, ge=1, description="So many rows are drawn; null or fewer than that: all."
    )
    seed: int = Field(0, description="Draws the sample.")


def ocrvqa_rows(task: Task[OcrVqaRules]) -> Iterator[Row]:
    """One row a cover, drawn from those of the split."""
    rows = list(question_rows(_asked(task), task.rules, task.tally))
    count = task.rules.sample
    if count is None or count >= len(rows):
        yield from rows
        return
    task.tally.dropped[f"row not among the {count} drawn"] += len(rows) - count
    yield from drawn(rows, count, "ocrvqa", task.rules.seed)


def _asked(task: Task[OcrVqaRules]) -> Iterator[Asked]:
    for file, covers in task.official.mappings("dataset.json"):
        for name, cover in covers.items():
            where = f"{file}, image {name}"
            questions = take(cover, "questions", list, where)
            answers = take(cover, "answers", list, where)
            task.tally.read += len(questions)
            if len(questions) != len(answers):
                raise DataError(
                    f"{where}: {len(questions)} questions and {len(answers)} answers; as many of "
                    f"both are needed. Correct the entry, or take the official file."
                )
            if take(cover, "split", int, where) != task.rules.split:
                task.tally.dropped["question of another split"] += len(questions)
                continue
            image = image_name(task.rules.image, image_id=name)
            for number, (text, answer) in enumerate(zip(questions, answers, strict=True)):
                yield Asked(image, f"{name}-{number}", clean(text), clean(answer))
