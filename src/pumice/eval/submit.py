"""Files for the evaluation servers, from answers: the columns, ids and normalising they take.

They are those of LLaVA-1.5's own converters, so that its published uploads come out of its answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pumice.core.errors import DataError
from pumice.core.files import write_atomic
from pumice.core.registry import Registry
from pumice.eval.answers import normalise_m4c
from pumice.eval.benchmark import Benchmark, Item
from pumice.eval.benchmarks.mmbench import SHEET_COLUMNS
from pumice.eval.locate import check_data_dir, load_items
from pumice.eval.matching import match_file, told
from pumice.eval.tables import write_sheet

Told = tuple[Item, str]
"""An item and its answer; "" where there is none and that was allowed."""


@dataclass(frozen=True, slots=True)
class Server:
    """How a server takes answers. `options` are its split's, under what a user chooses.

    An answer is written as `normalise` makes it.
    """

    suffix: str
    write: Callable[[Path, Sequence[Told]], None]
    options: dict[str, str] = field(default_factory=dict)
    normalise: Callable[[str], str] = str


@dataclass(frozen=True, slots=True)
class Submission:
    """What was written: how many rows, how many of them empty, and what a reader must be told."""

    path: Path
    rows: int
    empty: int
    notes: tuple[str, ...] = ()


def write_submission(
    benchmark: Benchmark,
    data_dir: Path,
    answers_file: Path,
    out: Path,
    *,
    empty_missing: bool = False,
) -> Submission:
    """Writes `out` with one row for each question of the benchmark, in its order.

    A question without an answer, or whose answer is an error, is an error here, unless
    `empty_missing`: then its row is empty. VQAv2's server wants every test question that way, also
    for test-dev.
    """
    server = SERVERS[benchmark.name]
    if out.suffix != server.suffix:
        raise DataError(
            f"{out}: the server of {benchmark.title} takes a {server.suffix} file. Name it so."
        )
    check_data_dir(data_dir)
    items = load_items(benchmark, data_dir)
    matching, other = match_file(benchmark, items, answers_file)
    if other:
        raise DataError(
            f"{answers_file}: {told(matching, other, benchmark.title)}. The server would take them "
            f"for answers to its own questions, so nothing is written."
        )
    texts = {name: answer.text for name, answer in matching.answers.items() if not answer.error}
    missing = [item.id for item in items if item.id not in texts]
    if missing and not empty_missing:
        raise DataError(
            f"{answers_file}: {len(missing)} of {len(items)} questions of {benchmark.title} have "
            f"no answer (the first: {', '.join(missing[:3])}). "
            + "".join(f"{note}. " for note in matching.notes)
            + "Answer them all, or write empty answers for them with --empty-missing."
        )
    answered = [(item, server.normalise(texts.get(item.id, ""))) for item in items]
    server.write(out, answered)
    empty = sum(not text.strip() for _, text in answered)
    return Submission(out, len(items), empty, matching.notes)


def _vqav2(out: Path, told: Sequence[Told]) -> None:
    _write_json(out, [{"question_id": int(item.id), "answer": text} for item, text in told])


def _vizwiz(out: Path, told: Sequence[Told]) -> None:
    _write_json(out, [{"image": item.extra["image"], "answer": text} for item, text in told])


def _gqa(out: Path, told: Sequence[Told]) -> None:
    _write_json(out, [{"questionId": item.id, "prediction": text} for item, text in told])


def _gqas(text: str) -> str:
    return text.rstrip(".").lower()


def _mmvet(out: Path, told: Sequence[Told]) -> None:
    write_atomic(out, json.dumps({item.id: text for item, text in told}, indent=2))


def _write_json(out: Path, rows: Sequence[Mapping[str, object]]) -> None:
    write_atomic(out, json.dumps(rows))


def _seed_bench(out: Path, told: Sequence[Told]) -> None:
    rows = [{"question_id": item.extra["question_id"], "prediction": text} for item, text in told]
    write_atomic(out, "".join(json.dumps(row) + "\n" for row in rows))


def _mmbench(out: Path, told: Sequence[Told]) -> None:
    names = [name for name in SHEET_COLUMNS if name == "prediction" or name in _cells(told)]
    rows = []
    for item, text in told:
        cells = {**item.extra["cells"], "index": int(item.id), "prediction": text or None}
        rows.append([cells[name] for name in names])
    write_sheet(out, names, rows)


def _cells(told: Sequence[Told]) -> set[str]:
    return set(told[0][0].extra["cells"]) if told else set()


SERVERS: Registry[Server] = Registry(
    "benchmark with a server",
    {
        "vqav2": Server(".json", _vqav2, {"split": "test2015"}, normalise_m4c),
        "vizwiz": Server(".json", _vizwiz, {"split": "test"}, normalise_m4c),
        "mmbench": Server(".xlsx", _mmbench),
        "mmbench_cn": Server(".xlsx", _mmbench),
        "gqa": Server(".json", _gqa, normalise=_gqas),
        "seed_bench": Server(".jsonl", _seed_bench),
        "mmvet": Server(".json", _mmvet),
    },
)
