"""LLaVA's question files: the prompts as they were asked, for splits whose truths are not public.

A row is {"question_id", "image", "text", "category"}.
"""

from __future__ import annotations

from pathlib import Path

from pumice.core.errors import DataError
from pumice.core.files import read_jsonl
from pumice.eval.benchmark import Benchmark, Item
from pumice.eval.locate import ImageFinder, require


def read_questions(path: Path, find_image: ImageFinder, benchmark: Benchmark) -> list[Item]:
    """One item per row, without a truth; the prompt is the row's text, byte for byte.

    So another prompt than the published one is an error.
    """
    if benchmark.other_prompt:
        raise DataError(
            f"{benchmark.name}: {path} holds the questions with their published prompt, and "
            f"prompt={benchmark.chosen['prompt']} was asked for. Put the official question file "
            f"in its place, or leave the option prompt out."
        )
    items = []
    for number, row in read_jsonl(path):
        require(
            row,
            ("question_id", "image", "text"),
            f"{path}, line {number}",
            texts=("image", "text"),
            ids=("question_id",),
        )
        items.append(
            Item(
                id=str(row["question_id"]),
                image=find_image(row["image"]),
                prompt=row["text"],
                truth=None,
                group=row["image"],
                extra={"image": row["image"]},
            )
        )
    return items
