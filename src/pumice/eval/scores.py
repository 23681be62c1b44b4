"""The content of scores.json, and how a set of rows becomes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pumice.core.types import Prediction
from pumice.eval.benchmark import UNJUDGED, Benchmark, Item, Row
from pumice.eval.metrics import Metrics, base_rate, bootstrap, by_category, evaluate

_WITHHELD = "the score is withheld"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One benchmark's result. `metrics` None means the score is withheld; `notes` says why.

    `n` counts the benchmark's items; `unparsed`, `missing` and `errors` are counted among them.
    """

    benchmark: str
    metrics: Metrics | None
    n: int
    unparsed: int
    missing: int
    errors: int
    interval: dict[str, tuple[float, float]]
    protocol: dict[str, Any]
    base_rate: Metrics
    by_category: dict[str, Metrics]
    notes: tuple[str, ...] = field(default=())
    judged: bool = True
    """False: the truths are with a server, so there cannot be a score here."""
    judge: dict[str, Any] = field(default_factory=dict)
    """Of a benchmark that a judge scores: who it was, what it is comparable with, its runs."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Of a run: the data directory, the hash of the weights, and which items were asked how."""

    @property
    def withheld(self) -> bool:
        """True when there is no number to be quoted."""
        return self.metrics is None

    @property
    def failed(self) -> bool:
        """True when something went wrong: answers are lacking, or a score that could be is not."""
        return self.withheld and bool(self.judged or self.errors or self.missing)

    @property
    def label(self) -> str:
        """The benchmark's name, with its control and with who judged the answers, if any."""
        control = self.protocol.get("control")
        told = [f"{control} images" if control else "", self.judge.get("name", "")]
        return " ".join([self.benchmark, *(f"({one})" for one in told if one)])

    @property
    def caution(self) -> str:
        """What stands beside the score: why there is none, or how little it compares with."""
        if self.withheld:
            return self.notes[0] if self.notes else ""
        reach = self.judge.get("comparable", "published")
        told = {"same judge": "comparable by the same judge only", "no other": "not comparable"}
        return f"{self.judge['name']}: {told[reach]}" if reach in told else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in the order of the file."""
        plain = asdict(self)
        plain["interval"] = {name: list(pair) for name, pair in self.interval.items()}
        plain["notes"] = list(self.notes)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Scores:
        """What `to_dict` gave; keys that a scores.json of another version has are left out."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in plain.items() if name in known}
        given["interval"] = {name: (low, high) for name, (low, high) in plain["interval"].items()}
        given["notes"] = tuple(plain["notes"])
        return cls(**given)


def make_scores(
    benchmark: Benchmark,
    items: Sequence[Item],
    rows: Sequence[Row],
    *,
    protocol: dict[str, Any],
    notes: Sequence[str] = (),
    flawed: bool = False,
    allow_errors: bool = False,
    finished: bool = True,
    origin: dict[str, Any] | None = None,
) -> Scores:
    """Scores of the answered rows; a row with an error, or without a verdict, has no score.

    Errors, unanswered items (unless the official scorer counts them as wrong) and answers that do
    not fit the items withhold the score, unless `allow_errors`: then the rest is scored. A run that
    is not `finished` has no score: what it did not ask yet is neither wrong nor to be left out.
    """
    answered = [row for row in rows if row.fault is None]
    errors = len(rows) - len(answered)
    missing = len(items) - len(rows)
    # What a judge said and nobody can read is no score either.
    scored = [row for row in answered if row.prediction.score is not None or not benchmark.judged]
    judge, judge_notes = benchmark.judge_summary(rows)
    reasons = list(notes)
    if finished:
        reasons += _reasons(benchmark, rows, missing, withheld=not allow_errors)
    else:
        reasons.append(_unfinished(len(items), missing, rows))
    illegible = _illegible(len(scored), len(answered), allow_errors) if finished else []
    reasons += illegible + judge_notes
    lacking = missing and not benchmark.missing_is_wrong
    withheld = not (scored and finished)
    if benchmark.missing_is_wrong:
        scored += _unanswered(items, rows)
    withheld |= not allow_errors and bool(errors or lacking or flawed or illegible)
    metrics, undefined = (None, []) if withheld else _measured(benchmark, scored)
    reasons[:0] = undefined
    if not benchmark.judged:
        metrics = None
        reasons.append(
            "the truths of this split are with the evaluation server, so nothing is scored here; "
            "write the file it takes with `pumice submit`"
        )
    return Scores(
        benchmark=benchmark.name,
        metrics=metrics,
        n=len(items),
        unparsed=sum(row.prediction.parsed is None for row in answered),
        missing=missing,
        errors=errors,
        interval={} if metrics is None else bootstrap(benchmark, scored),
        protocol=protocol,
        base_rate=base_rate(benchmark, items) if finished else {},
        by_category={} if metrics is None else by_category(benchmark, scored),
        notes=tuple(reasons),
        judged=benchmark.judged,
        judge=judge,
        origin=origin or {},
    )


def fingerprint(value: object) -> str:
    """A short hash of plain values; equal values give equal hashes on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Served:
    """A model behind an endpoint: where, its name there, and how it is asked.

    `extra` are keys of every request beside the usual ones.
    """

    url: str
    model: str
    images: str
    extra: dict[str, Any] = field(default_factory=dict)

    def protocol(self) -> dict[str, Any]:
        """What a protocol has to say that leaves these things to a server."""
        return {
            **({"request_extra": self.extra} if self.extra else {}),
            "prompt_template": "the server's own",
            "images_sent": {
                "as-is": "the files' bytes; preparing them is the server's",
                "square": "padded to a square with CLIP's mean colour",
            }[self.images],
        }


def full_protocol(
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    control: str | None = None,
    served: Served | None = None,
) -> dict[str, Any]:
    """The benchmark's protocol with the items it was applied to and its fingerprint.

    Two scores are comparable when their fingerprints are equal.
    """
    protocol = row_protocol(benchmark, control=control, served=served)
    if judging := benchmark.judging(items):
        protocol |= {"judge": judging, "options": benchmark.chosen}
    protocol["items"] = len(items)
    protocol["items_hash"] = fingerprint(
        [(item.id, item.prompt, item.truth, item.image and item.image.name) for item in items]
    )
    protocol["fingerprint"] = fingerprint(protocol)
    return protocol


def row_protocol(
    benchmark: Benchmark, *, control: str | None, served: Served | None = None
) -> dict[str, Any]:
    """What decides a single row's answer and score, whichever other rows there are."""
    return {
        "benchmark": benchmark.name,
        "protocol": "paper" if benchmark.as_published else "own",
        **benchmark.protocol(),
        **({"options": options} if (options := benchmark.row_options) else {}),
        "max_new_tokens": benchmark.max_new_tokens,
        "temperature": 0.0,
        "control": control,
        **(served.protocol() if served is not None else {}),
    }


def _unanswered(items: Sequence[Item], rows: Sequence[Row]) -> list[Row]:
    seen = {row.item.id for row in rows}
    return [
        Row(
            item,
            Prediction(
                id=item.id, prompt_hash="", text="", parsed=None, score=0.0, extra={"missing": True}
            ),
        )
        for item in items
        if item.id not in seen
    ]


def _measured(benchmark: Benchmark, rows: Sequence[Row]) -> tuple[Metrics | None, list[str]]:
    """The metrics, None where there is not one; and a note where the headline is not among them.

    It then is a mean of nothing, or a judge's "nan" is in it.
    """
    metrics = evaluate(benchmark, rows)
    if benchmark.headline in metrics:
        return metrics, []
    end = "it is not among the metrics" if metrics else _WITHHELD
    told = f"{benchmark.headline.replace('_', ' ')} is not defined for these answers; {end}"
    return metrics or None, [told]


def _illegible(scored: int, answered: int, allow_errors: bool) -> list[str]:
    """The few answers of which a judge made sense are no sample of all of them."""
    if 2 * scored >= answered:
        return []
    end = "these alone are scored" if allow_errors else _WITHHELD
    told = f"only {scored} of {answered} answers have a verdict that can be read"
    return [f"{told}, less than half; {end}"]


def _unfinished(items: int, missing: int, rows: Sequence[Row]) -> str:
    told = f"{missing} of {items} items were not asked yet"
    unjudged = [row for row in rows if UNJUDGED in row.prediction.extra]
    if unjudged and not missing:
        told = f"{len(unjudged)} of {items} answers were not judged yet"
    return (
        f"the run has not finished: {told}, so the score is withheld; give the same command again "
        f"to go on"
    )


def _reasons(
    benchmark: Benchmark, rows: Sequence[Row], missing: int, *, withheld: bool
) -> list[str]:
    end = _WITHHELD if withheld else "they are left out of the score"
    errors = [row.prediction for row in rows if row.prediction.error is not None]
    unjudged = [row.prediction.extra.get(UNJUDGED) for row in rows if row.prediction.error is None]
    unjudged = [reason for reason in unjudged if reason]
    reasons = []
    if errors:
        first = f"the first, {errors[0].id}: {errors[0].error}"
        reasons.append(
            f"{len(errors)} items ended in an error, which is not an answer ({first}); {end}"
        )
    if unjudged:
        reasons.append(
            f"{len(unjudged)} answers have no verdict (the first: {unjudged[0]}); {end}; "
            f"the same command asks for them again"
        )
    if missing and benchmark.missing_is_wrong:
        reasons.append(
            f"{missing} items have no answer and {benchmark.missing_fate}, as officially defined"
        )
    elif missing:
        reasons.append(f"{missing} items have no answer; {end}")
    return reasons
