"""Comparing two runs: paired, on the same items, and refused when they were asked otherwise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from eval_files import Scripted, pope_files, vqa_files
from pumice.core.errors import DataError, PumiceError
from pumice.eval.benchmark import Row
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.compare import compare_rows, compare_runs
from pumice.eval.metrics import score_item
from pumice.eval.prediction_files import PREDICTIONS
from pumice.eval.runner import run_benchmark

Run = Callable[..., tuple[int, str, str]]
VQA = BENCHMARKS["vqav2"]


def pope_rows(data: Path, wrong: Callable[[int], bool]) -> list[Row]:
    pope = BENCHMARKS["pope"]
    other = {"yes": "no", "no": "yes"}
    return [
        score_item(pope, item, other[item.truth] if wrong(n) else item.truth)
        for n, item in enumerate(pope.load(data))
    ]


def test_pairing_sees_what_two_intervals_hide(tmp_path: Path) -> None:
    """Both fail on the same hard half; B is right on some more: a small, certain gain."""
    pope = BENCHMARKS["pope"]
    pope_files(tmp_path, {"adversarial": 400, "popular": 4, "random": 4})
    hard = random.Random(0).sample(range(400), 200)
    a = pope_rows(tmp_path, lambda n: n in hard)
    b = pope_rows(tmp_path, lambda n: n in hard[:180])
    found = compare_rows(pope, a, b)
    gap = found.metrics["mean_f1"]
    assert gap.clear and gap.interval is not None and gap.interval[0] > 0
    assert (found.a_better, found.b_better, found.n) == (0, 20, 408)
    assert "B is better than A" in found.verdict
    back = compare_rows(pope, b, a)
    assert back.metrics["mean_f1"].difference == -gap.difference
    assert back.metrics["mean_f1"].interval == pytest.approx(
        tuple(-end for end in reversed(gap.interval)), abs=1e-3
    )
    assert found.by_category["popular"]["f1"].difference == 0


def test_equal_runs_differ_by_nothing(tmp_path: Path) -> None:
    rows = pope_rows(pope_files(tmp_path), lambda n: n % 3 == 0)
    found = compare_rows(BENCHMARKS["pope"], rows, rows)
    assert all(metric.difference == 0 for metric in found.metrics.values())
    assert all(metric.interval == (0, 0) for metric in found.metrics.values())
    assert "no difference can be told" in found.verdict and found.same_text == found.n


def two_runs(tmp_path: Path, **second: object) -> tuple[Path, Path]:
    items = VQA.load(vqa_files(tmp_path / "data"))
    weak = Scripted(items)
    weak.truth |= {item.id: "nothing" for item in items[:4]}
    for name, answer, more in (("a", weak, {}), ("b", Scripted(items), second)):
        out = tmp_path / name / "vqav2"
        run_benchmark(answer, VQA, tmp_path / "data", out, weights=name, **more)  # type: ignore[arg-type]
    return tmp_path / "a", tmp_path / "b"


def test_the_command_gives_table_json_and_words(tmp_path: Path, run: Run) -> None:
    a, b = two_runs(tmp_path)
    code, out, _ = run("eval", "--compare", a, b, "--json")
    found = json.loads(out)["benchmarks"]["vqav2"]
    assert code == 0 and found["metrics"]["accuracy"]["difference"] == pytest.approx(33.3, abs=0.1)
    assert found["n"] == 12 and found["groups"] == 4 and found["b_better"] == 4
    code, out, _ = run("eval", "--compare", a, b)
    assert code == 0 and "accuracy" in out and "no difference can be told" in out
    out = run("eval", "--compare", a, b, "--categories")[1]
    lines = [line.split() for line in out.splitlines() if line.startswith("answer_type=")]
    assert lines[0][:4] == ["answer_type=other", "accuracy", "50.00", "100.00"]
    # One directory of a benchmark will do, and data that was moved is named.
    (tmp_path / "data").rename(tmp_path / "moved")
    assert run("eval", "--compare", a / "vqav2", b, "--data", tmp_path / "moved")[0] == 0
    code, _, err = run("eval", "--compare", a, b)
    assert code == 2 and "does not exist" in err


def test_other_protocols_are_refused_with_what_differs(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path, limit=6)
    with pytest.raises(DataError, match="not asked the same: items: 12 and 6"):
        compare_runs(a, b)
    a, b = two_runs(tmp_path / "again", control="shuffled")
    with pytest.raises(PumiceError, match="holds vqav2-shuffled: no benchmark is in both"):
        compare_runs(a / "vqav2", b / "vqav2")


def test_a_control_stands_beside_its_benchmark_and_not_in_its_place(
    tmp_path: Path, run: Run
) -> None:
    a, b = two_runs(tmp_path)
    data = tmp_path / "data"
    for root, weights in ((a, "a"), (b, "b")):
        wrong = Scripted(VQA.load(data))
        wrong.truth = dict.fromkeys(wrong.truth, "nothing")
        folder = root / "vqav2-shuffled"
        run_benchmark(wrong, VQA, data, folder, weights=weights, control="shuffled")
    code, out, _ = run("eval", "--compare", a, b, "--json")
    found = json.loads(out)["benchmarks"]
    assert code == 0 and list(found) == ["vqav2", "vqav2-shuffled"]
    values = [found[name]["metrics"]["accuracy"]["b"] for name in found]
    assert values == [100, 0]
    out = run("eval", "--compare", a, b)[1]
    assert "\nVQAv2, shuffled images: no difference" in out
    assert [line.split()[0] for line in out.splitlines()[1:7]] == 3 * ["vqav2"] + 3 * [
        "vqav2-shuffled"
    ]


def test_what_only_one_directory_holds_is_told(tmp_path: Path, run: Run) -> None:
    a, b = two_runs(tmp_path)
    (b / "pope").mkdir()
    for name in ("scores.json", PREDICTIONS):
        text = (b / "vqav2" / name).read_text()
        (b / "pope" / name).write_text(text.replace('"vqav2"', '"pope"'))
    code, _, err = run("eval", "--compare", a, b)
    assert code == 0 and f"only in {b}, so not compared: pope" in err
    told = json.loads(run("eval", "--compare", a, b, "--json")[1])
    assert told["only_in_a"] == [] and told["only_in_b"] == ["pope"]
    # The same benchmark twice: nobody knows which is meant.
    (b / "pope").rename(b / "again")
    for name in ("scores.json", PREDICTIONS):
        (b / "again" / name).write_text((b / "vqav2" / name).read_text())
    code, _, err = run("eval", "--compare", a, b)
    assert code == 2 and "both hold vqav2" in err


@pytest.mark.parametrize("content", ["{}", "[1]", '{"interval": {}, "notes": []}'])
def test_scores_that_are_none_are_named(content: str, tmp_path: Path, run: Run) -> None:
    a, b = two_runs(tmp_path)
    (b / "vqav2" / "scores.json").write_text(content)
    code, _, err = run("eval", "--compare", a, b)
    assert code == 2 and "scores.json: this is no scores.json of a run" in err


def test_changed_files_and_lacking_answers_are_refused(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    path = b / "vqav2" / PREDICTIONS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    with pytest.raises(DataError, match="2 in .*b"):
        compare_runs(a, b)
    [found] = compare_runs(a, b, allow_errors=True)
    assert (found.n, found.left_out) == (10, 2)
    questions = next((tmp_path / "data").glob("v2_OpenEnded*"))
    questions.write_text(questions.read_text().replace("how many 1?", "how many of them?"))
    with pytest.raises(DataError, match="are not those that"):
        compare_runs(a, b)


def test_a_command_line_that_lacks_something(tmp_path: Path, run: Run) -> None:
    code, _, err = run("eval", "pocket", "--bench", "pope")
    assert code == 2 and "--data and --out not given" in err
    code, _, err = run("eval", "pocket", "--compare", tmp_path, tmp_path)
    assert code == 2 and "asks no model" in err
    with pytest.raises((DataError, PumiceError), match="holds no run"):
        compare_runs(tmp_path, tmp_path)
