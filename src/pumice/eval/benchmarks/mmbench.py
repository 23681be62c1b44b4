"""MMBench and MMBench-CN (dev): multiple choice, asked with turned options, right only every time.

Official files: mmbench_dev_20230712.tsv, mmbench_dev_cn_20231003.tsv, or a later release, pictures
inside; the test tables come without answers. A row is a question with its options in one order;
rows whose index is equal modulo a million are one question. Groups are taken as they stand: some
leave an option in place.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pumice.core.errors import DataError
from pumice.core.files import cache_dir, write_atomic
from pumice.eval.benchmark import Benchmark, Floats, Item, Row, Sums, percent
from pumice.eval.locate import find_file, require
from pumice.eval.option_letters import LETTER_RULES
from pumice.eval.tables import NOT_AVAILABLE, Cells, read_table
from pumice.processing.response_formats import FORMATS, with_format

TURN = 1_000_000
_LETTERS = "ABCD"
# A shorter picture is the index of the row that holds it, as later releases write it.
_SHORTEST_PICTURE = 64
_FOLDERS = ("", "mmbench/")
# What the server's sheet has of the table, and where the answer stands among it.
SHEET_COLUMNS = ("index", "question", *_LETTERS, "prediction", "answer", "split")


class MMBench(Benchmark):
    """CircularEval: a question is right when every order of its options is answered right."""

    name = "mmbench"
    title = "MMBench"
    headline = "circular_accuracy"
    paper = True
    max_new_tokens = 1024
    sentence = "letter"
    files: ClassVar[Mapping[str, str]] = {
        "20230712": "mmbench_dev_20230712.tsv",
        "20231003": "mmbench_dev_en_20231003.tsv",
        "dev_en": "MMBench_DEV_EN.tsv",
        "dev_en_v11": "MMBench_DEV_EN_V11.tsv",
    }
    # "found": the first of the files above that is there.
    whole_groups = True
    choices = {"letters": ("2023", "now"), "release": ("found", *files)}

    @property
    def judged(self) -> bool:
        """The answers of the test tables are not public."""
        return not self.chosen["release"].startswith("test")

    def load(self, data_dir: Path) -> list[Item]:
        """One item per row, in the file's order; `truth` is the right letter."""
        release = self.chosen["release"]
        dev = [name for name in self.files.values() if "_test_" not in name]
        names = dev if release == "found" else [self.files[release]]
        file = find_file(
            data_dir, self.name, [f"{place}{name}" for name in names for place in _FOLDERS]
        )
        rows = list(read_table(file, NOT_AVAILABLE))
        pictures = {str(row.get("index")): row.get("image") or "" for row in rows}
        items = [
            self._item(row, pictures, f"{file}, row {number}")
            for number, row in enumerate(rows, start=2)
        ]
        turns = Counter(item.extra["question"] for item in items)
        for item in items:
            item.extra["turns"] = turns[item.extra["question"]]
        return items

    def _item(self, row: Cells, pictures: dict[str, str], where: str) -> Item:
        require(row, ("index", "question", *_LETTERS, *(["answer"] if self.judged else [])), where)
        index, truth = row["index"], row.get("answer")
        options = {letter: text for letter in _LETTERS if (text := row[letter]) is not None}
        if index is None or not index.isdigit() or (self.judged and truth not in tuple(_LETTERS)):
            raise DataError(
                f"{where}: a whole number as index and a letter of {_LETTERS} as answer are "
                f"needed; found {index!r} and {truth!r}. Take the official dev file."
            )
        picture = row.get("image") or ""
        if len(picture) < _SHORTEST_PICTURE:
            picture = pictures.get(picture, "")
        image = _picture_file(picture) if picture else None
        question = str(int(index) % TURN)
        return Item(
            id=index,
            image=image,
            prompt=with_format(_question(row), self.sentence),
            truth=truth,
            # Some pictures are asked about in several questions.
            group=question if image is None else image.stem,
            category=row.get("l2-category") or "",
            extra={
                "question": question,
                "options": options,
                "picture": picture,
                "category": row.get("category") or "",
                "cells": {name: row[name] for name in SHEET_COLUMNS if name in row},
            },
        )

    def prepare(self, items: Sequence[Item]) -> None:
        """Writes the pictures of these items into the cache."""
        for item in items:
            if item.image is None:
                raise DataError(
                    f"{self.name}: question {item.id} has no picture in its file, so it cannot be "
                    f"asked. Take the official .tsv, which holds the pictures."
                )
            if not item.image.is_file():
                write_atomic(item.image, _decoded(item), sync=False)

    def parse(self, text: str, item: Item) -> str | None:
        """The letter that the chosen version of the rule reads; None where it would ask a model."""
        return LETTER_RULES[self.chosen["letters"]](text, item.extra["options"])

    def score(self, parsed: str | None, item: Item) -> float:
        """1 for the right letter; an answer without one is wrong, nothing is guessed."""
        return float(parsed == item.truth)

    def tally(self, row: Row) -> dict[str, float]:
        """Score and count, also of the rows in the file's own order of options."""
        score = row.prediction.score or 0.0
        sums = {"n": 1.0, "right": score}
        if int(row.item.id) < TURN:
            sums |= {"n/first": 1.0, "right/first": score}
        return sums

    def tally_group(self, rows: Sequence[Row]) -> dict[str, float]:
        """The rows' tallies, and of how many questions all rows are right.

        A question that was not answered in every order is left out, and so is, as officially, one
        whose first order is not in the file.
        """
        questions: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            questions[row.item.extra["question"]].append(row)
        sums: Counter[str] = Counter()
        for turned in questions.values():
            own = super().tally_group(turned)
            if "n/first" in own and len(turned) == turned[0].item.extra["turns"]:
                own |= {"questions": 1.0, "circular": float(own["right"] == own["n"])}
            sums.update(own)
        return dict(sums)

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Accuracy over questions asked in circle, over first orders, over rows; float[...]."""
        return {
            "circular_accuracy": percent(sums["circular"], sums["questions"]),
            "first_order_accuracy": percent(sums["right/first"], sums["n/first"]),
            "row_accuracy": percent(sums["right"], sums["n"]),
        }

    def slices(self, item: Item) -> tuple[str, ...]:
        """The coarse category, and the fine one as "category=..."."""
        fine = item.extra["category"]
        return (*super().slices(item), *([f"category={fine}"] if fine else []))

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric as LLaVA-1.5 uses them."""
        return {
            "prompt": f"[{{hint}}\n]{{question}}\nA. {{option}}\nB. ...\n{FORMATS[self.sentence]}",
            "parser": "MMBench letter extraction; what it leaves to a language model is wrong",
            "metric": "CircularEval: all rows of a question right, percent",
        }


class MMBenchCN(MMBench):
    """The same questions in Chinese, with LLaVA-1.5's sentence in Chinese."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    sentence = "letter_chinese"
    files = {
        "20231003": "mmbench_dev_cn_20231003.tsv",
        "dev_cn": "MMBench_DEV_CN.tsv",
        "dev_cn_v11": "MMBench_DEV_CN_V11.tsv",
        "test_20231003": "mmbench_test_cn_20231003.tsv",
    }
    choices = {"letters": ("2023", "now"), "release": ("found", *files)}


def _question(row: Cells) -> str:
    hint, question = row.get("hint"), row["question"] or ""
    lines = [question] if hint is None or hint.lower() in ("nan", "none") else [hint, question]
    for letter in _LETTERS:
        option = row[letter]
        # The options end at the first that is not there, even if a later one is.
        if option is None or option.lower() in ("nan", "none"):
            break
        lines.append(f"{letter}. {option}")
    return "\n".join(lines)


def _picture_file(picture: str) -> Path:
    return cache_dir() / "mmbench" / f"{hashlib.sha256(picture.encode()).hexdigest()[:24]}.jpg"


def _decoded(item: Item) -> bytes:
    try:
        return base64.b64decode(item.extra["picture"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"mmbench: the picture of question {item.id} is not base64 ({error}). Take the "
            f"official .tsv file again."
        ) from error
