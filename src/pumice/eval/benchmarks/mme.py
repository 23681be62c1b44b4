"""MME: two yes/no questions an image, one for each answer; perception and cognition, 14 subtasks.

Official release: MME_Benchmark_release_version/<subtask>/ with NAME.jpg|png and NAME.txt, or with
images/ and questions_answers_YN/; a .txt has lines "question Please answer yes or no.\\tYes|No".
To score without the pictures, the eval_tool's Your_Results/<subtask>.txt is enough.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pumice.core.errors import DataError
from pumice.eval.answer_files import read_lines
from pumice.eval.benchmark import (
    PROMPTS,
    Answer,
    Benchmark,
    Floats,
    Item,
    Matching,
    Row,
    Sums,
    percent,
)
from pumice.processing.response_formats import SHORT

RELEASE = "MME_Benchmark_release_version"
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
SUBTASKS = (*PERCEPTION, *COGNITION)
ENDING = "Please answer yes or no."
TEMPLATES = "Your_Results"
_TEMPLATE_FOLDERS = (TEMPLATES, f"eval_tool/{TEMPLATES}", f"MME/eval_tool/{TEMPLATES}")
_FOLDERS = ("", RELEASE, f"MME/{RELEASE}", f"mme/{RELEASE}", "MME", "mme")
_PICTURES = (".jpg", ".png", ".jpeg")
_READ = 4
_PAIR = 2
Key = tuple[str, str, str]


class MME(Benchmark):
    """Accuracy plus accuracy over images with both answers right, summed over the subtasks."""

    name = "mme"
    title = "MME"
    headline = "perception"
    most = 200.0 * len(PERCEPTION)
    paper = True
    whole_groups = True
    choices = {"prompt": PROMPTS}

    def load(self, data_dir: Path) -> list[Item]:
        """Two items per image, in the order of its file; `truth` is "yes" or "no"."""
        for folder in _FOLDERS:
            subtasks = [_read_subtask(data_dir / folder / name) for name in SUBTASKS]
            if any(subtasks):
                return self._asked(subtasks)
        for folder in _TEMPLATE_FOLDERS:
            subtasks = [_read_template(data_dir / folder / f"{name}.txt") for name in SUBTASKS]
            if any(subtasks):
                return self._asked(subtasks)
        where = ", ".join(str(data_dir / folder / PERCEPTION[0]) for folder in _FOLDERS)
        raise DataError(
            f"mme: no subtask found; looked for folders like {where}. Give the directory of the "
            f"official release with --data, or make one with `pumice world make --out DIR`."
        )

    def _asked(self, subtasks: Sequence[Sequence[Item]]) -> list[Item]:
        return [
            replace(item, prompt=self.prompt(item.prompt)) for items in subtasks for item in items
        ]

    def match(self, answers: Sequence[Answer], items: Sequence[Item], source: str) -> Matching:
        """By subtask, image and question: the ids of LLaVA's rows and of result files are not one
        for each question. Never by order.
        """
        known = {item.id for item in items}
        places: dict[Key, list[str]] = defaultdict(list)
        for item in items:
            places[item.extra["key"]].append(item.id)
        asked: Counter[Key] = Counter()
        named, bare = [], 0
        for answer in answers:
            if answer.id in known:
                named.append(answer)
                continue
            bare += answer.prompt is None
            subtask, _, image = answer.id.partition("/")
            key = (subtask, _stem(image), plain_question(answer.prompt or ""))
            same = places.get(key, ["?"])
            named.append(replace(answer, id=same[asked[key] % len(same)]))
            asked[key] += 1
        if bare:
            raise DataError(
                f"{source}: {bare} answers come without the prompt that was asked, and an image of "
                f"MME has two questions under one id. Give rows with question_id and prompt."
            )
        return super().match(named, items, source)

    def parse(self, text: str, item: Item) -> str | None:
        """Yes or no when it stands in the first four characters, yes first; else None."""
        start = text.lower()[:_READ]
        if "yes" in start:
            return "yes"
        return "no" if "no" in start else None

    def score(self, parsed: str | None, item: Item) -> float:
        """1 for the right word; an answer that is neither is wrong."""
        return float(parsed == item.truth)

    def tally(self, row: Row) -> dict[str, float]:
        """Score and count in the row's subtask."""
        subtask = row.item.category
        return {f"n/{subtask}": 1.0, f"right/{subtask}": row.prediction.score or 0.0}

    def tally_group(self, rows: Sequence[Row]) -> dict[str, float]:
        """The rows' tallies, and whether all questions of the image are answered right.

        An image with an unanswered question is left out of the latter.
        """
        sums = super().tally_group(rows)
        if len(rows) == _PAIR:
            subtask = rows[0].item.category
            sums[f"images/{subtask}"] = 1.0
            sums[f"both/{subtask}"] = float(all(row.prediction.score for row in rows))
        return sums

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Sums over subtasks, each float[...], with the most that the present ones could give."""
        metrics = {}
        for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
            scores = [_subtask_score(sums, subtask) for subtask in subtasks]
            metrics[name] = sum((np.nan_to_num(score) for score in scores), start=_zero(sums))
            metrics[f"{name}_most"] = sum(
                (200.0 * ~np.isnan(score) for score in scores), start=_zero(sums)
            )
        return metrics

    def category_metrics(self, sums: Sums) -> dict[str, Floats]:
        """Score (at most 200), acc and acc+ of one subtask, each float[...]."""
        (subtask,) = sums.under("n")
        return {
            "score": _subtask_score(sums, subtask),
            "acc": percent(sums[f"right/{subtask}"], sums[f"n/{subtask}"]),
            "acc_plus": percent(sums[f"both/{subtask}"], sums[f"images/{subtask}"]),
        }

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric as LLaVA-1.5 uses them."""
        return {
            "prompt": self.prompt(f"{{question without '{ENDING}'}}"),
            "parser": "MME eval_tool: yes, else no, within the first four characters",
            "metric": "sum over subtasks of acc and acc+ in percent",
        }


def plain_question(text: str) -> str:
    """What is asked, without the sentences that ask for a form; the release has double spaces."""
    for sentence in ("<image>", SHORT, ENDING):
        text = text.replace(sentence, " ")
    return " ".join(text.split())


def _zero(sums: Sums) -> Floats:
    return 0.0 * sums["n"]


def _subtask_score(sums: Sums, subtask: str) -> Floats:
    right = percent(sums[f"right/{subtask}"], sums[f"n/{subtask}"])
    return right + percent(sums[f"both/{subtask}"], sums[f"images/{subtask}"])


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def _read_subtask(folder: Path) -> list[Item]:
    texts, pictures = folder / "questions_answers_YN", folder / "images"
    if not texts.is_dir():
        texts = pictures = folder
    found = {path.stem: path for path in pictures.glob("*") if path.suffix.lower() in _PICTURES}
    items = []
    for file in sorted(texts.glob("*.txt")):
        image = found.get(file.stem, pictures / f"{file.stem}{_PICTURES[0]}")
        items += _read_questions(file, folder.name, image)
    return items


def _read_questions(file: Path, subtask: str, image: Path) -> list[Item]:
    return _pair(
        f"{file}, question",
        subtask,
        image,
        [tuple(line.strip().split("\t")) for line in read_lines(file)],
    )


def _read_template(file: Path) -> list[Item]:
    """The questions of one subtask in the tool's own file: image, question, truth."""
    if not file.is_file():
        return []
    images: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for line in read_lines(file):
        image, *rest = line.strip().split("\t")
        images[image].append(tuple(rest))
    return [
        item
        for name, lines in images.items()
        for item in _pair(f"{file}, {name}, question", file.stem, file.parent / name, lines)
    ]


def _pair(where: str, subtask: str, image: Path, lines: Sequence[tuple[str, ...]]) -> list[Item]:
    """The questions about an image; acc+, which asks for both answers, needs two."""
    if len(lines) != _PAIR:
        raise DataError(
            f"{where}s: MME asks {_PAIR} questions about an image, found {len(lines)}. Take the "
            f"official file."
        )
    return [
        _item(f"{where} {number}", subtask, image, line, number)
        for number, line in enumerate(lines, start=1)
    ]


def _item(where: str, subtask: str, image: Path, line: tuple[str, ...], number: int) -> Item:
    """`line`: question and truth; `number`: which of the questions about the image it is."""
    if len(line) != 2 or line[1].strip().lower() not in ("yes", "no"):
        raise DataError(
            f"{where}: a question, a tab, and Yes or No are needed, found {line!r}. Take the "
            f"official file."
        )
    question, truth = line
    return Item(
        id=f"{subtask}/{image.stem}/{number}",
        image=image,
        prompt=question.replace(ENDING, "").strip(),
        truth=truth.strip().lower(),
        group=f"{subtask}/{image.stem}",
        category=subtask,
        extra={"key": (subtask, _stem(image.name), plain_question(question))},
    )
