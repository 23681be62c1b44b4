"""LLaVA's question files: the prompts as they were asked, for splits whose truths are not public.

A row is {"question_id", "image", "text", "category"}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    return [
        Item(
            id=str(row["question_id"]),
            image=find_image(row["image"]),
            prompt=row["text"],
            truth=None,
            group=row["image"],
            extra={"image": row["image"]},
        )
        for _, row in question_rows(path)
    ]


def question_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a question file, checked, and where each of them stands."""
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        require(
            row,
            ("question_id", "image", "text"),
            where,
            texts=("image", "text"),
            ids=("question_id",),
        )
        yield where, row
