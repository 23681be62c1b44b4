"""GQA (testdev, balanced): compositional questions, right only when the answer is the very string.

Official files: testdev_balanced_questions.json, or testdev_all_questions.json, whose balanced
questions are taken; images/<imageId>.jpg.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pumice.core.errors import DataError
from pumice.core.files import read_json
from pumice.eval.benchmark import PROMPTS, Benchmark, Floats, Item, Row, Sums, percent, ratio
from pumice.eval.locate import ImageFinder, find_file, require

FILES = ("{split}_balanced_questions.json", "{split}_all_questions.json")
_NEEDED = ("question", "imageId", "answer", "isBalanced", "types", "groups")
# xGQA, which has no images of its own, finds them where GQA's own folder is.
_IMAGES = ("", "images/", "data/images/", "gqa/images/", "gqa/data/images/")
# Between a group's name and an answer, either of which may hold a slash.
_BY = "\t"


class GQA(Benchmark):
    """Accuracy, its binary and open parts, and how far answers are distributed unlike the truth."""

    name = "gqa"
    title = "GQA"
    headline = "accuracy"
    paper = True
    choices = {"split": ("testdev", "val"), "prompt": PROMPTS}

    def load(self, data_dir: Path) -> list[Item]:
        """One item per balanced question; `truth` is the answer."""
        names = self.files()
        file = find_file(data_dir, self.name, names)
        questions = read_json(file)
        find_image = ImageFinder(data_dir, self.name)
        items = []
        for name, question in questions.items():
            where = f"{file}, question {name}"
            require(question, _NEEDED, where, texts=("question", "imageId", "answer"))
            kinds = ("structural", "semantic")
            require(question["types"], kinds, f"{where}, types", texts=kinds)
            require(question["groups"], ("global",), f"{where}, groups")
            if question["isBalanced"]:
                items.append(self._item(name, question, find_image))
        if not items:
            raise DataError(
                f"{self.name}: {file} has no balanced questions, and only those are scored. Take "
                f"{names[0]} from the official download."
            )
        return items

    def _item(self, name: str, question: dict[str, Any], find_image: ImageFinder) -> Item:
        structural = question["types"]["structural"]
        image = f"{question['imageId']}.jpg"
        return Item(
            id=name,
            image=find_image(*(f"{place}{image}" for place in _IMAGES)),
            prompt=self.prompt(question["question"]),
            truth=question["answer"],
            group=question["imageId"],
            category=structural,
            extra={
                "part": "open" if structural == "query" else "binary",
                "semantic": question["types"]["semantic"],
                "group": question["groups"]["global"],
            },
        )

    def files(self) -> list[str]:
        """Where the questions may lie, the usual name first."""
        names = [file.format(split=self.chosen["split"]) for file in FILES]
        folders = ("", "data/", "questions1.2/", "questions/")
        return [f"{place}{name}" for name in names for place in folders]

    def parse(self, text: str, item: Item) -> str | None:
        """LLaVA's: full stops at the end go, letters become small; nothing else is forgiven."""
        return text.rstrip(".").lower() or None

    def score(self, parsed: str | None, item: Item) -> float:
        """1 when it is the answer, letter for letter."""
        return float(parsed == item.truth)

    def tally(self, row: Row) -> dict[str, float]:
        """Score, words and count, also of the binary or open part; answers by group."""
        item, score = row.item, row.prediction.score or 0.0
        part = item.extra["part"]
        sums = {"n": 1.0, "score": score, f"n/{part}": 1.0, f"score/{part}": score}
        sums["words"] = float(len(row.prediction.text.split()))
        group = item.extra["group"]
        if group is not None:
            sums[f"size/{group}"] = 1.0
            sums[f"gold/{group}{_BY}{item.truth}"] = 1.0
            sums[f"told/{group}{_BY}{row.prediction.parsed or ''}"] = 1.0
        return sums

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Accuracies in percent, distribution (lower is better), words per answer: float[...]."""
        return {
            **self.category_metrics(sums),
            "binary": percent(sums["score/binary"], sums["n/binary"]),
            "open": percent(sums["score/open"], sums["n/open"]),
            "distribution": _distribution(sums),
            "answer_words": ratio(sums["words"], sums["n"]),
        }

    def category_metrics(self, sums: Sums) -> dict[str, Floats]:
        """The accuracy, float[...]."""
        return {"accuracy": percent(sums["score"], sums["n"])}

    def slices(self, item: Item) -> tuple[str, ...]:
        """The structural type, and the semantic one as "semantic=..."."""
        return (item.category, f"semantic={item.extra['semantic']}")

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric as LLaVA-1.5 uses them."""
        return {
            "prompt": self.prompt("{question}"),
            "parser": "llava convert_gqa_for_eval: full stops at the end dropped, lower case",
            "metric": "string equality over balanced questions, percent",
        }


def _distribution(sums: Sums) -> Floats:
    """Official: chi-square of told against true answers, mean over groups by their size, / 100."""
    total = size = 0.0 * sums["n"]
    for key in sums.under("gold"):
        true, told = sums[f"gold/{key}"], sums[f"told/{key}"]
        weight = sums[f"size/{key.partition(_BY)[0]}"]
        total = total + np.nan_to_num(ratio((told - true) ** 2, true)) * weight
        size = size + true
    return ratio(total, size) / 100
