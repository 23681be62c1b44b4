"""What `verify` leaves: the manifest beside the data, and a file without the bad rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import HALVES, parse_row, sha256_file, write_atomic
from pumice.data.findings import Report
from pumice.data.sources import LlavaJson, Source
from pumice.data.written_rows import RowWriter

_SUFFIX = ".verify.jsonl"


def manifest_path(path: Path) -> Path:
    """Where the manifest of a data file or directory lies unless it is put elsewhere."""
    return path.with_name(path.name + _SUFFIX)


def write_manifest(path: Path, report: Report, policy: dict[str, Any]) -> None:
    """A JSONL file: the summary first, then every finding in the order of rows."""
    lines = [report.summary() | policy, *(finding.to_dict() for finding in report.findings)]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_clean_manifest(out: Path, left: int, report: Report, policy: dict[str, Any]) -> None:
    """The manifest of a clean file: what is noted of its rows, and what was dropped before."""
    bad = report.bad_rows
    kept = [finding for finding in report.findings if finding.row not in bad]
    clean = replace(report, file=str(out), fingerprint=sha256_file(out), rows=left, findings=kept)
    gone = [finding for finding in report.findings if finding.row in bad]
    dropped = {
        "from": Path(report.file).name,
        "rows": len(bad),
        "counts": replace(report, findings=gone).counts(),
    }
    line = clean.summary() | policy | {"dropped": dropped}
    write_atomic(manifest_path(out), json.dumps(line, ensure_ascii=False) + "\n")


def read_summary(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The summary of the manifest of a data file; None without one, or if the data changed since.

    Of the manifest only the first line is read.
    """
    manifest = manifest_path(path)
    if not manifest.is_file():
        return None
    with manifest.open("rb") as file:
        summary = parse_row(file.readline(), file=manifest, line=1)
    return summary if summary.get("fingerprint") == fingerprint else None


def refuse_same(file: Path, out: Path) -> None:
    """A copy may not take the place of the data it is made of."""
    if out.resolve() == file.resolve():
        raise PumiceError(f"--out {out} is the data file itself; give another name for the copy.")


def write_clean(source: Source, bad_rows: set[int], out: Path) -> int:
    """The rows without the bad ones; gives how many are left.

    Those of a JSON file are copied byte for byte, others written as `pumice data mix` writes them.
    """
    if isinstance(source, LlavaJson):
        refuse_same(source.path, out)
    good = [row for row in range(len(source)) if row not in bad_rows]
    if not good:
        raise DataError(
            f"every row of {source.name} has an error, so nothing would be left; at least one good "
            f"row is needed. See the manifest for what is wrong."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        with RowWriter(out, out.parent) as writer:
            with part.open("wb") as file:
                file.writelines(
                    _copied(source, good)
                    if isinstance(source, LlavaJson)
                    else (_line(writer.row(source, row)) for row in good)
                )
            part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return len(good)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", HALVES) + b"\n"


def _copied(source: LlavaJson, good: list[int]) -> Iterable[bytes]:
    listed = source.rows.is_list
    if listed:
        yield b"[\n"
    for number, row in enumerate(good):
        if listed and number:
            yield b",\n"
        yield source.rows.raw(row)
        if not listed:
            yield b"\n"
    if listed:
        yield b"\n]\n"
