"""`pumice data verify`: every row and image of a source is looked at, and nothing is changed.

Rows are read by the sources themselves and turns are judged by the templates' own check, so what
passes here is what training takes. The rest is found across rows: copies, and pictures that the
evaluation shows too.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from pumice.core.errors import DataError
from pumice.core.files import HALF_CHARACTER
from pumice.core.images import MAX_PIXELS
from pumice.core.progress import progress
from pumice.core.types import ImagePart, Sample
from pumice.data.findings import Finding, Report
from pumice.data.image_check import MIN_SIDE, ImageFacts, check_image, image_key, name_of
from pumice.data.picture_hash import PictureHash, same_pictures, stack
from pumice.data.row_layouts import SlotError, row_name
from pumice.data.sources import Source
from pumice.data.tar_source import PICTURES
from pumice.processing.turns import check_turns, split_system

A = TypeVar("A")
B = TypeVar("B")
# Those that are none as well: Python and JSON write them so.
_NUMBER = r"\s*([-+]?(?:\d*\.?\d+(?:e[-+]?\d+)?|nan|inf(?:inity)?))\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]", re.IGNORECASE)
_AHEAD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySpec:
    """What is checked beyond the rows themselves.

    `count_tokens` raises DataError for a conversation over `max_tokens`; None leaves lengths out.
    `evaluation` are directories of images that training must not hold, `ignore` are kinds that are
    not reported.
    """

    count_tokens: Callable[[Sample], object] | None = None
    max_tokens: int | None = None
    evaluation: tuple[Path, ...] = ()
    ignore: frozenset[str] = frozenset()
    max_pixels: int = MAX_PIXELS
    min_side: int = MIN_SIDE
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)


class _Row(NamedTuple):
    """What is kept of a row: for its own finds, and to compare it with the others."""

    row: int
    place: str
    id: str
    digest: bytes | None
    images: list[str]
    found: list[tuple[str, str, str]]


def verify(source: Source, spec: VerifySpec) -> Report:
    """Everything that is found in the rows of a source, in their order."""
    start = time.monotonic()
    pictures = _Pictures(spec)
    with progress(len(source), "verify") as bar:
        rows = []
        for row in _in_threads(
            range(len(source)), lambda row: _look(source, row, spec, pictures), spec.workers
        ):
            rows.append(row)
            bar.update(1)
    evaluation = _Pictures(spec)
    held_out = sorted(
        path
        for folder in spec.evaluation
        for path in (folder.rglob("*") if folder.is_dir() else [folder])
        if path.suffix[1:].lower() in PICTURES
    )
    for _ in _in_threads(held_out, evaluation.look, spec.workers):
        pass
    findings = [
        Finding(row.row, row.place, row.id, kind, reason, image)
        for row in rows
        for kind, reason, image in row.found
    ]
    findings += _copies(rows) + _same_images(rows, pictures) + _leaks(rows, pictures, evaluation)
    findings = [finding for finding in findings if finding.kind not in spec.ignore]
    return Report(
        source.name,
        source.fingerprint(),
        len(rows),
        len(pictures.facts),
        sorted(findings, key=lambda finding: finding.row),
        time.monotonic() - start,
        {
            "max_tokens": None if spec.count_tokens is None else spec.max_tokens,
            "evaluation_images": len(held_out),
            "ignored": sorted(spec.ignore),
        },
        [key for key, facts in evaluation.facts.items() if facts.hash is None],
    )


class _Pictures:
    """Every image once, however many rows show it."""

    def __init__(self, spec: VerifySpec) -> None:
        self.spec = spec
        self.facts: dict[str, ImageFacts] = {}
        self.names: dict[str, str] = {}
        self._lock = threading.Lock()

    def look(self, image: Path | bytes) -> str:
        """The key of an image, once it was looked at."""
        key = image_key(image)
        if key not in self.facts:
            spec = self.spec
            facts = check_image(image, max_pixels=spec.max_pixels, min_side=spec.min_side)
            with self._lock:
                self.facts.setdefault(key, facts)
                self.names.setdefault(key, name_of(image))
        return key

    def hashed(self) -> tuple[list[str], list[PictureHash]]:
        """The keys and hashes of the images that can be read, in a fixed order."""
        keys = sorted(key for key, facts in self.facts.items() if facts.hash is not None)
        return keys, [found for key in keys if (found := self.facts[key].hash) is not None]


def _in_threads(items: Iterable[A], work: Callable[[A], B], workers: int) -> Iterator[B]:
    """`work` of every item in their order; threads, because Pillow decodes outside the GIL."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pumice-verify")
    ahead: deque[Future[B]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _look(source: Source, row: int, spec: VerifySpec, pictures: _Pictures) -> _Row:
    """One row by itself."""
    try:
        sample = source[row]
    except DataError as error:
        kind = "slots" if isinstance(error, SlotError) else "row"
        return _Row(row, source.place(row), _name(source, row), None, [], [(kind, str(error), "")])
    where = f"sample {sample.id!r} ({sample.source})"
    found = [*_turn_faults(sample, where), *_box_faults(sample)]
    if spec.count_tokens is not None and not found:
        try:
            spec.count_tokens(sample)
        except DataError as error:
            found.append(("tokens", str(error), ""))
    keys = []
    for part in sample.images:
        assert isinstance(part.image, Path | bytes), "sources give files or their bytes"
        key = pictures.look(part.image)
        keys.append(key)
        found += [(kind, reason, pictures.names[key]) for kind, reason in pictures.facts[key][0]]
    # A picture shown twice in a row is one find.
    found = list(dict.fromkeys(found))
    return _Row(row, sample.source, sample.id, _row_digest(sample, keys), keys, found)


def _name(source: Source, row: int) -> str:
    """The id of a row that gives no sample, where it can be read."""
    try:
        return row_name(source.content(row), row)
    except DataError:
        return str(row)


def _turn_faults(sample: Sample, where: str) -> list[tuple[str, str, str]]:
    for number, message in enumerate(sample.messages, start=1):
        if HALF_CHARACTER.search(message.text):
            what = f"{where}: turn {number} holds half a character (a lone surrogate), which is no"
            return [("row", f"{what} text. Mend it, or remove the sample.", "")]
    try:
        _, turns = split_system(sample.messages, where)
        check_turns(turns, open_turn=False, where=where)
    except DataError as error:
        return [("turns", str(error), "")]
    for number, turn in enumerate(turns, start=1):
        if not turn.text.strip() and not turn.images:
            what = f"{where}: turn {number} is an empty question; a text, an image or both are"
            return [("turns", f"{what} needed. Ask something, or remove the sample.", "")]
    return []


def _box_faults(sample: Sample) -> list[tuple[str, str, str]]:
    """Boxes as LLaVA writes them: [x0, y0, x1, y1] with decimals, parts of the picture's sides."""
    if not sample.images:
        return []
    faults = []
    for message in sample.messages:
        for match in _BOX.finditer(message.text):
            x0, y0, x1, y1 = (float(number) for number in match.groups())
            finite = all(map(math.isfinite, (x0, y0, x1, y1)))
            # Whole numbers are years, choices and sums more often than boxes.
            if finite and sum("." in number for number in match.groups()) < 2:
                continue
            if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
                reason = f"the box {match[0]} is not within 0..1, left before right, top before"
                faults.append(("box", f"{reason} bottom", ""))
    return faults


def _row_digest(sample: Sample, keys: list[str]) -> bytes:
    digest = hashlib.sha256()
    left = iter(keys)
    for message in sample.messages:
        digest.update(f"\0{message.role}\0".encode())
        for part in message.content:
            text = f"\1{next(left)}\1" if isinstance(part, ImagePart) else part.text
            digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()[:16]


def _copies(rows: list[_Row]) -> list[Finding]:
    """Rows whose conversation, or else whose id, stood before."""
    findings = []
    rows_seen: dict[bytes, str] = {}
    ids_seen: dict[str, str] = {}
    for row in rows:
        kind, before = "", ""
        if row.digest is not None and row.digest in rows_seen:
            kind, before = "duplicate_row", rows_seen[row.digest]
        elif row.id in ids_seen:
            kind, before = "duplicate_id", ids_seen[row.id]
        if kind:
            what = "the same conversation" if kind == "duplicate_row" else f"the id {row.id!r}"
            reason = f"{what} stands in {before}"
            findings.append(Finding(row.row, row.place, row.id, kind, reason))
        if row.digest is not None:
            rows_seen.setdefault(row.digest, row.place)
        ids_seen.setdefault(row.id, row.place)
    return findings


def _same_images(rows: list[_Row], pictures: _Pictures) -> list[Finding]:
    """Pictures that stand in several files: told at the first row of each file but the first."""
    first: dict[str, _Row] = {}
    for row in rows:
        for key in row.images:
            first.setdefault(key, row)
    keys = [key for key in first if pictures.facts[key].hash is not None]
    hashes = [found for key in keys if (found := pictures.facts[key].hash) is not None]
    findings, told = [], set()
    for left, right in same_pictures(stack(hashes)).tolist():
        if right in told:
            continue
        told.add(right)
        one, other = keys[left], keys[right]
        equal = pictures.facts[one].digest == pictures.facts[other].digest
        how = "is a copy of" if equal else "shows the same as"
        row, name = first[other], pictures.names[other]
        reason = f"image {name} {how} {pictures.names[one]} of {first[one].place}"
        findings.append(Finding(row.row, row.place, row.id, "duplicate_image", reason, name))
    return findings


def _leaks(rows: list[_Row], pictures: _Pictures, evaluation: _Pictures) -> list[Finding]:
    train, own = pictures.hashed()
    held_out, other = evaluation.hashed()
    if not train or not held_out:
        return []
    pairs = same_pictures(stack(own + other), first=len(own))
    shown = {train[a]: evaluation.names[held_out[b - len(own)]] for a, b in pairs.tolist()}
    return [
        Finding(
            row.row,
            row.place,
            row.id,
            "leak",
            f"image {pictures.names[key]} shows the same as the evaluation image {shown[key]}",
            pictures.names[key],
        )
        for row in rows
        for key in dict.fromkeys(row.images)
        if key in shown
    ]
