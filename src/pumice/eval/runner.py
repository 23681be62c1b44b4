"""Runs a benchmark: asks, writes each answer at once, resumes, scores; and scores answer files."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from pumice.core.errors import DataError
from pumice.core.files import JsonlWriter, read_json, write_json
from pumice.core.log import get_logger
from pumice.core.progress import progress
from pumice.core.types import Request, Result, Sampling, user
from pumice.eval.benchmark import BROKEN, Benchmark, Item, Matching, Row
from pumice.eval.controls import CONTROLS
from pumice.eval.locate import check_data_dir, load_items
from pumice.eval.matching import flagged, match_file
from pumice.eval.prediction_files import PredictionFiles, answered_row
from pumice.eval.ranks import Ranks, neighbours
from pumice.eval.scores import (
    Scores,
    Served,
    fingerprint,
    full_protocol,
    make_scores,
    row_protocol,
)

OnResult = Callable[[Result], None]
Answerer = Callable[[Sequence[Request], OnResult | None], list[Result]]

# Requests per call of the answerer: enough to fill batches of similar length, few enough that
# an answerer which keeps the features of a call's images does not run out of memory.
CALL_SIZE = 512
SCORES = "scores.json"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Asking:
    """Which of a benchmark's items are asked, and how.

    `limit` takes that many items, spread evenly. `control` asks the questions in a way that should
    destroy the score. `served` says that a model behind an endpoint is asked.
    """

    limit: int | None = None
    control: str | None = None
    seed: int = 0
    served: Served | None = None

    @classmethod
    def of_run(cls, origin: Mapping[str, Any]) -> Self:
        """How the run was asked whose scores.json has this origin."""
        served = origin.get("served")
        return cls(
            origin.get("limit"),
            origin.get("control"),
            origin.get("seed", 0),
            None if served is None else Served(**served),
        )

    def row_key(self, benchmark: Benchmark, weights: str) -> dict[str, str]:
        """What a row on disk must have in common with this run to be one of its own."""
        protocol = row_protocol(benchmark, control=self.control, served=self.served)
        return {"protocol": fingerprint(protocol), "weights": weights}

    def protocol(self, benchmark: Benchmark, items: Sequence[Item]) -> dict[str, Any]:
        """The protocol of scores.json."""
        return full_protocol(benchmark, items, control=self.control, served=self.served)

    def items(
        self,
        benchmark: Benchmark,
        data_dir: Path,
        out_dir: Path,
        loaded: list[Item] | None = None,
    ) -> list[Item]:
        """The items with all they show on disk; what a control shows is below `out_dir`.

        `loaded` is what the benchmark has read from `data_dir` already.
        """
        if loaded is None:
            check_data_dir(data_dir)
            loaded = load_items(benchmark, data_dir)
        items = take_evenly(loaded, self.limit, whole_groups=benchmark.whole_groups)
        benchmark.prepare(items)
        if self.control is not None:
            items = CONTROLS[self.control].apply(items, self.seed, out_dir)
        return items


def run_benchmark(
    answer: Answerer,
    benchmark: Benchmark,
    data_dir: Path,
    out_dir: Path,
    *,
    weights: str = "",
    limit: int | None = None,
    control: str | None = None,
    allow_errors: bool = False,
    seed: int = 0,
    served: Served | None = None,
    ranks: Ranks | None = None,
    loaded: list[Item] | None = None,
) -> Scores:
    """Asks every item and writes `out_dir`/predictions.jsonl and scores.json.

    Rows already there are kept when protocol, `weights` (a hash that names the model), item and
    prompt are the same; so a killed run goes on where it stopped. `limit`, `control` and `served`:
    see `Asking`. Of several `ranks` each asks its share and the main one merges. While it runs, and
    when it ends before all is asked, scores.json says what is missing and gives no score. What the
    benchmark has `loaded` from `data_dir` already is not read again.
    """
    ranks = ranks or Ranks()
    asking = Asking(limit, control, seed, served)
    with ranks.main_first():
        items = asking.items(benchmark, data_dir, out_dir, loaded)
        key = asking.row_key(benchmark, weights)
        files = PredictionFiles(out_dir, benchmark, items, key, control)
        rows = files.gather() if ranks.is_main else files.read()
        pending = [item for item in items if item.id not in rows]
        origin = {"data": str(data_dir.resolve()), "weights": weights, **asdict(asking)}
        scoring = _Scoring(files, asking.protocol(benchmark, items), origin, allow_errors)
        if ranks.is_main and (pending or any(row.fault for row in rows.values())):
            scoring.write(rows, finished=False)
    title = benchmark.name + ("" if control is None else f", {CONTROLS[control].title}")
    if rows and ranks.is_main:
        log.info("%s: %d answers kept, %d to ask", title, len(rows), len(pending))
    finished = False
    try:
        mine = neighbours(ranks.share(pending))
        path = files.path if ranks.size == 1 else files.of_rank(ranks.rank)
        _ask(answer, files, mine, path, title, rows)
        asked = ranks.wait()
        if asked and ranks.is_main:
            rows |= files.answered_by_ranks()
            files.settle(rows)
            for row in benchmark.consult([rows[item.id] for item in items if item.id in rows]):
                rows[row.item.id] = row
        finished = asked
    finally:
        if ranks.is_main:
            rows |= files.answered_by_ranks()
            files.settle(rows)
            scores = scoring.write(rows, finished=finished)
    if ranks.is_main:
        ranks.wait()
        return scores
    ranks.need_all()
    return Scores.from_dict(read_json(out_dir / SCORES))


@dataclass(frozen=True, slots=True)
class _Scoring:
    """Writes scores.json of a run from the rows it has."""

    files: PredictionFiles
    protocol: dict[str, Any]
    origin: dict[str, Any]
    allow_errors: bool

    def write(self, rows: Mapping[str, Row], *, finished: bool) -> Scores:
        items = self.files.items
        scores = make_scores(
            self.files.benchmark,
            items,
            [rows[item.id] for item in items if item.id in rows],
            protocol=self.protocol,
            allow_errors=self.allow_errors,
            finished=finished,
            origin=self.origin,
        )
        write_json(self.files.directory / SCORES, scores.to_dict())
        return scores


def rescore(
    benchmark: Benchmark, data_dir: Path, answers_file: Path, *, allow_errors: bool = False
) -> Scores:
    """Scores an answers file without a model, but a benchmark's judge is asked."""
    items, matching = matched_answers(benchmark, data_dir, answers_file)
    rows = [
        answered_row(benchmark, item, matching.answers[item.id])
        for item in items
        if item.id in matching.answers
    ]
    judged = {row.item.id: row for row in benchmark.consult(rows)}
    return make_scores(
        benchmark,
        items,
        [judged.get(row.item.id, row) for row in rows],
        protocol=full_protocol(benchmark, items),
        notes=matching.notes,
        flawed=matching.flawed,
        allow_errors=allow_errors,
    )


def matched_answers(
    benchmark: Benchmark, data_dir: Path, answers_file: Path
) -> tuple[list[Item], Matching]:
    """The benchmark's items, and the answers of a file to them; an error when none fits."""
    check_data_dir(data_dir)
    items = load_items(benchmark, data_dir)
    matching, other = match_file(benchmark, items, answers_file)
    matching = flagged(matching, other, benchmark.title)
    if not matching.answers and not matching.flawed:
        raise DataError(
            f"{answers_file}: none of its ids is an item of {benchmark.title} in {data_dir} "
            f"(whose ids look like {items[0].id!r}). {'; '.join(matching.notes)}. Give the answers "
            f"and the official files of the same benchmark and split."
        )
    return items, matching


def take_evenly(items: list[Item], limit: int | None, *, whole_groups: bool = False) -> list[Item]:
    """At most `limit` items, spread over the whole list so that every category keeps its share.

    The list is cut into `limit` runs of equal length and one item is drawn from each, always the
    same one. Every n-th item would not do: benchmarks alternate (POPE's yes and no). With
    `whole_groups` the groups are drawn so, about as many as have `limit` items.
    """
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise DataError(f"the limit must be at least 1, given {limit}; leave it out for all items.")
    if whole_groups:
        groups = list(dict.fromkeys(item.group for item in items))
        first = {item.group: item for item in reversed(items)}
        heads = [first[group] for group in groups]
        kept = {item.group for item in take_evenly(heads, limit * len(groups) // len(items) or 1)}
        return [item for item in items if item.group in kept]
    rng = random.Random(f"{limit} of {len(items)}")
    bounds = [index * len(items) // limit for index in range(limit + 1)]
    return [items[rng.randrange(start, end)] for start, end in pairwise(bounds)]


def _ask(
    answer: Answerer,
    files: PredictionFiles,
    items: Sequence[Item],
    path: Path,
    title: str,
    rows: dict[str, Row],
) -> None:
    """Asks these items; each answer is in `path` and in `rows` as soon as it is there."""
    by_id = {item.id: item for item in items}
    with JsonlWriter(path) as writer, progress(len(items), title) as bar:

        def keep(result: Result) -> None:
            # The answerer may report a result as it comes, in its list, or both.
            if result.id in rows or result.id not in by_id:
                return
            row = files.row(by_id[result.id], result)
            rows[result.id] = row
            writer.write(row.prediction.to_dict())
            bar.update(1)

        for item in items:
            # A control may show it another image, which is whole.
            if BROKEN in item.extra and not (item.image and item.image.is_file()):
                keep(Result(id=item.id, error=item.extra[BROKEN]))
        whole = [item for item in items if item.id not in rows]
        for start in range(0, len(whole), CALL_SIZE):
            part = whole[start : start + CALL_SIZE]
            for result in answer([_request(files.benchmark, item) for item in part], keep):
                keep(result)


def _request(benchmark: Benchmark, item: Item) -> Request:
    images = () if item.image is None else (item.image,)
    sampling = Sampling(max_new_tokens=benchmark.max_new_tokens, temperature=0.0)
    return Request((user(item.prompt, *images),), sampling, item.id)
