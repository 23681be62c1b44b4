"""POPE: does the model say that things are in the image which are not? Yes/no, three samplings.

Official files: coco_pope_{adversarial,popular,random}.json (JSONL), in two versions: with
2,910 random labels (commit e3e3926, from which LLaVA made its questions) and with 3,000 (later).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.core.errors import DataError
from pumice.core.files import read_jsonl
from pumice.core.log import get_logger
from pumice.eval.benchmark import (
    PROMPTS,
    Answer,
    Benchmark,
    Floats,
    Item,
    Matching,
    Row,
    Sums,
    mean_of,
    percent,
)
from pumice.eval.locate import ImageFinder, find_file_if_any, require

# Where each category's question ids start in LLaVA's one question file for all three.
LLAVA_OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
_NEEDED = ("question_id", "image", "text", "label")
_FOLDERS = ("", "coco/", "output/coco/")
_SHIFTED = ("popular", "random")  # From the largest offset down.
_NO = frozenset({"No", "not", "no"})

log = get_logger(__name__)


class Pope(Benchmark):
    """Accuracy, precision, recall, F1 and yes ratio per category; the headline is the mean F1."""

    name = "pope"
    title = "POPE"
    headline = "mean_f1"
    paper = True
    # How many labels the random file must have; "found" takes the file as it is.
    choices = {"labels": ("found", "2910", "3000"), "prompt": PROMPTS}

    def load(self, data_dir: Path) -> list[Item]:
        """Items of every label file present, at least one; ids are "category/question_id"."""
        find_image = ImageFinder(data_dir, self.name)
        items, absent = [], []
        for category in LLAVA_OFFSETS:
            names = [f"{folder}coco_pope_{category}.json" for folder in _FOLDERS]
            path = find_file_if_any(data_dir, self.name, names)
            if path is None:
                absent.append(category)
                continue
            labels = self._read_labels(path, category, find_image)
            wanted = self.chosen["labels"]
            if category == "random" and wanted not in ("found", str(len(labels))):
                raise DataError(
                    f"pope: {path} has {len(labels)} labels, asked for was the version with "
                    f"{wanted}. Take that version, or leave the option labels out."
                )
            items += labels
        if not items:
            raise DataError(
                f"pope: no label file coco_pope_(adversarial|popular|random).json in {data_dir} or "
                f"{data_dir / self.name}. Give the directory that holds them with --data, or make "
                f"them with `pumice world make --out DIR`."
            )
        if absent:
            log.warning(
                "pope: no label file of %s in %s; means are over the others",
                " and ".join(absent),
                data_dir,
            )
        return items

    def _read_labels(self, path: Path, category: str, find_image: ImageFinder) -> list[Item]:
        items = []
        for number, row in read_jsonl(path):
            where = f"{path}, line {number}"
            require(row, _NEEDED, where, texts=_NEEDED[1:], ids=_NEEDED[:1])
            if row["label"] not in ("yes", "no"):
                raise DataError(
                    f"{where}: the label is {row['label']!r}; yes or no are allowed. Take the "
                    f"official file."
                )
            items.append(
                Item(
                    id=f"{category}/{row['question_id']}",
                    image=find_image(row["image"]),
                    prompt=self.prompt(row["text"]),
                    truth=row["label"],
                    group=row["image"],
                    category=category,
                    extra={"question_id": str(row["question_id"]), "text": row["text"]},
                )
            )
        return items

    def parse(self, text: str, item: Item) -> str | None:
        """ "no" when the first sentence has the word No, no or not; everything else is "yes"."""
        words = text.split(".")[0].replace(",", "").split(" ")
        return "yes" if _NO.isdisjoint(words) else "no"

    def score(self, parsed: str | None, item: Item) -> float:
        """1 when the yes or no is the label's."""
        return float(parsed == item.truth)

    def tally(self, row: Row) -> dict[str, float]:
        """One of tp, fp, tn, fn in the row's category; "yes" is the positive answer."""
        said_yes = row.prediction.parsed == "yes"
        right = row.prediction.parsed == row.item.truth
        outcome = ("t" if right else "f") + ("p" if said_yes else "n")
        return {f"n/{row.item.category}": 1.0, f"{outcome}/{row.item.category}": 1.0}

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Means over the categories, each float[...]: the paper's number is the mean F1."""
        per_category = [_confusion(sums, category) for category in sums.under("n")]
        means = {name: mean_of([part[name] for part in per_category]) for name in per_category[0]}
        return {"mean_f1": means.pop("f1"), **means}

    def category_metrics(self, sums: Sums) -> dict[str, Floats]:
        """The five numbers of one category and its confusion counts, each float[...]."""
        (category,) = sums.under("n")
        counts = {name: sums[f"{name}/{category}"] for name in ("tp", "fp", "tn", "fn")}
        return {**_confusion(sums, category), **counts}

    def base_answers(self, items: Sequence[Item]) -> dict[str, str]:
        """Always yes: labels are balanced, and of the two constant answers only yes has an F1."""
        return {item.id: "yes" for item in items}

    def match(self, answers: Sequence[Answer], items: Sequence[Item], source: str) -> Matching:
        """Answers to labels by category and question id, checked against the asked question."""
        return _Matcher(items, source).match(answers)

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric as LLaVA-1.5 uses them."""
        return {
            "prompt": self.prompt("{question}"),
            "parser": "llava eval_pope: first sentence, any of No/no/not means no, else yes",
            "metric": "mean F1 over categories, positive = yes, percent",
        }


def _confusion(sums: Sums, category: str) -> dict[str, Floats]:
    tp, fp, tn, fn = (sums[f"{name}/{category}"] for name in ("tp", "fp", "tn", "fn"))
    n = sums[f"n/{category}"]
    # A category without a draw has no F1 at all; one without a yes has an F1 of 0.
    empty = np.where(n == 0, np.nan, 0.0)
    return {
        "f1": np.nan_to_num(percent(2 * tp, 2 * tp + fp + fn)) + empty,
        "accuracy": percent(tp + tn, n),
        "precision": np.nan_to_num(percent(tp, tp + fp)) + empty,
        "recall": np.nan_to_num(percent(tp, tp + fn)) + empty,
        "yes_ratio": percent(tp + fp, n),
    }


class _Matcher:
    """Finds the label of each answer; never by order, and never on the id's word alone."""

    def __init__(self, items: Sequence[Item], source: str) -> None:
        self.source = source
        self.labels: dict[str, dict[str, Item]] = defaultdict(dict)
        for item in items:
            self.labels[item.category][item.extra["question_id"]] = item

    def match(self, answers: Sequence[Answer]) -> Matching:
        default = self._default_category(answers)
        found: dict[str, dict[str, Answer]] = defaultdict(dict)
        strangers: Counter[str] = Counter()
        conflicts: Counter[str] = Counter()
        elsewhere: Counter[str] = Counter()
        for answer in answers:
            category, question_id = self._place(answer, default)
            if category not in self.labels:
                elsewhere[category] += 1
                continue
            item = self.labels[category].get(question_id)
            if item is None:
                strangers[category] += 1
            else:
                conflicts[category] += _other_question(answer, item)
                found[category][item.id] = answer
        for category in +conflicts:
            del found[category]
        notes = [*self._conflict_notes(+conflicts), *self._count_notes(found, strangers)]
        notes += [
            f"{name}: {count} answers, and no label file of this category in the data"
            for name, count in elsewhere.items()
        ]
        matched = {key: answer for part in found.values() for key, answer in part.items()}
        return Matching(matched, tuple(notes), flawed=bool(strangers or +conflicts))

    def _place(self, answer: Answer, default: str | None) -> tuple[str, str]:
        prefix, slash, rest = answer.id.partition("/")
        if slash and prefix in LLAVA_OFFSETS:
            return prefix, rest
        number = int(answer.id) if _is_number(answer.id) else -1
        implied = next((name for name in _SHIFTED if number > LLAVA_OFFSETS[name]), None)
        stated = answer.category if answer.category in LLAVA_OFFSETS else None
        category = stated or implied or default or "adversarial"
        if implied is None or answer.id in self.labels.get(category, {}):
            return category, answer.id
        return category, str(number - LLAVA_OFFSETS[implied])

    def _default_category(self, answers: Sequence[Answer]) -> str | None:
        """The category of plain ids 1, 2, ... that come without one."""
        plain = [
            answer.id
            for answer in answers
            if answer.category not in LLAVA_OFFSETS and _is_number(answer.id)
        ]
        merged = any(int(name) > LLAVA_OFFSETS["random"] for name in plain)
        if not plain or merged:
            return None
        if len(self.labels) == 1:
            return next(iter(self.labels))
        named = [name for name in LLAVA_OFFSETS if name in Path(self.source).name.lower()]
        if len(named) == 1:
            return named[0]
        if len(set(plain)) < len(plain):
            raise DataError(
                f"{self.source}: the same question ids occur several times and nothing says which "
                f"POPE category each row belongs to; {', '.join(self.labels)} are in the data. Add "
                f'"category" to every row, use LLaVA\'s ids (random from 10000001, popular from '
                f"20000001), or score one category per file with a data directory that holds only "
                f"its label file."
            )
        return None

    def _conflict_notes(self, conflicts: Counter[str]) -> list[str]:
        return [
            f"{category}: {count} answers were given to another question than the label file has "
            f"under their id, so no answer of this category is used. The label files exist in "
            f"versions with equal ids and other questions (random: 2,910 rows in commit e3e3926, "
            f"which LLaVA's question file was made from, 3,000 later); take the version the "
            f"answers were made for"
            for category, count in conflicts.items()
        ]

    def _count_notes(
        self, found: dict[str, dict[str, Answer]], strangers: Counter[str]
    ) -> list[str]:
        notes = []
        for category, labels in self.labels.items():
            answered = len(found.get(category, {}))
            if answered < len(labels) or strangers[category]:
                notes.append(
                    f"{category}: {answered} of {len(labels)} labels have an answer, and "
                    f"{strangers[category]} answers have no label"
                )
        return notes


def _is_number(name: str) -> bool:
    # "²" is a digit too, and no number.
    return name.isascii() and name.isdigit()


def _other_question(answer: Answer, item: Item) -> bool:
    """True when the recorded prompt, in whatever form, does not hold the label's question.

    Its every word: POPE's questions differ by the thing alone, as a car does from a cat.
    """
    if answer.prompt is None:
        return False
    return _plain(item.extra["text"]).rstrip("?") not in _plain(answer.prompt)


def _plain(question: str) -> str:
    # Published versions differ in this misspelling and in nothing else of the wording.
    return " ".join(question.lower().replace("imange", "image").split())
