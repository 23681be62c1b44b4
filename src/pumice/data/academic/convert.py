"""From official files to one file of rows, and the report of what became of everything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pumice.core.errors import DataError, some_of
from pumice.core.files import sha256_file, write_atomic, write_json
from pumice.data.academic import CONVERTERS
from pumice.data.academic.base import Official, Row, Tally, Task, read_rules

MissingImages = Literal["error", "drop"]


def convert(
    source: str,
    annotations: Sequence[Path],
    out: Path,
    *,
    images: Path | None = None,
    missing_images: MissingImages = "error",
    rules: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the rows of a source to `out` (JSON list; JSON lines where it ends in .jsonl).

    With `images` each row's image must be there. Beside `out` lies the report, which is given back:
    the rules, the files' hashes, and how many of what was read were kept, changed and dropped.
    """
    converter = CONVERTERS[source]
    if not annotations:
        raise DataError(
            f"no annotation files were given for {source}; it is made from {converter.files}. Give "
            f"them with --annotations."
        )
    chosen = read_rules(source, converter.rules, rules or {})
    tally = Tally()
    rows: Iterable[Row] = converter.rows(Task(Official(annotations), chosen, tally))
    if images is not None:
        rows = _with_images(rows, images, missing_images, tally)
    kept = list(rows)
    if not kept:
        raise DataError(
            f"{source}: nothing is left of {tally.read:,} entries of "
            f"{some_of([str(path) for path in annotations])}: {_words(tally)}. Check the rules and "
            f"the files."
        )
    tally.rows, tally.rounds = len(kept), sum(len(row["conversations"]) // 2 for row in kept)
    write_atomic(out, _written(kept, lines=out.suffix == ".jsonl"))
    report = _report(source, chosen.model_dump(), annotations, out, tally)
    write_json(report_path(out), report)
    return report


def report_path(out: Path) -> Path:
    """Where the report of a file of rows lies."""
    return out.with_name(out.name + ".convert.json")


def _with_images(
    rows: Iterable[Row], images: Path, missing: MissingImages, tally: Tally
) -> Iterator[Row]:
    if not images.is_dir():
        raise DataError(
            f"--images {images} is no directory; the one below which rows name their images is "
            f"needed. Check it, or leave it out to check nothing."
        )
    absent: list[str] = []
    for row in rows:
        if "image" not in row or (images / row["image"]).is_file():
            yield row
        else:
            absent.append(row["image"])
    tally.dropped["row whose image is missing"] += len(absent)
    if absent and missing == "error":
        raise DataError(
            f"{len(absent):,} rows name an image that is not below {images}: {some_of(absent, 4)}. "
            f"Download what is missing, correct --images or the rule image=..., or leave such rows "
            f"out with --missing-images drop."
        )


def _written(rows: Sequence[Row], *, lines: bool) -> str:
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    return "\n".join(texts) + "\n" if lines else "[\n" + ",\n".join(texts) + "\n]\n"


def _report(
    source: str, rules: dict[str, Any], files: Sequence[Path], out: Path, tally: Tally
) -> dict[str, Any]:
    return {
        "source": source,
        "out": out.name,
        "sha256": sha256_file(out),
        "read": tally.read,
        "rows": tally.rows,
        "rounds": tally.rounds,
        "dropped": _counted(tally.dropped),
        "changed": _counted(tally.changed),
        "rules": rules,
        "annotations": {file.name: sha256_file(file) for file in files},
    }


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: int(count) for reason, count in counts.items() if count}


def _words(tally: Tally) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in _counted(tally.dropped).items()) or "no entries"
