"""Reading answers that some model gave earlier, in the formats people have them in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json, read_jsonl
from pumice.eval.benchmark import Answer


def read_answers(path: Path) -> list[Answer]:
    """Rows of LLaVA ({"question_id", "text"}), of predictions.jsonl ({"id", "text"}), or the VQA
    results list ([{"question_id", "answer"}]).
    """
    answers = [_answer(row, f"{path}, row {number}") for number, row in _rows(path)]
    if not answers:
        raise DataError(f"{path}: no answers in this file; give one row per answered question.")
    return answers


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                return _list_rows(path)
    return read_jsonl(path)


def _list_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = list(enumerate(read_json(path), start=1))
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number}: an answer must be a JSON object, given "
                f"{type(row).__name__}. Correct this row, or make the file again."
            )
    return rows


def _answer(row: dict[str, Any], where: str) -> Answer:
    name = row.get("question_id", row.get("id"))
    text = row.get("text", row.get("answer"))
    error = row.get("error")
    if name is None or (error is None and not isinstance(text, str)):
        raise DataError(
            f"{where}: an answer needs an id ('question_id' or 'id') and a text ('text' or "
            f"'answer'); this row has {', '.join(row) or 'nothing'}. Correct this row."
        )
    return Answer(
        id=str(name),
        text=text if isinstance(text, str) else "",
        prompt=row.get("prompt"),
        category=row.get("category"),
        error=None if error is None else str(error),
    )
