"""ScienceQA (test): multiple choice answered with a letter, with and without an image.

Official files: problems.json, pid_splits.json; images <split>/<id>/image.png. Without them
LLaVA's llava_test_CQM-A.json will do, which holds the test split as it was asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json
from pumice.eval.benchmark import (
    Answer,
    Benchmark,
    Floats,
    Item,
    Matching,
    Row,
    Sums,
    percent,
)
from pumice.eval.locate import ImageFinder, find_file, find_file_if_any, require, texts_in
from pumice.processing.response_formats import LETTER, letter_prompt, with_format

LETTERS = "ABCDE"
SPLIT = "test"
LLAVA_QUESTIONS = "llava_test_CQM-A.json"
# The final dot is any character, as in the official code: "The answer is C" at the very end of an
# answer is not found, "The answer is C," is.
_OPTION = re.compile(r"^([A-E])\. ", re.MULTILINE)
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


class ScienceQA(Benchmark):
    """Accuracy over all questions, and over those with an image (the number LLaVA-1.5 reports)."""

    name = "scienceqa"
    title = "ScienceQA"
    headline = "img_accuracy"
    paper = True
    max_new_tokens = 1024
    missing_is_wrong = True
    missing_fate = "count as wrong in accuracy, and not at all in img_accuracy"

    def load(self, data_dir: Path) -> list[Item]:
        """The items of the test split; `truth` is the right letter."""
        find_image = ImageFinder(data_dir, self.name)
        problems_file = find_file_if_any(data_dir, self.name, ["problems.json"])
        if problems_file is None:
            file = find_file(data_dir, self.name, [LLAVA_QUESTIONS, "problems.json"])
            return [_asked_item(row, file, find_image) for row in read_json(file)]
        problems = read_json(problems_file)
        splits_file = find_file(data_dir, self.name, ["pid_splits.json"])
        items = []
        splits = read_json(splits_file)
        require(splits, (SPLIT,), str(splits_file))
        for name in splits[SPLIT]:
            if str(name) not in problems:
                raise DataError(
                    f"scienceqa: problem {name} of {splits_file} is not in {problems_file}; take "
                    f"both files from the same release."
                )
            items.append(_item(str(name), problems[str(name)], problems_file, find_image))
        return items

    def parse(self, text: str, item: Item) -> str | None:
        """A bare letter, "X. ...", or exactly one "The answer is X."; else None."""
        if text in tuple(LETTERS):
            letter = text
        elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
            letter = text[0]
        elif len(hits := _ANSWER_IS.findall(text)) == 1:
            letter = hits[0]
        else:
            return None
        return letter if letter in item.extra["letters"] else None

    def score(self, parsed: str | None, item: Item) -> float:
        """1 for the right letter; an answer without a letter is wrong, nothing is guessed."""
        return float(parsed == item.truth)

    def tally(self, row: Row) -> dict[str, float]:
        """Counts of right and all, the same for questions asked with an image."""
        score = row.prediction.score or 0.0
        sums = {"n": 1.0, "right": score}
        # As officially: a question without an answer is wrong in the total, and not in the
        # image part, which is made of the recorded prompts.
        recorded = row.prediction.extra.get("prompt")
        missing = row.prediction.extra.get("missing", False)
        with_image = row.item.image is not None if recorded is None else "<image>" in recorded
        if with_image and not missing:
            sums |= {"n/image": 1.0, "right/image": score}
        return sums

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Two accuracies, each float[...]; without image questions the second is nan."""
        return {
            "img_accuracy": percent(sums["right/image"], sums["n/image"]),
            "accuracy": percent(sums["right"], sums["n"]),
        }

    def slices(self, item: Item) -> tuple[str, ...]:
        """The subject, and whether the question has an image."""
        kind = "image" if item.image is not None else "text"
        return (*super().slices(item), f"modality={kind}")

    def match(self, answers: Sequence[Answer], items: Sequence[Item], source: str) -> Matching:
        """By id. Prompts that never show an image say nothing about it and are left out."""
        if not any("<image>" in (answer.prompt or "") for answer in answers):
            answers = [replace(answer, prompt=None) for answer in answers]
        return super().match(answers, items, source)

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric as LLaVA-1.5 uses them."""
        return {
            "prompt": f"[Context: {{hint}}\n]{{question}}\nA. {{choice}}\nB. ...\n{LETTER}",
            "parser": "llava eval_science_qa: letter | 'X. ' | one 'The answer is X.'; no guess",
            "metric": "accuracy, percent",
            "split": SPLIT,
        }


def _item(name: str, problem: dict[str, Any], file: Path, find_image: ImageFinder) -> Item:
    where = f"{file}, problem {name}"
    # None and "" both say that there is no hint or no image.
    problem = {name: value for name, value in problem.items() if value is not None}
    told = [key for key in ("hint", "image", "subject") if key in problem]
    names = ("question", "choices", "answer", *told)
    require(problem, names, where, texts=("question", *told), ids=("answer",))
    choices = texts_in(problem["choices"], "its choices", where)
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= problem["answer"] < len(choices):
        raise DataError(
            f"scienceqa: problem {name} of {file} has {len(choices)} choices and answer "
            f"{problem['answer']}; 2 to {len(LETTERS)} choices and the index of one are allowed."
        )
    image = problem.get("image")
    return Item(
        id=name,
        image=find_image(f"{SPLIT}/{name}/{image}", f"{name}/{image}") if image else None,
        prompt=letter_prompt(problem["question"], choices, problem.get("hint") or None),
        truth=LETTERS[problem["answer"]],
        group=name,
        category=problem.get("subject", ""),
        extra={"letters": LETTERS[: len(choices)], "choices": choices},
    )


def _asked_item(row: dict[str, Any], file: Path, find_image: ImageFinder) -> Item:
    require(row, ("id", "conversations"), f"{file}, question {row.get('id')}")
    asked, answer = (turn["value"] for turn in row["conversations"])
    text = asked.replace("<image>", "").strip()
    # The options stand at the end; a line of the question that looks like one comes before "A.".
    letters = "".join(_OPTION.findall(text[text.rindex("\nA. ") :]))
    image = row.get("image")
    return Item(
        id=row["id"],
        image=find_image(f"{SPLIT}/{image}", image) if image else None,
        prompt=with_format(text, "letter"),
        truth=answer,
        group=row["id"],
        extra={"letters": letters},
    )
