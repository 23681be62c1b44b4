"""From rows to metrics, their bootstrap intervals, and the base rate they must be read against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pumice.eval.benchmark import Benchmark, Floats, Item, Row, Sums

DRAWS = 1000
# Draws are made in blocks so that a benchmark of 40,000 images needs tens of megabytes, not 300.
_BLOCK = 50

Metrics = dict[str, float]
Reduce = Callable[[Sums], Mapping[str, Floats]]


def evaluate(benchmark: Benchmark, rows: Sequence[Row], reduce: Reduce | None = None) -> Metrics:
    """The benchmark's metrics over these rows; one that is undefined here is left out.

    `reduce` is `category_metrics` for the rows of one slice.
    """
    return _reduce(benchmark, reduce or benchmark.metrics, rows)


def by_category(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Metrics]:
    """The metrics of each slice of the rows, with the slice's number of rows under "n"."""
    slices: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for name in benchmark.slices(row.item):
            slices[name].append(row)
    return {
        name: {**_reduce(benchmark, benchmark.category_metrics, part), "n": len(part)}
        for name, part in slices.items()
    }


def bootstrap(
    benchmark: Benchmark, rows: Sequence[Row], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % interval per metric: whole groups (images) are drawn anew, questions stay together.

    Questions about one image succeed and fail together; drawing questions would make the interval
    too narrow.
    """
    if not rows:
        return {}
    keys, sums = tallies(benchmark, rows)
    drawn = benchmark.metrics(Sums(keys, drawn_sums(sums, draws, seed)))
    intervals = {}
    for name, values in drawn.items():
        known = values[~np.isnan(values)]
        if known.size:
            low, high = np.percentile(known, [2.5, 97.5])
            digits = benchmark.decimals
            intervals[name] = (round(float(low), digits), round(float(high), digits))
    return intervals


def paired_draws(
    benchmark: Benchmark,
    rows_a: Sequence[Row],
    rows_b: Sequence[Row],
    reduce: Reduce,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Mapping[str, Floats], Mapping[str, Floats]]:
    """float[draws] per metric of two sets of rows over the same items in the same order.

    Draw k takes the same images for both.
    """
    (keys_a, sums_a), (keys_b, sums_b) = (tallies(benchmark, rows) for rows in (rows_a, rows_b))
    both = drawn_sums(np.concatenate([sums_a, sums_b], axis=1), draws, seed)
    width = len(keys_a)
    return reduce(Sums(keys_a, both[:, :width])), reduce(Sums(keys_b, both[:, width:]))


def base_rate(benchmark: Benchmark, items: Sequence[Item]) -> Metrics:
    """What a model reaches that never looks: the most frequent answer, scored the same way."""
    if not benchmark.judged:
        return {}
    answers = benchmark.base_answers(items)
    if not answers:
        return {}
    return evaluate(benchmark, [score_item(benchmark, item, answers[item.id]) for item in items])


def score_item(
    benchmark: Benchmark, item: Item, text: str, extra: Mapping[str, object] | None = None
) -> Row:
    """A raw answer, parsed and, where the truth is known, scored."""
    return Row(item, benchmark.prediction(item, text, extra or {}))


def drawn_sums(sums: Floats, draws: int, seed: int) -> Floats:
    """float[groups, names] -> float[draws, names]: the sums of as many groups, drawn anew."""
    groups = len(sums)
    rng = np.random.default_rng(seed)
    blocks = []
    for start in range(0, draws, _BLOCK):
        size = min(_BLOCK, draws - start)
        times = rng.multinomial(groups, np.full(groups, 1 / groups), size=size)
        blocks.append(times @ sums)
    return np.concatenate(blocks)


def tallies(benchmark: Benchmark, rows: Sequence[Row]) -> tuple[list[str], Floats]:
    """The names of the sums, and float[groups, names]: what each group of rows adds to them."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.item.group].append(row)
    addends = [benchmark.tally_group(group) for group in groups.values()]
    columns: dict[str, int] = {}
    for addend in addends:
        for key in addend:
            columns.setdefault(key, len(columns))
    table = np.zeros((len(addends), len(columns)))
    for index, addend in enumerate(addends):
        for key, value in addend.items():
            table[index, columns[key]] = value
    return list(columns), table


def _reduce(benchmark: Benchmark, reduce: Reduce, rows: Sequence[Row]) -> Metrics:
    if not rows:
        return {}
    keys, table = tallies(benchmark, rows)
    metrics = reduce(Sums(keys, table.sum(axis=0)))
    return {
        name: round(float(value), benchmark.decimals)
        for name, value in metrics.items()
        if not np.isnan(value)
    }
