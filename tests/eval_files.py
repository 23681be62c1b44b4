"""Small hand-made files in the benchmarks' official formats, for the tests of eval."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pumice.core.types import Request, Result
from pumice.eval.benchmark import Item


def dump(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def dump_lines(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pope_files(root: Path, counts: dict[str, int] | None = None) -> Path:
    counts = counts or {"adversarial": 4, "popular": 4, "random": 4}
    for category, count in counts.items():
        rows = [
            {
                "question_id": n,
                "image": f"COCO_val2014_{n // 2:012d}.jpg",
                "text": f"Is there a {category} thing {n} in the image?",
                "label": "yes" if n % 2 else "no",
            }
            for n in range(1, count + 1)
        ]
        dump_lines(root / "pope" / f"coco_pope_{category}.json", rows)
    return root


def vqa_files(root: Path) -> Path:
    kinds = [
        ("what color", "other", "red"),
        ("how many", "number", "2"),
        ("is the", "yes/no", "no"),
    ]
    questions, annotations = [], []
    for n in range(12):
        kind, answer_type, answer = kinds[n % 3]
        name, image = 1000 * (n // 3 + 1) + n % 3, n // 3 + 1
        said = [answer] * 6 + ["blue"] * 4
        questions.append({"question_id": name, "image_id": image, "question": f"{kind} {n}?"})
        annotations.append(
            {
                "question_id": name,
                "image_id": image,
                "question_type": kind,
                "answer_type": answer_type,
                "multiple_choice_answer": answer,
                "answers": [{"answer": a, "answer_id": i + 1} for i, a in enumerate(said)],
            }
        )
    dump(
        root / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "questions": questions},
    )
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    for image in range(1, 5):
        path = root / "val2014" / f"COCO_val2014_{image:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([image]))
    return root


def science_files(root: Path) -> Path:
    problem = {"question": "Which  one?", "choices": ["a", "b", "c"], "subject": "s", "hint": ""}
    problems = {
        "3": {**problem, "answer": 1, "image": "image.png", "hint": "Look."},
        "7": {**problem, "answer": 0, "image": None},
        "9": {**problem, "answer": 2, "image": "image.png"},
    }
    dump(root / "scienceqa" / "problems.json", problems)
    dump(root / "scienceqa" / "pid_splits.json", {"train": [], "test": ["3", "7", "9"]})
    return root


def answers_to(items: Sequence[Item], answer: Callable[[Item], str]) -> list[dict[str, object]]:
    return [{"question_id": item.id, "text": answer(item)} for item in items]


class Scripted:
    """An answerer that knows the truth, remembers what it was asked, and can die or fail."""

    def __init__(self, items: Sequence[Item], *, die_after: int = -1, fail: str = "") -> None:
        self.truth = {item.id: item.extra["most_frequent"] for item in items}
        self.die_after, self.fail = die_after, fail
        self.asked: list[str] = []

    def __call__(
        self, requests: Sequence[Request], on_result: Callable[[Result], None] | None
    ) -> list[Result]:
        results = []
        # Backwards, as an engine that sorts by length may finish in any order.
        for request in reversed(requests):
            if len(self.asked) == self.die_after:
                raise KeyboardInterrupt
            self.asked.append(request.id)
            failed = "cannot read the image" if request.id == self.fail else None
            result = Result(
                id=request.id, text="" if failed else self.truth[request.id], error=failed
            )
            results.append(result)
            if on_result is not None:
                on_result(result)
        return results
