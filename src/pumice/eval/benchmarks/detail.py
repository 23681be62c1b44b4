"""Free descriptions: which objects are named, and are they there? In the manner of CHAIR.

Files: questions.jsonl ({"question_id", "image", "text"}) and COCO's instances_val2014.json.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json
from pumice.eval.benchmark import Benchmark, Floats, Item, Row, Sums, percent, ratio
from pumice.eval.locate import ImageFinder, find_file, require
from pumice.eval.question_files import question_rows

INSTANCES = "instances_val2014.json"


class Detail(Benchmark):
    """Precision, recall and F1 of the object categories named, and the two CHAIR rates."""

    name = "detail"
    title = "Detail"
    headline = "f1"
    max_new_tokens = 256

    def load(self, data_dir: Path) -> list[Item]:
        """One item per question; `truth` is the sorted list of categories in the image."""
        instances_file = find_file(
            data_dir,
            self.name,
            [f"coco/annotations/{INSTANCES}", f"annotations/{INSTANCES}", INSTANCES],
        )
        instances = read_json(instances_file)
        require(instances, ("categories", "images", "annotations"), str(instances_file))
        names = {row["id"]: row["name"] for row in instances["categories"]}
        ids = {row["file_name"]: row["id"] for row in instances["images"]}
        present: dict[int, set[str]] = defaultdict(set)
        for row in instances["annotations"]:
            present[row["image_id"]].add(names[row["category_id"]])
        mentions = Mentions(names.values())
        find_image = ImageFinder(data_dir, self.name)
        # The subfolder first: a bare questions.jsonl beside other benchmarks could be anybody's.
        questions_file = find_file(
            data_dir, self.name, [f"{self.name}/questions.jsonl", "questions.jsonl"]
        )
        items = []
        for where, row in question_rows(questions_file):
            image = row["image"]
            if Path(image).name not in ids:
                raise DataError(
                    f"{where}: image {image!r} is not in {instances_file}; "
                    f"only images with COCO instances can be judged. Take both from one split."
                )
            items.append(
                Item(
                    id=str(row["question_id"]),
                    image=find_image(image),
                    prompt=row["text"],
                    truth=sorted(present[ids[Path(image).name]]),
                    group=image,
                    extra={"mentions": mentions},
                )
            )
        return items

    def parse(self, text: str, item: Item) -> str | None:
        """The categories named, once each, in order of the alphabet; None when none is."""
        return ", ".join(item.extra["mentions"](text)) or None

    def score(self, parsed: str | None, item: Item) -> float:
        """F1 of the named categories against those in the image."""
        named, true = _split(parsed), set(item.truth)
        total = len(named) + len(true)
        return 2 * len(named & true) / total if total else 1.0

    def tally(self, row: Row) -> dict[str, float]:
        """Categories named, true, both; and whether the text names anything that is not there."""
        named, true = _split(row.prediction.parsed), set(row.item.truth)
        return {
            "n": 1.0,
            "named": float(len(named)),
            "true": float(len(true)),
            "both": float(len(named & true)),
            "texts_with_absent": float(bool(named - true)),
            "words": float(len(row.prediction.text.split())),
        }

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Over all named and true categories together, each float[...]; words is no percentage."""
        named, true, both = sums["named"], sums["true"], sums["both"]
        return {
            "f1": percent(2 * both, named + true),
            "precision": percent(both, named),
            "recall": percent(both, true),
            "chair_i": percent(named - both, named),
            "chair_s": percent(sums["texts_with_absent"], sums["n"]),
            "words": ratio(sums["words"], sums["n"]),
        }

    def truth_text(self, item: Item) -> str:
        """The categories in the image."""
        return ", ".join(item.truth)

    def base_answers(self, items: Sequence[Item]) -> dict[str, str]:
        """The same text for every image: the most frequent categories, as many as are usual."""
        counts = Counter(name for item in items for name in item.truth)
        usual = round(sum(counts.values()) / len(items))
        frequent = sorted(counts, key=lambda name: (-counts[name], name))[:usual]
        return {item.id: " and ".join(f"a {name}" for name in frequent) for item in items}

    def protocol(self) -> dict[str, Any]:
        """Parser and metric; the prompt is each question's own text."""
        return {
            "prompt": "{text}",
            "parser": "COCO category names as whole words, plural with s or es; longest name first",
            "metric": "named against present categories, each once per image, micro mean, percent",
        }


class Mentions:
    """Finds category names in a text."""

    def __init__(self, names: Iterable[str]) -> None:
        self._spelling = {name.lower(): name for name in names}
        # Longest first, and a match uses its words up: "hot dog" does not also name a dog.
        ordered = sorted(self._spelling, key=lambda name: (-len(name), name))
        choices = "|".join(re.escape(name) for name in ordered)
        self._pattern = re.compile(rf"(?<!\w)({choices})(?:e?s)?(?!\w)", re.IGNORECASE)

    def __call__(self, text: str) -> list[str]:
        """The names found, once each, sorted."""
        found = {match.lower() for match in self._pattern.findall(text)}
        return sorted(self._spelling[name] for name in found)


def _split(parsed: str | None) -> set[str]:
    return set(parsed.split(", ")) if parsed else set()
