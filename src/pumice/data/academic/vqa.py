"""VQAv2 and OK-VQA: a file of questions, a file with ten annotators' answers to each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pumice.core.errors import DataError
from pumice.data.academic.base import Row, Tally, Task, clean, image_name, take
from pumice.data.academic.questions import Asked, QuestionRules, most_frequent, question_rows


class VqaRules(QuestionRules):
    """The rules of questions with several annotators."""

    answer: Literal["most_frequent", "official"] = Field(
        "most_frequent",
        description="most_frequent: the answer of most annotators, of several the official one, "
        "else the first given. official: multiple_choice_answer as it stands.",
    )


def vqa_rows(task: Task[VqaRules]) -> Iterator[Row]:
    """One row an image; questions in the order of their file."""
    return question_rows(_asked(task), task.rules, task.tally)


def _asked(task: Task[VqaRules]) -> Iterator[Asked]:
    rules, tally = task.rules, task.tally
    asked_file, asked = task.official.with_key("questions", "..._questions.json")
    told_file, told = task.official.with_key("annotations", "..._annotations.json")
    answers = _by_question(told_file, take(told, "annotations", list, str(told_file)))
    for number, entry in enumerate(take(asked, "questions", list, str(asked_file))):
        where = f"{asked_file}, question {number}"
        tally.read += 1
        key = str(take(entry, "question_id", (int, str), where))
        text = clean(take(entry, "question", str, where))
        image_id = take(entry, "image_id", int, where)
        if key not in answers:
            tally.dropped["question without annotation"] += 1
            continue
        where_told, annotation = answers.pop(key)
        if take(annotation, "image_id", int, where_told) != image_id:
            raise DataError(
                f"{where_told}: question {key} is about image {annotation['image_id']}, and about "
                f"{image_id} in {asked_file}; the two files must be of one release. Take both anew."
            )
        answer = _answer(annotation, where_told, rules, tally)
        yield Asked(image_name(rules.image, image_id=image_id), key, text, answer)
    if answers:
        tally.read += len(answers)
        tally.dropped["annotation without question"] += len(answers)


def _by_question(file: Path, annotations: list[Any]) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    for number, entry in enumerate(annotations):
        where = f"{file}, annotation {number}"
        key = str(take(entry, "question_id", (int, str), where))
        if key in found:
            raise DataError(
                f"{where}: question {key} was answered before, in {found[key][0]}; each has one "
                f"annotation. Remove one of them."
            )
        found[key] = (where, entry)
    return found


def _answer(annotation: Any, where: str, rules: VqaRules, tally: Tally) -> str:
    official = annotation.get("multiple_choice_answer")
    if rules.answer == "official":
        return clean(take(annotation, "multiple_choice_answer", str, where))
    given = [clean(take(a, "answer", (str, int, float), where))
             for a in take(annotation, "answers", list, where)]  # fmt: skip
    answer, tie = most_frequent([text for text in given if text], official)
    tally.changed["answers drawn level; one was taken"] += tie
    return answer
