"""The rows of a run on disk: what is kept of them, and how several processes write them.

`predictions.jsonl` holds the rows of the run as it was asked last, in the items' order. Rows of
other runs in the same directory (another model, another limit) are not thrown away: they lie in
`predictions.previous.jsonl`, and are taken from there when they fit again. While several processes
ask, each appends to a file of its own. A kill at any moment leaves nothing but whole rows and at
most one cut line, which is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pumice.core.files import read_jsonl, write_atomic
from pumice.core.log import get_logger
from pumice.core.types import Prediction, Result
from pumice.eval.benchmark import Answer, Benchmark, Item, Row
from pumice.eval.metrics import score_item
from pumice.eval.scores import fingerprint
from pumice.eval.verdicts import verdicts_in

log = get_logger(__name__)

PREDICTIONS = "predictions.jsonl"
_PREVIOUS = "predictions.previous.jsonl"
_OF_RANK = "predictions.rank-{}.jsonl"


@dataclass(frozen=True, slots=True)
class PredictionFiles:
    """The files of one run of a benchmark; `key` (protocol, weights) says whose rows fit."""

    directory: Path
    benchmark: Benchmark
    items: Sequence[Item]
    key: Mapping[str, str]
    control: str | None = None

    @property
    def path(self) -> Path:
        """predictions.jsonl."""
        return self.directory / PREDICTIONS

    def of_rank(self, rank: int) -> Path:
        """Where process `rank` of several appends."""
        return self.directory / _OF_RANK.format(rank)

    def gather(self) -> dict[str, Row]:
        """The answers on disk that fit, by item id, after putting all files in order.

        An error is no answer, so its item is asked again.
        """
        by_id = {item.id: item for item in self.items}
        kept: dict[str, Row] = {}
        other: dict[tuple[str, ...], dict[str, Any]] = {}
        strangers = 0
        for path in (self.directory / _PREVIOUS, *self._rank_files(), self.path):
            for old in _rows(path):
                row = self._row(old, by_id)
                if row is None:
                    strangers += path.name != _PREVIOUS
                    other[_identity(old)] = old
                elif row.prediction.error is None:
                    kept[row.item.id] = row
        if strangers:
            # First, so that a kill in between leaves rows in both files and none in neither.
            lines = (json.dumps(old, ensure_ascii=False) + "\n" for old in other.values())
            write_atomic(self.directory / _PREVIOUS, "".join(lines))
            log.info("%d rows of other runs are kept in %s", strangers, self.directory / _PREVIOUS)
        self.settle(kept)
        return kept

    def read(self) -> dict[str, Row]:
        """The rows in predictions.jsonl as `gather` left it, by item id."""
        return self._fitting(self.path)

    def answered_by_ranks(self) -> dict[str, Row]:
        """The rows, errors among them, that the processes of this run have written so far."""
        rows: dict[str, Row] = {}
        for path in self._rank_files():
            rows |= self._fitting(path)
        return rows

    def settle(self, rows: Mapping[str, Row]) -> None:
        """Makes predictions.jsonl hold these rows in the items' order; the processes' files go."""
        lines = [
            json.dumps(rows[item.id].prediction.to_dict(), ensure_ascii=False) + "\n"
            for item in self.items
            if item.id in rows
        ]
        write_atomic(self.path, "".join(lines))
        for path in self._rank_files():
            path.unlink()

    def row(self, item: Item, result: Result, verdicts: Mapping[str, Any] | None = None) -> Row:
        """The row of one result, with what a later run needs to know it again.

        `verdicts` are those that a judge gave on it earlier.
        """
        answer = Answer(item.id, result.text, error=result.error)
        row = answered_row(self.benchmark, item, answer, verdicts)
        extra = {
            **row.prediction.extra,
            **self.key,
            "category": item.category,
            "question_hash": question_hash(item),
            **({"control": self.control} if self.control else {}),
        }
        return Row(item, replace(row.prediction, prompt_hash=prompt_hash(item), extra=extra))

    def _fitting(self, path: Path) -> dict[str, Row]:
        by_id = {item.id: item for item in self.items}
        rows = (self._row(old, by_id) for old in _rows(path))
        return {row.item.id: row for row in rows if row is not None}

    def _row(self, old: Mapping[str, Any], by_id: Mapping[str, Item]) -> Row | None:
        """The row of these files, parsed and scored anew: only what was said is taken over."""
        item = by_id.get(str(old.get("id")))
        extra = old.get("extra") or {}
        if (
            item is None
            or not isinstance(old.get("text"), str)
            or any(extra.get(name) != value for name, value in self.key.items())
            or old.get("prompt_hash") != prompt_hash(item)
        ):
            return None
        result = Result(id=item.id, text=old["text"], error=old.get("error"))
        return self.row(item, result, verdicts_in(extra))

    def _rank_files(self) -> list[Path]:
        return sorted(self.directory.glob(_OF_RANK.format("*")))


def answered_row(
    benchmark: Benchmark, item: Item, answer: Answer, verdicts: Mapping[str, Any] | None = None
) -> Row:
    """An answer, scored; an error is kept as an error and has no score.

    `verdicts` are what `verdicts_in` gave for this answer.
    """
    if answer.error is None:
        extra = {} if answer.prompt is None else {"prompt": answer.prompt}
        return score_item(benchmark, item, answer.text, {**extra, **(verdicts or {})})
    failed = Prediction(
        id=item.id,
        prompt_hash="",
        text=answer.text,
        parsed=None,
        score=None,
        error=answer.error,
    )
    return Row(item, failed)


def prompt_hash(item: Item) -> str:
    """Names what is asked: the prompt and the image file (its name and size)."""
    image = item.image
    size = image.stat().st_size if image is not None and image.is_file() else 0
    return fingerprint([item.prompt, image and image.name, size])


def question_hash(item: Item) -> str:
    """Names what is asked, the prompt alone: for those who have no images."""
    return fingerprint(item.prompt)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for _, old in read_jsonl(path, allow_cut_tail=True):
            yield old


def _identity(old: Mapping[str, Any]) -> tuple[str, ...]:
    extra = old.get("extra") or {}
    names = (old.get("id"), old.get("prompt_hash"), extra.get("protocol"), extra.get("weights"))
    return tuple(map(str, names))
