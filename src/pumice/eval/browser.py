"""The part of report.html in which predictions are looked through: image, question, answer, truth.

Everything is inside the page. What does not fit in is drawn evenly and counted in words.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.images import open_image
from pumice.eval.benchmark import Benchmark, Item, Row
from pumice.eval.compare import items_of_run, rows_of_run
from pumice.eval.runner import take_evenly
from pumice.eval.scores import Scores

# What a page may grow to: it is sent by mail and opened on telephones.
MOST_PREDICTIONS = 2000
MOST_IMAGE_BYTES = 6_000_000
THUMBNAIL = 288
# Below this a score is shown as wrong: benchmarks with part marks give between 0 and 1.
_RIGHT_FROM = 0.5


@dataclass(slots=True)
class Browser:
    """Collects predictions until a page is full; `total` counts all there were."""

    total: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    _places: dict[Path, int | None] = field(default_factory=dict)
    _image_bytes: int = 0

    def add_run(self, benchmark: Benchmark, folder: Path, scores: Scores, parts: int = 1) -> None:
        """Adds the predictions of a run's directory, within one of the parts of what is free."""
        items = items_of_run(benchmark, folder, scores)
        rows = rows_of_run(folder, benchmark, items, scores)
        asked = [item for item in items if item.id in rows]
        self.total += len(asked)
        budget = self._image_bytes + (MOST_IMAGE_BYTES - self._image_bytes) // parts
        most = max(1, (MOST_PREDICTIONS - len(self.rows)) // parts)
        for item in _drawn(asked, rows, most):
            self._add(benchmark, item, rows[item.id], budget)

    def _add(self, benchmark: Benchmark, item: Item, row: Row, budget: int) -> None:
        prediction = row.prediction
        self.rows.append(
            {
                "bench": benchmark.title,
                "id": item.id,
                "category": item.category,
                "question": item.prompt,
                "answer": prediction.text,
                "read": prediction.parsed,
                "truth": benchmark.truth_text(item) if benchmark.judged else "",
                "score": prediction.score,
                "error": row.fault,
                "verdict": _verdict(row),
                "image": self._image(item.image, budget),
            }
        )

    def _image(self, path: Path | None, budget: int) -> int | None:
        if path is None:
            return None
        if path not in self._places:
            self._places[path] = None
            code = _thumbnail(path) if self._image_bytes < budget else None
            if code is not None:
                self._places[path] = len(self.images)
                self.images.append(code)
                self._image_bytes += len(code)
        return self._places[path]

    def counts(self) -> str:
        """How much of the whole is on the page, in a sentence."""
        errors = " after the errors" if any(row["error"] for row in self.rows) else ""
        shown = (
            f"All {self.total:,} predictions"
            if len(self.rows) == self.total
            else f"{len(self.rows):,} of {self.total:,} predictions, drawn evenly{errors}"
        )
        pictures = sum(1 for path in self._places if path is not None)
        images = f"{len(self.images):,} of their {pictures:,} images"
        if len(self.images) == pictures:
            images = f"all their {pictures:,} images"
        return f"{shown}, with {images}, made small."

    def section(self) -> str:
        """The section of the page; empty without predictions."""
        if not self.rows:
            return ""
        data = json.dumps({"rows": self.rows, "images": self.images}, ensure_ascii=False)
        # Inside a script element only "<" could end it or begin a comment.
        data = data.replace("<", "\\u003c")
        return (
            '<section class="browser">\n<h2>Predictions</h2>\n'
            f'<p class="lead">{escape(self.counts())} Keys: j and k or the arrows move, '
            f"1 to 5 filter, / searches.</p>\n{_FRAME}\n"
            f'<script type="application/json" id="predictions">{data}</script>\n'
            f"<script>{_script()}</script>\n</section>"
        )


def script_hash() -> str:
    """What a content security policy names the page's only script by."""
    digest = hashlib.sha256(_script().encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def browse(runs: Sequence[tuple[Benchmark, Path, Scores]]) -> Browser:
    """The predictions of several runs, in their order.

    Each has an equal share of the page; what small ones leave free goes to the larger.
    """
    browser = Browser()
    smallest_first = sorted(runs, key=lambda run: run[2].n)
    for done, (benchmark, folder, scores) in enumerate(smallest_first):
        browser.add_run(benchmark, folder, scores, len(runs) - done)
    places = {benchmark.title: place for place, (benchmark, _, _) in enumerate(runs)}
    browser.rows.sort(key=lambda row: places[row["bench"]])
    return browser


def _drawn(items: list[Item], rows: Mapping[str, Row], most: int) -> list[Item]:
    """As many of the items, spread evenly, in their order; before others those without a score.

    A few errors withhold the score, so they must be among thousands of predictions.
    """
    faulty = [item for item in items if rows[item.id].fault is not None]
    drawn = take_evenly(faulty, most)
    if most > len(drawn):
        sound = [item for item in items if rows[item.id].fault is None]
        drawn = drawn + take_evenly(sound, most - len(drawn))
    names = {item.id for item in drawn}
    return [item for item in items if item.id in names]


def _script() -> str:
    return (files("pumice.eval") / "browser.js").read_text(encoding="utf-8")


def _verdict(row: Row) -> str:
    prediction = row.prediction
    if row.fault is not None:
        return "error"
    if prediction.parsed is None:
        return "unparsed"
    if prediction.score is None:
        return "unscored"
    return "right" if prediction.score >= _RIGHT_FROM else "wrong"


def _thumbnail(path: Path) -> str | None:
    """A data address of the image, made small; None when it cannot be read."""
    try:
        image = open_image(path)
    except DataError:
        return None
    small = max(image.size) <= THUMBNAIL // 2
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=78)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


_FILTERS = "".join(
    f'<button type="button" data-verdict="{name}">{title} <b></b></button>'
    for name, title in (
        ("", "All"), ("wrong", "Wrong"), ("right", "Right"), ("unparsed", "Unparsed"),
        ("error", "Errors"),
    )
)  # fmt: skip
_FRAME = (
    '<noscript><p class="note">The browser of predictions needs scripts.</p></noscript>'
    f'<div class="tools"><select aria-label="Benchmark"></select>'
    f'<div class="filters" role="group" aria-label="Verdict">{_FILTERS}</div>'
    '<input type="search" placeholder="Search question, answer, truth" aria-label="Search">'
    '<span class="count" aria-live="polite"></span></div>'
    '<div class="panes"><ol class="list" tabindex="0" aria-label="Predictions"></ol>'
    '<article class="detail" aria-live="polite"></article></div>'
)
