"""Faults while a benchmark runs: the score of an undisturbed run, or an explicit missing count."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import pytest

import tiny
from eval_files import Scripted, vqa_files
from pumice.core.errors import DataError
from pumice.core.types import Request, Result
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.prediction_files import PREDICTIONS
from pumice.eval.runner import SCORES, run_benchmark
from pumice.eval.scores import Scores
from pumice.infer.engine import Engine

VQA = BENCHMARKS["vqav2"]


def whole_run(data: Path, out: Path) -> tuple[str, str]:
    run_benchmark(Scripted(VQA.load(vqa_files(data))), VQA, data, out, weights="w")
    return (out / PREDICTIONS).read_text(), (out / SCORES).read_text()


def test_a_kill_at_any_byte_changes_nothing(tmp_path: Path) -> None:
    predictions, scores = whole_run(tmp_path, tmp_path / "whole")
    out = tmp_path / "cut"
    out.mkdir()
    data = predictions.encode()
    for size in range(0, len(data), 41):
        (out / PREDICTIONS).write_bytes(data[:size])
        second = Scripted(VQA.load(tmp_path))
        run_benchmark(second, VQA, tmp_path, out, weights="w")
        # Only the row that was being written may be lost.
        whole_rows = data[:size].count(b"\n")
        assert len(second.asked) in (12 - whole_rows, 12 - whole_rows - 1)
        assert (out / PREDICTIONS).read_text() == predictions
        assert (out / SCORES).read_text() == scores


def test_rows_that_are_there_twice_count_once(tmp_path: Path) -> None:
    predictions, scores = whole_run(tmp_path, tmp_path / "out")
    (tmp_path / "out" / PREDICTIONS).write_text(predictions + predictions[: len(predictions) // 2])
    assert whole_run(tmp_path, tmp_path / "out") == (predictions, scores)


def test_a_row_that_is_no_json_is_named(tmp_path: Path) -> None:
    predictions, _ = whole_run(tmp_path, tmp_path / "out")
    lines = predictions.splitlines(keepends=True)
    (tmp_path / "out" / PREDICTIONS).write_text(lines[0] + "{broken\n" + "".join(lines[2:]))
    with pytest.raises(DataError, match="line 2"):
        whole_run(tmp_path, tmp_path / "out")


def test_a_row_without_a_text_is_asked_again(tmp_path: Path) -> None:
    predictions, scores = whole_run(tmp_path, tmp_path / "out")
    rows = [json.loads(line) for line in predictions.splitlines()]
    rows[3]["text"] = None
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "out" / PREDICTIONS).write_text(text)
    assert whole_run(tmp_path, tmp_path / "out") == (predictions, scores)


class Raising(Scripted):
    """A model whose call ends in an exception after some answers, as when memory runs out."""

    def __call__(
        self, requests: Sequence[Request], on_result: Callable[[Result], None] | None
    ) -> list[Result]:
        assert on_result is not None
        super().__call__(requests[:5], on_result)
        raise RuntimeError("out of memory")


def test_a_request_that_raises_leaves_a_missing_count(tmp_path: Path) -> None:
    predictions, scores = whole_run(tmp_path, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="out of memory"):
        run_benchmark(Raising(VQA.load(tmp_path)), VQA, tmp_path, out, weights="w")
    left = json.loads((out / SCORES).read_text())
    assert left["metrics"] is None and left["missing"] == 7 and left["interval"] == {}
    # Also where errors are allowed: a question that was not asked is no error.
    with pytest.raises(RuntimeError):
        run_benchmark(
            Raising(VQA.load(tmp_path)), VQA, tmp_path, out, weights="w", allow_errors=True
        )
    assert json.loads((out / SCORES).read_text())["metrics"] is None
    assert whole_run(tmp_path, out) == (predictions, scores)


def test_while_it_runs_no_score_of_an_earlier_run_stands(tmp_path: Path) -> None:
    out = tmp_path / "out"
    items = VQA.load(vqa_files(tmp_path))
    seen: list[Scores] = []

    class Looking(Scripted):
        def __call__(
            self, requests: Sequence[Request], on_result: Callable[[Result], None] | None
        ) -> list[Result]:
            seen.append(Scores.from_dict(json.loads((out / SCORES).read_text())))
            return super().__call__(requests, on_result)

    run_benchmark(Scripted(items), VQA, tmp_path, out, weights="w", limit=4)
    run_benchmark(Looking(items), VQA, tmp_path, out, weights="w")
    assert [(s.withheld, s.n, s.missing) for s in seen] == [(True, 12, 8)]


def test_answers_of_other_runs_come_back_when_they_fit(tmp_path: Path) -> None:
    _, scores = whole_run(tmp_path, tmp_path / "out")
    items = VQA.load(tmp_path)
    asked = []
    for weights, limit in (("w", 3), ("other", None), ("other", 5), ("w", None)):
        model = Scripted(items)
        run_benchmark(model, VQA, tmp_path, tmp_path / "out", weights=weights, limit=limit)
        asked.append(len(model.asked))
    assert asked == [0, 12, 0, 0]
    assert (tmp_path / "out" / SCORES).read_text() == scores
    kept = (tmp_path / "out" / "predictions.previous.jsonl").read_text().splitlines()
    assert len(kept) == 12 and {json.loads(row)["extra"]["weights"] for row in kept} == {"other"}


def test_an_image_that_cannot_be_decoded_is_an_error_until_it_can(
    tmp_path: Path, engine: Engine
) -> None:
    data = vqa_files(tmp_path)
    files = sorted((data / "val2014").iterdir())
    for number, file in enumerate(files):
        tiny.noise(number).save(file, "JPEG")
    whole = run_benchmark(engine.generate, VQA, data, tmp_path / "whole")
    good = files[1].read_bytes()
    files[1].write_bytes(good[: len(good) // 2])
    broken = run_benchmark(engine.generate, VQA, data, tmp_path / "out")
    assert broken.metrics is None and (broken.errors, broken.missing) == (3, 0)
    rows = [json.loads(row) for row in (tmp_path / "out" / PREDICTIONS).read_text().splitlines()]
    assert [row["id"] for row in rows if row["error"]] == ["2000", "2001", "2002"]
    assert all(files[1].name in row["error"] for row in rows if row["error"])
    allowed = run_benchmark(engine.generate, VQA, data, tmp_path / "out", allow_errors=True)
    assert allowed.metrics is not None and allowed.errors == 3
    files[1].write_bytes(good)
    mended = run_benchmark(engine.generate, VQA, data, tmp_path / "out")
    assert mended == whole


def test_a_blank_image_has_the_size_of_the_one_it_stands_for(tmp_path: Path) -> None:
    data = vqa_files(tmp_path)
    for number, file in enumerate(sorted((data / "val2014").iterdir())):
        tiny.noise(number, (40, 24) if number % 2 else (16, 32)).save(file, "JPEG")
    seen: dict[str, Path] = {}

    class Looking(Scripted):
        def __call__(
            self, requests: Sequence[Request], on_result: Callable[[Result], None] | None
        ) -> list[Result]:
            for request in requests:
                [part] = request.messages[0].images
                assert isinstance(part.image, Path)
                seen[request.id] = part.image
            return super().__call__(requests, on_result)

    answer = Looking(VQA.load(data))
    scores = run_benchmark(answer, VQA, data, tmp_path / "out", control="blank")
    assert scores.protocol["control"] == "blank" and len(set(seen.values())) == 2
    for item in VQA.load(data):
        assert item.image is not None
        with PIL.Image.open(item.image) as own, PIL.Image.open(seen[item.id]) as blank:
            assert own.size == blank.size
            assert blank.getextrema() == ((127, 127),) * 3
