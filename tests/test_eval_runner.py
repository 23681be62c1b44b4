"""The runner: resume, kept rows, errors, limits; controls, intervals, and errors in the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_files import Scripted, dump_lines, pope_files, vqa_files
from pumice.core.errors import DataError, PumiceError
from pumice.eval import runner
from pumice.eval.benchmark import Item
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.controls import shuffle_images
from pumice.eval.runner import rescore, run_benchmark, take_evenly
from pumice.eval.scores import full_protocol


def test_a_killed_run_resumes_to_the_same_files(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    items = vqa.load(vqa_files(tmp_path))
    run_benchmark(Scripted(items), vqa, tmp_path, tmp_path / "whole", weights="w")
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(Scripted(items, die_after=5), vqa, tmp_path, tmp_path / "cut", weights="w")
    path = tmp_path / "cut" / "predictions.jsonl"
    path.write_text(path.read_text() + '{"id": "100', encoding="utf-8")
    second = Scripted(items)
    run_benchmark(second, vqa, tmp_path, tmp_path / "cut", weights="w")
    assert len(second.asked) == 12 - 5
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize("change", ["weights", "control", "image", "nothing"])
def test_rows_are_kept_only_for_the_same_question_to_the_same_model(
    tmp_path: Path, change: str
) -> None:
    vqa = BENCHMARKS["vqav2"]
    items = vqa.load(vqa_files(tmp_path))
    run_benchmark(Scripted(items), vqa, tmp_path, tmp_path / "out", weights="w")
    if change == "image":
        (tmp_path / "val2014" / "COCO_val2014_000000000001.jpg").write_bytes(b"new picture")
    again = Scripted(items)
    weights = "other" if change == "weights" else "w"
    control = "shuffled" if change == "control" else None
    run_benchmark(again, vqa, tmp_path, tmp_path / "out", weights=weights, control=control)
    expected = {"weights": 12, "control": 12, "image": 3, "nothing": 0}
    assert len(again.asked) == expected[change]


def test_an_error_withholds_the_score_and_is_asked_again(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    items = vqa.load(vqa_files(tmp_path))
    failing = Scripted(items, fail=items[0].id)
    scores = run_benchmark(failing, vqa, tmp_path, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores.withheld and saved["metrics"] is None and saved["errors"] == 1
    assert f"(the first, {items[0].id}: cannot read the image)" in saved["notes"][0]
    rows = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(rows) == 12 and json.loads(rows[0])["score"] is None
    lenient = run_benchmark(failing, vqa, tmp_path, tmp_path / "out", allow_errors=True)
    assert failing.asked[12:] == [items[0].id]
    assert lenient.metrics is not None and lenient.errors == 1
    mended = run_benchmark(Scripted(items), vqa, tmp_path, tmp_path / "out")
    assert mended.metrics is not None and mended.metrics["accuracy"] == 100


def test_scores_file_has_the_promised_keys(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    items = vqa.load(vqa_files(tmp_path))
    run_benchmark(Scripted(items), vqa, tmp_path, tmp_path / "out", limit=6)
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    promised = "benchmark metrics n unparsed missing errors interval protocol base_rate by_category"
    assert set(promised.split()) <= set(saved)
    assert saved["n"] == 6 and saved["interval"]["accuracy"] == [100, 100]
    assert (
        saved["protocol"]["fingerprint"] == full_protocol(vqa, take_evenly(items, 6))["fingerprint"]
    )
    assert saved["protocol"]["fingerprint"] != full_protocol(vqa, items)["fingerprint"]


def test_the_interval_draws_images_not_questions(tmp_path: Path) -> None:
    """Ten images all right or all wrong: as wide as ten draws, however many questions each has."""
    rows: list[dict[str, object]] = []
    labels = []
    for n in range(200):
        image = n // 20
        labels.append({"question_id": n, "image": f"{image}.jpg", "text": "?", "label": "yes"})
        rows.append({"question_id": n, "text": "yes" if image % 2 else "no"})
    dump_lines(tmp_path / "coco_pope_random.json", labels)
    scores = rescore(BENCHMARKS["pope"], tmp_path, dump_lines(tmp_path / "a.jsonl", rows))
    low, high = scores.interval["recall"]
    assert low == pytest.approx(20, abs=11) and high == pytest.approx(80, abs=11)


def test_shuffling_gives_every_image_another_one(tmp_path: Path) -> None:
    items = BENCHMARKS["vqav2"].load(vqa_files(tmp_path))
    for seed in range(5):
        shuffled = shuffle_images(items, seed, tmp_path)
        assert all(a.image != b.image for a, b in zip(items, shuffled, strict=True))
        assert sorted(str(a.image) for a in items) == sorted(str(b.image) for b in shuffled)
        assert [a.truth for a in items] == [b.truth for b in shuffled]


def test_the_control_is_told_apart_while_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vqa = BENCHMARKS["vqav2"]
    items = vqa.load(vqa_files(tmp_path))
    for control in (None, "shuffled"):
        run_benchmark(Scripted(items), vqa, tmp_path, tmp_path / str(control), control=control)
    own, shuffled = capsys.readouterr().err.splitlines()
    assert own.startswith("vqav2: 12/12") and shuffled.startswith("vqav2, shuffled images: 12/12")


def test_a_limit_keeps_the_shares_of_the_categories(tmp_path: Path) -> None:
    items = BENCHMARKS["pope"].load(pope_files(tmp_path))
    assert [item.category for item in take_evenly(items, 3)] == ["adversarial", "random", "popular"]


def test_a_limit_keeps_alternating_labels_in_balance(tmp_path: Path) -> None:
    items = [
        Item(id=str(n), image=None, prompt="", truth=("yes", "no")[n % 2], group="")
        for n in range(6000)
    ]
    for limit in (100, 300, 600, 1000):
        taken = take_evenly(items, limit)
        assert len({item.id for item in taken}) == limit
        assert [item.id for item in taken] == sorted((item.id for item in taken), key=int)
        assert 0.4 < sum(item.truth == "yes" for item in taken) / limit < 0.6
    assert take_evenly(items, 100) == take_evenly(items, 100)


# --- errors a user can act on -------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS.names())
def test_absent_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}.*looked for|{name}: no label file"):
        BENCHMARKS[name].load(tmp_path)


def test_all_that_cannot_be_read_is_told_before_a_model_is_loaded(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    pope_files(vqa_files(tmp_path))
    args = ("--bench", "vqav2,gqa,pope,mme", "--data", tmp_path, "--out", tmp_path / "out")
    code, _, err = run("eval", "no-such-model", *args)
    assert code == 2 and "2 of 4 benchmarks cannot be read" in err
    assert "gqa: no official file" in err and "mme: no subtask" in err
    assert "Those that can: vqav2,pope." in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_benchmark_is_answered_with_the_nearest() -> None:
    with pytest.raises(PumiceError, match="Did you mean 'pope'"):
        BENCHMARKS["popee"]


@pytest.mark.parametrize("content", ['"yes"', "3"])
def test_what_is_no_answers_file_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "answers.json").write_text(content)
    vqa_files(tmp_path)
    with pytest.raises(DataError, match="this file holds a single"):
        rescore(BENCHMARKS["vqav2"], tmp_path, tmp_path / "answers.json")


def test_answers_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    answers = dump_lines(tmp_path / "a.jsonl", [{"question_id": "x", "text": "yes"}])
    with pytest.raises(DataError, match="none of its ids"):
        rescore(BENCHMARKS["vqav2"], vqa_files(tmp_path), answers)
    answers = dump_lines(tmp_path / "a.jsonl", [{"id": "1000", "reply": "yes"}])
    with pytest.raises(DataError, match="row 1.*id, reply"):
        rescore(BENCHMARKS["vqav2"], tmp_path, answers)


def test_official_files_are_read_once_before_a_model_is_asked(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pope = type(BENCHMARKS["pope"])
    events: list[str] = []
    load, ask = pope.load, runner._ask

    def loaded(self: Any, data_dir: Path) -> list[Item]:
        events.append("load")
        return load(self, data_dir)

    def asked(*given: Any) -> None:
        events.append("ask")
        ask(*given)

    monkeypatch.setattr(pope, "load", loaded)
    monkeypatch.setattr(runner, "_ask", asked)
    out = tmp_path / "out"
    run("eval", "pocket", "--bench", "pope", "--data", pope_files(tmp_path), "--out", out)
    assert events[:2] == ["load", "ask"]
    assert json.loads((out / "pope" / "scores.json").read_text())["n"] == 12
