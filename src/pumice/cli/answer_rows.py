"""The rows of `pumice generate`: requests read once, answers written as they come, resumable.

Each answer carries `key`, a hash of its request, the model and the settings. A row is kept on
resuming only when its key still fits, so an answer can never be one to another question.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import JsonlWriter, read_jsonl, sha256_bytes, write_atomic
from pumice.core.types import Request, Result, Sampling
from pumice.infer.requests import read_request

# Columns of a LLaVA question that its answer row carries on, as LLaVA's own scripts do.
_CARRIED = ("question_id", "image", "category")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the requests file. `row` is None when the line is not a JSON object."""

    number: int
    where: str
    key: str
    row: dict[str, Any] | None
    problem: str = ""

    def request(self, images: Path, sampling: Sampling) -> Request | Result:
        """The request in this line, named by its key; or the error it ends in."""
        if self.row is None:
            return Result(id=self.key, error=self.problem)
        try:
            request = read_request(self.row, images_dir=images, sampling=sampling, where=self.where)
        except PumiceError as error:
            return Result(id=self.key, error=str(error))
        return replace(request, id=self.key)

    def answer_row(self, result: Result) -> dict[str, Any]:
        """The row of the answers file. An error stands in place of the text."""
        row = self.row or {}
        named: dict[str, Any]
        if "question_id" in row:
            named = {name: row[name] for name in _CARRIED if name in row}
            named["prompt"] = row.get("text")
        else:
            named = {"id": row.get("id", f"line {self.number}")}
        if result.error is not None:
            # The engine knows the request by its key; a person looks for the line.
            error = result.error.replace(f"request {self.key!r}", self.where)
            return {**named, "error": error, "key": self.key}
        return {
            **named,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "image_tokens": result.image_tokens,
            "new_tokens": result.new_tokens,
            "key": self.key,
        }


def read_lines(path: Path, settings: Iterable[str]) -> list[Line]:
    """Every line of a requests file; one that is no JSON object is kept as a problem."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(
            f"the requests file {path} does not exist; give a JSONL file with one request a line."
        ) from error
    except OSError as error:
        raise DataError(
            f"the requests file {path} cannot be read ({error.strerror}); give a JSONL file with "
            "one request a line."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"the requests file {path} is not UTF-8 text ({error}); give a JSONL file with one "
            "request a line, saved as UTF-8."
        ) from error
    base = json.dumps(list(settings))
    seen: Counter[str] = Counter()
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        # Equal requests are told apart by their count, so that each gets its own row.
        seen[line] += 1
        key = sha256_bytes(f"{base} {seen[line]} {line}".encode())[:16]
        where = f"{path}, line {number}"
        row, problem = _parse(line, where)
        lines.append(Line(number, where, key, row, problem))
    if not lines:
        raise DataError(f"the requests file {path} is empty; give one request a line.")
    return lines


class Answers:
    """The answers file while it grows. Rows of a stopped run that still fit are kept."""

    def __init__(self, path: Path, lines: list[Line], *, resume: bool) -> None:
        self.path = path
        self._lines = lines
        self._rows = self._earlier() if resume else {}
        self.kept = len(self._rows)
        write_atomic(path, self._text())
        self._writer = JsonlWriter(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    @property
    def errors(self) -> int:
        """How many rows are errors so far."""
        return sum("error" in row for row in self._rows.values())

    def pending(self) -> list[Line]:
        """The lines without an answer, in their order."""
        return [line for line in self._lines if line.key not in self._rows]

    def write(self, line: Line, result: Result) -> None:
        """Append the answer to a line; it is on disk at once."""
        self._rows[line.key] = line.answer_row(result)
        self._writer.write(self._rows[line.key])

    def finish(self) -> None:
        """Put the rows in the order of the requests."""
        self._writer.close()
        write_atomic(self.path, self._text())

    def _text(self) -> str:
        rows = (self._rows[line.key] for line in self._lines if line.key in self._rows)
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _earlier(self) -> dict[str, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        known = {line.key for line in self._lines}
        rows = {}
        strangers = 0
        for _, row in read_jsonl(self.path, allow_cut_tail=True):
            if "error" in row:
                continue
            if row.get("key") in known:
                rows[row["key"]] = row
            else:
                strangers += 1
        if strangers:
            raise PumiceError(
                f"{self.path} holds {strangers} answers that these requests with this model and "
                "these settings did not give. Give another --out, or --resume never to replace "
                "the file."
            )
        return rows


def _parse(line: str, where: str) -> tuple[dict[str, Any] | None, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return None, (
            f"{where}, column {error.colno}: not valid JSON ({error.msg}); a request is one JSON "
            "object {...} on one line. Correct this line."
        )
    if not isinstance(row, dict):
        return None, (
            f"{where}: a request is a JSON object {{...}}, given {type(row).__name__}. Correct "
            "this line."
        )
    return row, ""
