"""Two runs of one benchmark, question by question: differences with paired intervals.

Two scores with overlapping intervals may differ clearly, since both models were asked about the
same images: what makes an image hard counts for both. So images are drawn anew, and each draw gives
both scores and their difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import read_json
from pumice.eval.benchmark import Benchmark, Item, Row
from pumice.eval.choose import benchmark_of
from pumice.eval.controls import CONTROLS
from pumice.eval.metrics import evaluate, paired_draws
from pumice.eval.prediction_files import PREDICTIONS, PredictionFiles
from pumice.eval.runner import SCORES, Asking
from pumice.eval.scores import Scores

# What a server does of its own is a part of its model, as the template is of a model here; so a
# model here and one behind an endpoint can be compared.
_MODELS_OWN = ("fingerprint", "prompt_template", "images_sent", "request_extra")


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of both runs; `difference` is B - A, with its 95 % interval."""

    a: float
    b: float
    difference: float
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """True when the interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs over the `n` items that both answered, in `groups` images.

    `name` is the benchmark with its control, where there is one: "pope-shuffled".

    `left_out` counts items that one of them did not answer. `a_better` and `b_better` count the
    items on which one scored higher than the other.
    """

    benchmark: str
    name: str
    n: int
    groups: int
    left_out: int
    a_better: int
    b_better: int
    same_text: int
    metrics: dict[str, Difference]
    by_category: dict[str, dict[str, Difference]]
    verdict: str
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare_runs(
    a: Path, b: Path, *, data_dir: Path | None = None, allow_errors: bool = False
) -> list[Comparison]:
    """Compares every benchmark that both directories (of `pumice eval --out`) hold.

    `data_dir` is where the official files are now, if not where the runs found them. Raises when
    the two have nothing in common, were asked by different protocols, or (unless `allow_errors`)
    when one of them lacks answers.
    """
    found_a, found_b = _runs(a), _runs(b)
    both = [name for name in found_a if name in found_b]
    if not both:
        raise PumiceError(
            f"{a} holds {', '.join(found_a)} and {b} holds {', '.join(found_b)}: no benchmark is "
            f"in both, so there is nothing to compare. Give two directories of `pumice eval --out`."
        )
    names = (str(a), str(b))
    return [_compare(found_a[name], found_b[name], data_dir, allow_errors, names) for name in both]


def in_one_alone(a: Path, b: Path) -> tuple[list[str], list[str]]:
    """The benchmarks that only the first, and only the second directory holds."""
    found_a, found_b = _runs(a), _runs(b)
    return sorted(found_a.keys() - found_b.keys()), sorted(found_b.keys() - found_a.keys())


def _compare(
    a: Path, b: Path, data_dir: Path | None, allow_errors: bool, names: tuple[str, str]
) -> Comparison:
    """Compares two directories that hold predictions.jsonl and scores.json of one benchmark."""
    scores = [_scores_in(folder) for folder in (a, b)]
    _check_protocols(scores[0].protocol, scores[1].protocol, a, b)
    benchmark = benchmark_of(scores[0])
    items = items_of_run(benchmark, a, scores[0], data_dir)
    rows_a, rows_b = (
        _answered(rows_of_run(folder, benchmark, items, own))
        for folder, own in zip((a, b), scores, strict=True)
    )
    shared = [item for item in items if item.id in rows_a and item.id in rows_b]
    left_out = len(items) - len(shared)
    if not shared or (left_out and not allow_errors):
        raise DataError(
            f"{benchmark.name}: {len(items) - len(rows_a)} of {len(items)} items have no answer in "
            f"{a} and {len(items) - len(rows_b)} in {b}. Give the commands of these runs again to "
            f"ask what is missing, or allow errors to compare the {len(shared)} that both answered."
        )
    return compare_rows(
        benchmark,
        [rows_a[item.id] for item in shared],
        [rows_b[item.id] for item in shared],
        left_out=left_out,
        names=names,
        protocol=scores[0].protocol["fingerprint"],
        control=scores[0].protocol.get("control"),
    )


def compare_rows(
    benchmark: Benchmark,
    rows_a: Sequence[Row],
    rows_b: Sequence[Row],
    *,
    left_out: int = 0,
    names: tuple[str, str] = ("A", "B"),
    protocol: str = "",
    control: str | None = None,
) -> Comparison:
    """Compares two sets of rows over the same items in the same order."""
    assert [row.item.id for row in rows_a] == [row.item.id for row in rows_b]
    pairs = list(zip(rows_a, rows_b, strict=True))
    gains = [
        b.prediction.score - a.prediction.score
        for a, b in pairs
        # A verdict that nobody can read is no score, so nobody won there.
        if a.prediction.score is not None and b.prediction.score is not None
    ]
    metrics = _differences(benchmark, rows_a, rows_b)
    groups = len({row.item.group for row in rows_a})
    slices = dict.fromkeys(name for row in rows_a for name in benchmark.slices(row.item))
    by_category = {}
    for name in slices:
        part = [pair for pair in pairs if name in benchmark.slices(pair[0].item)]
        by_category[name] = _differences(
            benchmark, [a for a, _ in part], [b for _, b in part], sliced=True
        )
    return Comparison(
        benchmark=benchmark.name,
        name=_with_control(benchmark.name, control),
        n=len(pairs),
        groups=groups,
        left_out=left_out,
        a_better=sum(gain < 0 for gain in gains),
        b_better=sum(gain > 0 for gain in gains),
        same_text=sum(a.prediction.text == b.prediction.text for a, b in pairs),
        metrics=metrics,
        by_category=by_category,
        verdict=_verdict(benchmark, control, metrics, names),
        fingerprint=protocol,
    )


def _differences(
    benchmark: Benchmark, rows_a: Sequence[Row], rows_b: Sequence[Row], *, sliced: bool = False
) -> dict[str, Difference]:
    reduce = benchmark.category_metrics if sliced else benchmark.metrics
    own, other = (evaluate(benchmark, rows, reduce) for rows in (rows_a, rows_b))
    drawn_a, drawn_b = paired_draws(benchmark, rows_a, rows_b, reduce)
    digits = benchmark.decimals
    found = {}
    for name in own:
        if name not in other:
            continue
        gaps = np.asarray(drawn_b[name] - drawn_a[name])
        gaps = gaps[~np.isnan(gaps)]
        interval = None
        if gaps.size:
            low, high = np.percentile(gaps, [2.5, 97.5])
            interval = (round(float(low), digits), round(float(high), digits))
        gap = round(other[name] - own[name], digits)
        found[name] = Difference(own[name], other[name], gap, interval)
    return found


def _verdict(
    benchmark: Benchmark,
    control: str | None,
    metrics: Mapping[str, Difference],
    names: tuple[str, str],
) -> str:
    """The headline metric's difference in plain words."""
    title = benchmark.title + (f", {CONTROLS[control].title}" if control else "")
    metric = metrics.get(benchmark.headline)
    words = benchmark.headline.replace("_", " ")
    if metric is None or metric.interval is None:
        return f"{title}: {words} is not defined for these items."
    low, high = metric.interval
    bounds = f"{low:+.2f} to {high:+.2f}"
    if not metric.clear:
        return (
            f"{title}: no difference can be told. {words} of {names[1]} is "
            f"{metric.difference:+.2f} beside {names[0]}, and the 95 % interval ({bounds}) "
            f"holds zero."
        )
    better, worse = names[::-1] if metric.difference > 0 else names
    return (
        f"{title}: {better} is better than {worse}, by {abs(metric.difference):.2f} of "
        f"{words} (B - A: 95 % interval {bounds})."
    )


def _runs(folder: Path) -> dict[str, Path]:
    """The benchmark directories in a directory of runs, by their names; or the one it is itself."""
    folders = [folder, *sorted(path.parent for path in folder.glob(f"*/{PREDICTIONS}"))]
    found: dict[str, Path] = {}
    for own in folders:
        if not ((own / SCORES).is_file() and (own / PREDICTIONS).is_file()):
            continue
        if (other := found.setdefault(_name(own), own)) != own:
            raise DataError(
                f"{other} and {own} both hold {_name(own)}, so it is not clear which is meant. "
                f"Give one of them."
            )
    if not found:
        raise DataError(
            f"{folder} holds no run: neither {PREDICTIONS} with {SCORES}, nor directories with "
            f"them. Give what `pumice eval` was given as --out."
        )
    return found


def _name(folder: Path) -> str:
    protocol = _scores_in(folder).protocol
    return _with_control(protocol["benchmark"], protocol.get("control"))


def _with_control(name: str, control: str | None) -> str:
    return f"{name}-{control}" if control else name


def _scores_in(folder: Path) -> Scores:
    content = read_json(folder / SCORES)
    try:
        scores = Scores.from_dict(content)
        str(scores.protocol["benchmark"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / SCORES}: this is no {SCORES} of a run ({type(error).__name__}: {error}). "
            f"Give the command of this run again, which keeps its answers and writes it anew."
        ) from error
    return scores


def _check_protocols(
    a: Mapping[str, Any], b: Mapping[str, Any], where_a: Path, where_b: Path
) -> None:
    keys = [
        key
        for key in dict.fromkeys([*a, *b])
        if key not in _MODELS_OWN and a.get(key) != b.get(key)
    ]
    if not keys:
        return
    told = "; ".join(f"{key}: {a.get(key)!r} and {b.get(key)!r}" for key in keys)
    raise DataError(
        f"{where_a} and {where_b} cannot be compared, because they were not asked the same: {told}."
        f" Run one of them again with the settings and files of the other."
    )


def items_of_run(
    benchmark: Benchmark, folder: Path, scores: Scores, data_dir: Path | None = None
) -> list[Item]:
    """The items a run's directory was asked, read again from the official files.

    Raises DataError when these are not there any more, or others.
    """
    origin = scores.origin
    given = data_dir or (Path(origin["data"]) if "data" in origin else None)
    if given is None:
        raise DataError(
            f"{folder / SCORES} does not say where the official files are. Give them with --data."
        )
    asking = Asking.of_run(origin)
    items = asking.items(benchmark, given, folder)
    if asking.protocol(benchmark, items)["fingerprint"] != scores.protocol["fingerprint"]:
        raise DataError(
            f"the files in {given} are not those that {folder} was asked from (or another version "
            f"of pumice reads them otherwise). Give the right ones with --data, or run again."
        )
    return items


def rows_of_run(
    folder: Path, benchmark: Benchmark, items: Sequence[Item], scores: Scores
) -> dict[str, Row]:
    """The rows in a run's directory by item id, errors among them."""
    asking = Asking.of_run(scores.origin)
    key = asking.row_key(benchmark, scores.origin.get("weights", ""))
    return PredictionFiles(folder, benchmark, items, key, asking.control).read()


def _answered(rows: Mapping[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if row.fault is None}
