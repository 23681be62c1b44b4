"""Questions with their answers for people to look at: drawn by chance, never hand-picked."""

from __future__ import annotations

import random
from pathlib import Path

from pumice.core.files import read_jsonl
from pumice.eval.benchmark import Benchmark, Item
from pumice.eval.metrics import score_item
from pumice.eval.report import Example
from pumice.processing.response_formats import LETTER, SHORT


def pick_examples(
    benchmark: Benchmark, data_dir: Path, out_dir: Path, count: int, *, seed: int = 0
) -> list[Example]:
    """At most `count` answered questions of a run in `out_dir`, each about another image.

    The draw goes round the categories, so that a rare one is seen too; it does not look at
    whether an answer is right.
    """
    texts = {
        str(row["id"]): str(row["text"])
        for _, row in read_jsonl(out_dir / "predictions.jsonl", allow_cut_tail=True)
        if row.get("error") is None
    }
    items = [
        item
        for item in benchmark.load(data_dir)
        if item.id in texts and item.image is not None and item.image.is_file()
    ]
    random.Random(seed).shuffle(items)
    return [_example(benchmark, item, texts[item.id]) for item in _round_robin(items, count)]


def _round_robin(items: list[Item], count: int) -> list[Item]:
    chosen: list[Item] = []
    seen: set[str] = set()
    while len(chosen) < count:
        before = len(chosen)
        had: set[str] = set()
        for item in items:
            fresh = item.category not in had and item.group not in seen
            if fresh and len(chosen) < count:
                had.add(item.category)
                seen.add(item.group)
                chosen.append(item)
        if len(chosen) == before:
            break
    return chosen


def _example(benchmark: Benchmark, item: Item, text: str) -> Example:
    assert item.image is not None
    question = item.prompt.removesuffix(f"\n{SHORT}").removesuffix(f"\n{LETTER}")
    return Example(
        question=question,
        answer=text,
        truth=benchmark.truth_text(item),
        right=(score_item(benchmark, item, text).prediction.score or 0.0) >= 0.5,
        image=item.image.read_bytes(),
        benchmark=benchmark.title,
    )
