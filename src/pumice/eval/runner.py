"""Runs a benchmark: asks, writes each answer at once, resumes, scores; and scores answer files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

from pumice.core.errors import DataError
from pumice.core.files import JsonlWriter, read_jsonl, write_atomic, write_json
from pumice.core.log import get_logger
from pumice.core.progress import progress
from pumice.core.types import Prediction, Request, Result, Sampling, user
from pumice.eval.answer_files import read_answers
from pumice.eval.benchmark import Answer, Benchmark, Item, Row
from pumice.eval.controls import CONTROLS
from pumice.eval.locate import check_data_dir
from pumice.eval.metrics import score_item
from pumice.eval.scores import Scores, fingerprint, full_protocol, make_scores, row_protocol

OnResult = Callable[[Result], None]
Answerer = Callable[[Sequence[Request], OnResult | None], list[Result]]

# Requests per call of the answerer: enough to fill batches of similar length, few enough that
# an answerer which keeps the features of a call's images does not run out of memory.
CALL_SIZE = 512

log = get_logger(__name__)


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
) -> Scores:
    """Asks every item and writes `out_dir`/predictions.jsonl and scores.json.

    Rows already there are kept when protocol, `weights` (a hash that names the model), item and
    prompt are the same; so a killed run goes on where it stopped. `limit` takes that many items,
    spread evenly. `control` asks the questions in a way that should destroy the score.
    """
    check_data_dir(data_dir)
    items = take_evenly(benchmark.load(data_dir), limit, whole_groups=benchmark.whole_groups)
    benchmark.prepare(items)
    title = benchmark.name
    if control is not None:
        title += f", {CONTROLS[control].title}"
        items = CONTROLS[control].apply(items, seed)
    key = {"protocol": fingerprint(row_protocol(benchmark, control=control)), "weights": weights}
    path = out_dir / "predictions.jsonl"
    kept = _kept_rows(path, benchmark, items, key)
    _write_rows(path, kept, items)
    pending = [item for item in items if item.id not in kept]
    if kept:
        log.info("%s: %d answers kept, %d to ask", title, len(kept), len(pending))
    rows = {**kept, **_ask(answer, benchmark, pending, path, key, title)}
    # In the items' order, so that a resumed run ends with the file of an uninterrupted one.
    _write_rows(path, rows, items)
    scores = make_scores(
        benchmark,
        items,
        [rows[item.id] for item in items if item.id in rows],
        protocol=full_protocol(benchmark, items, control=control),
        allow_errors=allow_errors,
    )
    write_json(out_dir / "scores.json", scores.to_dict())
    return scores


def rescore(
    benchmark: Benchmark, data_dir: Path, answers_file: Path, *, allow_errors: bool = False
) -> Scores:
    """Scores an answers file without a model."""
    check_data_dir(data_dir)
    items = benchmark.load(data_dir)
    matching = benchmark.match(read_answers(answers_file), items, str(answers_file))
    if not matching.answers and not matching.flawed:
        raise DataError(
            f"{answers_file}: none of its ids is an item of {benchmark.title} in {data_dir} "
            f"(whose ids look like {items[0].id!r}). {'; '.join(matching.notes)}. Give the answers "
            f"and the official files of the same benchmark and split."
        )
    rows = [
        _answered(benchmark, item, matching.answers[item.id])
        for item in items
        if item.id in matching.answers
    ]
    return make_scores(
        benchmark,
        items,
        rows,
        protocol=full_protocol(benchmark, items),
        notes=matching.notes,
        flawed=matching.flawed,
        allow_errors=allow_errors,
    )


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


def prompt_hash(item: Item) -> str:
    """Names what is asked: the prompt and the image file (its name and size)."""
    image = item.image
    size = image.stat().st_size if image is not None and image.is_file() else 0
    return fingerprint([item.prompt, image and image.name, size])


def _ask(
    answer: Answerer,
    benchmark: Benchmark,
    pending: list[Item],
    path: Path,
    key: dict[str, str],
    title: str,
) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    by_id = {item.id: item for item in pending}
    with JsonlWriter(path) as writer, progress(len(pending), title) as bar:

        def keep(result: Result) -> None:
            # The answerer may report a result as it comes, in its list, or both.
            if result.id in rows or result.id not in by_id:
                return
            row = _predict(benchmark, by_id[result.id], result, key)
            rows[result.id] = row
            writer.write(asdict(row.prediction))
            bar.update(1)

        for start in range(0, len(pending), CALL_SIZE):
            requests = [_request(benchmark, item) for item in pending[start : start + CALL_SIZE]]
            for result in answer(requests, keep):
                keep(result)
    return rows


def _request(benchmark: Benchmark, item: Item) -> Request:
    images = () if item.image is None else (item.image,)
    sampling = Sampling(max_new_tokens=benchmark.max_new_tokens, temperature=0.0)
    return Request((user(item.prompt, *images),), sampling, item.id)


def _predict(benchmark: Benchmark, item: Item, result: Result, key: dict[str, str]) -> Row:
    row = _answered(benchmark, item, Answer(item.id, result.text, error=result.error))
    extra = {**key, "category": item.category}
    return Row(item, replace(row.prediction, prompt_hash=prompt_hash(item), extra=extra))


def _answered(benchmark: Benchmark, item: Item, answer: Answer) -> Row:
    if answer.error is None:
        extra = {} if answer.prompt is None else {"prompt": answer.prompt}
        return score_item(benchmark, item, answer.text, extra)
    failed = Prediction(
        id=item.id,
        prompt_hash="",
        text=answer.text,
        parsed=None,
        score=None,
        error=answer.error,
    )
    return Row(item, failed)


def _kept_rows(
    path: Path, benchmark: Benchmark, items: list[Item], key: dict[str, str]
) -> dict[str, Row]:
    if not path.is_file():
        return {}
    by_id = {item.id: item for item in items}
    kept = {}
    dropped = 0
    for _, old in read_jsonl(path, allow_cut_tail=True):
        item = by_id.get(str(old.get("id")))
        extra = old.get("extra") or {}
        same = (
            item is not None
            and old.get("error") is None
            and all(extra.get(name) == value for name, value in key.items())
            and old.get("prompt_hash") == prompt_hash(item)
        )
        if item is not None and same:
            # Parsed and scored anew: only the text is taken from the file.
            kept[item.id] = _predict(benchmark, item, Result(id=item.id, text=old["text"]), key)
        else:
            dropped += 1
    if dropped:
        former = path.with_name("predictions.previous.jsonl")
        path.replace(former)
        log.info("%d rows of an earlier run do not fit; its file is kept as %s", dropped, former)
    return kept


def _write_rows(path: Path, rows: dict[str, Row], items: list[Item]) -> None:
    lines = [
        json.dumps(asdict(rows[item.id].prediction), ensure_ascii=False) + "\n"
        for item in items
        if item.id in rows
    ]
    write_atomic(path, "".join(lines))
