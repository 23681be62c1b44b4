"""VizWiz: questions blind people asked about their photographs; a third cannot be answered.

Official files: val.json ({"image", "question", "answers", "answer_type", "answerable"}), test.json
(without answers; also LLaVA's llava_test.jsonl); images in val/ and test/. LLaVA-1.5's number is
that of the test server, which is closed; val is what can be scored here, and another split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json
from pumice.eval.answers import prepare, vqa_accuracy
from pumice.eval.benchmark import Answer, Benchmark, Floats, Item, Matching, Row, Sums, percent
from pumice.eval.locate import ImageFinder, find_file, require, texts_in
from pumice.eval.question_files import read_questions


class VizWiz(Benchmark):
    """VQA accuracy, overall and per answer type."""

    name = "vizwiz"
    title = "VizWiz"
    headline = "accuracy"
    paper = True
    decimals = 2
    choices = {
        "split": ("val", "test"),
        "scorer": ("m4c", "2021", "before-2021"),
        # "short" does not say that a question may have no answer.
        "prompt": ("unanswerable", "short"),
    }

    @property
    def judged(self) -> bool:
        """The answers of test are not public."""
        return self.chosen["split"] == "val"

    def load(self, data_dir: Path) -> list[Item]:
        """One item per question; the id is its place in the file, `truth` the ten answers."""
        split = self.chosen["split"]
        names = [f"vizwiz/{split}.json", f"{split}.json", f"Annotations/{split}.json"]
        llava = [] if self.judged else ["vizwiz/llava_test.jsonl", "llava_test.jsonl"]
        file = find_file(data_dir, self.name, names + llava)
        find_image = ImageFinder(data_dir, self.name)
        if file.suffix == ".jsonl":
            return read_questions(file, find_image, self)
        items = []
        for index, row in enumerate(read_json(file)):
            where = f"{file}, question {index}"
            asked = ("image", "question")
            require(row, (*asked, *(["answers"] if self.judged else [])), where, texts=asked)
            items.append(self._item(index, row, find_image, where))
        return items

    def _item(self, index: int, row: dict[str, Any], find_image: ImageFinder, where: str) -> Item:
        split, image = self.chosen["split"], row["image"]
        said = [answer["answer"] for answer in row.get("answers", ())]
        truths = texts_in(said, "its annotators' answers", where)
        if split == "val" and not truths:
            raise DataError(f"{where}: it has no answers. Take the official val.json.")
        return Item(
            id=str(index),
            image=find_image(image, f"{split}/{image}"),
            # capitalize() also makes every other letter small; the published questions are so.
            prompt=self.prompt(row["question"].capitalize()),
            truth=truths or None,
            group=image,
            category=str(row.get("answer_type", "")),
            extra={"image": image},
        )

    def match(self, answers: Sequence[Answer], items: Sequence[Item], source: str) -> Matching:
        """By the question's place, or by the image's name as the server's file has it."""
        by_image = {item.extra["image"]: item.id for item in items}
        return super().match(
            [replace(answer, id=by_image.get(answer.id, answer.id)) for answer in answers],
            items,
            source,
        )

    def parse(self, text: str, item: Item) -> str | None:
        """The answer as the scorer compares it; None when nothing was said."""
        return prepare(text, item.truth or (), self.chosen["scorer"]) or None

    def score(self, parsed: str | None, item: Item) -> float:
        """The VQA accuracy in 0..1."""
        return vqa_accuracy(parsed or "", item.truth, self.chosen["scorer"])

    def tally(self, row: Row) -> dict[str, float]:
        """Score, count, and whether the answer was that there is none."""
        said = float(row.prediction.parsed == "unanswerable")
        return {"n": 1.0, "score": row.prediction.score or 0.0, "unanswerable": said}

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Accuracy, and the share of answers "unanswerable"; each float[...]."""
        return {
            "accuracy": percent(sums["score"], sums["n"]),
            "said_unanswerable": percent(sums["unanswerable"], sums["n"]),
        }

    def truth_text(self, item: Item) -> str:
        """The most frequent answer."""
        return Counter(item.truth).most_common(1)[0][0] if item.truth else ""

    def base_answers(self, items: Sequence[Item]) -> dict[str, str]:
        """The same answer to all: the type of an answer is no part of its question."""
        usual = Counter(self.truth_text(item) for item in items).most_common(1)[0][0]
        return dict.fromkeys((item.id for item in items), usual)

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric as LLaVA-1.5 uses them."""
        return {
            "prompt": self.prompt("{question.capitalize()}"),
            "parser": f"VQA scorer, version {self.chosen['scorer']}",
            "metric": "VQA accuracy, each annotator left out in turn, percent",
        }
