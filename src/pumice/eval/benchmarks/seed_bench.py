"""SEED-Bench: multiple choice about images and, by the frame in their middle, about videos.

Official files: SEED-Bench.json; SEED-Bench-image/<data_id>; the videos of the three data sets, or
LLaVA's frames SEED-Bench-video-image/<type>_<question_id>.png. The published file gives the id
49914 to two questions; here the second is "49914#2".
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json
from pumice.core.log import get_logger
from pumice.eval.benchmark import (
    BROKEN,
    Answer,
    Benchmark,
    Floats,
    Item,
    Matching,
    Row,
    Sums,
    percent,
)
from pumice.eval.locate import ImageFinder, find_file, require
from pumice.eval.video_frames import Span, frame_file, save_middle_frame
from pumice.processing.response_formats import LETTER, with_format

FILE = "SEED-Bench.json"
FRAMES = "SEED-Bench-video-image"
# Where the videos of a question type lie, and what its "segment" counts.
VIDEOS: dict[int, tuple[str, Span]] = {
    10: ("20bn-something-something-v2", "whole"),
    11: ("EPIC-KITCHENS", "seconds"),
    12: ("BreakfastII_15fps_qvga_sync", "frames"),
}
_LETTERS = "ABCD"
_NEEDED = ("answer", "data_id", "data_type", "question", "question_id", "question_type_id")

log = get_logger(__name__)


class SeedBench(Benchmark):
    """Accuracy over all questions, over those about images and over those about videos."""

    name = "seed_bench"
    title = "SEED-Bench"
    headline = "accuracy"
    paper = True
    missing_is_wrong = True
    choices = {"part": ("all", "image", "video")}

    def load(self, data_dir: Path) -> list[Item]:
        """One item per question of the part; `truth` is the right letter."""
        folders = ("", "seed_bench/", "SEED-Bench/")
        file = find_file(data_dir, self.name, [f"{place}{FILE}" for place in folders])
        content = read_json(file)
        require(content, ("questions", "question_type"), str(file))
        kinds = {number: name for name, number in content["question_type"].items()}
        find_image = ImageFinder(data_dir, self.name)
        items = []
        named: Counter[str] = Counter()
        for index, row in enumerate(content["questions"]):
            where = f"{file}, question {index}"
            names = (*_NEEDED, *(f"choice_{letter}" for letter in "abcd"))
            require(row, names, where, texts=("question",), ids=("data_id", "question_id"))
            if row["data_type"] not in ("image", "video") or row["answer"] not in tuple(_LETTERS):
                raise DataError(
                    f"{where}: data_type {row['data_type']!r} and answer {row['answer']!r}; image "
                    f"or video, and A to D, are allowed. Take the official file."
                )
            name = str(row["question_id"])
            named[name] += 1
            if self.chosen["part"] in ("all", row["data_type"]):
                item = _item(row, kinds, find_image, data_dir)
                items.append(replace(item, id=_nth(name, named[name])))
        return items

    def match(self, answers: Sequence[Answer], items: Sequence[Item], source: str) -> Matching:
        """By id; of several rows with an id that several questions have, each is one's answer.

        A single row counts for all of them, as in LLaVA's scorer.
        """
        rows = Counter(answer.id for answer in answers)
        places = _places(items)
        given: Counter[str] = Counter()
        named = []
        for answer in answers:
            same = places.get(answer.id, [answer.id])
            if rows[answer.id] > 1:
                named.append(replace(answer, id=same[given[answer.id] % len(same)]))
                given[answer.id] += 1
                continue
            alone = [name for name in same if name == answer.id or name not in rows]
            if len(alone) > 1:
                # To which of the questions it was given is not known.
                answer = replace(answer, prompt=None, prompt_hash=None)
            named += [replace(answer, id=name) for name in alone]
        return super().match(named, items, source)

    def prepare(self, items: Sequence[Item]) -> None:
        """Takes the frames in the middle of the videos, for those that are not there yet.

        A broken video is its item's error, later; when no video can be read that is said at once.
        """
        failures: list[DataError] = []
        videos = [item for item in items if item.extra["video"] and item.image]
        for item in videos:
            assert item.image is not None
            video, span, segment = item.extra["video"]
            try:
                if not item.image.is_file():
                    save_middle_frame(video, span, segment, item.image)
            except DataError as error:
                item.extra[BROKEN] = str(error)
                failures.append(error)
        if failures and len(failures) == len(videos):
            raise failures[0]
        for failure in failures:
            log.warning("%s", failure)

    def parse(self, text: str, item: Item) -> str | None:
        """The answer when it is one of the four letters and nothing else."""
        return text if text in tuple(_LETTERS) else None

    def score(self, parsed: str | None, item: Item) -> float:
        """1 for the right letter."""
        return float(parsed == item.truth)

    def tally(self, row: Row) -> dict[str, float]:
        """Score and count, also of images or videos."""
        score, kind = row.prediction.score or 0.0, row.item.extra["kind"]
        return {"n": 1.0, "right": score, f"n/{kind}": 1.0, f"right/{kind}": score}

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Three accuracies, each float[...]; one of an absent part is nan."""
        return {
            **self.category_metrics(sums),
            "image_accuracy": percent(sums["right/image"], sums["n/image"]),
            "video_accuracy": percent(sums["right/video"], sums["n/video"]),
        }

    def category_metrics(self, sums: Sums) -> dict[str, Floats]:
        """The accuracy, float[...]."""
        return {"accuracy": percent(sums["right"], sums["n"])}

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric as LLaVA-1.5 uses them."""
        return {
            "prompt": f"{{question}}\nA. {{choice}}\nB. ...\n{LETTER}",
            "parser": "llava convert_seed_for_submission: the very letter, nothing around it",
            "metric": "accuracy, percent; a video is shown by its middle frame",
        }


def _nth(name: str, number: int) -> str:
    """The id of the n-th question that the file gives this id."""
    return name if number == 1 else f"{name}#{number}"


def _places(items: Sequence[Item]) -> dict[str, list[str]]:
    """The ids of the questions to which the file gives the same id, by that id."""
    found: dict[str, list[str]] = defaultdict(list)
    for item in items:
        found[item.extra["question_id"]].append(item.id)
    return found


def _item(
    row: dict[str, Any], names: dict[int, str], find_image: ImageFinder, data_dir: Path
) -> Item:
    kind, name, data_id = row["question_type_id"], str(row["question_id"]), str(row["data_id"])
    lines = [row["question"]]
    lines += [f"{letter}. {row[f'choice_{letter.lower()}']}" for letter in _LETTERS]
    video = None
    if row["data_type"] == "image":
        image = find_image(f"SEED-Bench-image/{data_id}", data_id)
    else:
        image = find_image(f"{FRAMES}/{kind}_{name}.png")
        if not image.is_file():
            video = _video(row, data_dir)
            image = frame_file(video[0], f"{kind}_{name}.png")
    return Item(
        id=name,
        image=image,
        prompt=with_format("\n".join(lines), "letter"),
        truth=row["answer"],
        group=data_id,
        category=names.get(kind, str(kind)),
        extra={"kind": row["data_type"], "video": video, "question_id": name},
    )


def _video(row: dict[str, Any], data_dir: Path) -> tuple[Path, Span, Sequence[float]]:
    kind = row["question_type_id"]
    if kind not in VIDEOS:
        raise DataError(
            f"seed_bench: question {row['question_id']} is about a video of type {kind}; types "
            f"{', '.join(map(str, VIDEOS))} are known. Take the official file."
        )
    folder, span = VIDEOS[kind]
    # The questions name videos of EPIC-KITCHENS with folders that its archive does not have.
    name = Path(row["data_id"]).name if span == "seconds" else row["data_id"]
    places = [
        data_dir / top / folder / name for top in ("", "videos", "seed_bench", "seed_bench/videos")
    ]
    found = next((path for path in places if path.is_file()), places[0])
    return found, span, row.get("segment", ())
