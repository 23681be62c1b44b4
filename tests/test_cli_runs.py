"""`pumice world make`, `eval`, `score` and `run`: work once done is kept, never mixed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_world_is_made_once(world: Path, tmp_path: Path, run: Run) -> None:
    args = ("world", "make", "--images", 6, "--eval-images", 6)
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file()}
    assert run(*args, "--out", world)[1] == f"{world}\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, _, err = run(*args, "--out", world, "--seed", 1)
    assert code == 2 and "holds another synthetic world" in err and "seed=1" in err
    # Someone's own files are left alone; a stopped run is made again.
    (tmp_path / "mine.txt").write_text("data")
    code, _, err = run(*args, "--out", tmp_path)
    assert code == 2 and "is not empty" in err and "world=null" in err
    (tmp_path / "world.unfinished").touch()
    assert run(*args, "--out", tmp_path)[0] == 0
    assert not (tmp_path / "world.unfinished").exists()
    assert (tmp_path / "world.json").read_bytes() == (world / "world.json").read_bytes()


def test_eval_then_score_agree(root: Path, world: Path, tmp_path: Path, run: Run) -> None:
    args = ("eval", root / "model", "--bench", "scienceqa", "--data", world, "--out", tmp_path)
    code, out, _ = run(*args, "--json")
    assert code == 0
    scores = json.loads(out)["benchmarks"]["scienceqa"]
    assert scores == json.loads((tmp_path / "scienceqa" / "scores.json").read_text())
    answers = tmp_path / "scienceqa" / "predictions.jsonl"
    code, out, _ = run("score", "scienceqa", "--data", world, "--answers", answers, "--json")
    again = json.loads(out)
    assert code == 0 and again["metrics"] == scores["metrics"]
    keys = "benchmark metrics n unparsed missing errors interval protocol"
    assert set(keys.split()) <= set(again)
    table = run("score", "scienceqa", "--data", world, "--answers", answers)[1]
    assert table.splitlines()[0].split()[:3] == ["benchmark", "metric", "value"]


def test_a_withheld_score_is_a_failure(world: Path, tmp_path: Path, run: Run) -> None:
    questions = rows_of(world / "pope" / "coco_pope_random.json")
    rows = [{"question_id": questions[0]["question_id"], "text": "yes"}]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = run("score", "pope", "--data", world, "--answers", answers)
    assert code == 1 and "withheld" in out and "pope: " in err
    assert json.loads(run("score", "pope", "--data", world, "--answers", answers, "--json")[1])


def recipe_args(root: Path, world: Path, out: Path, *more: str) -> list[str]:
    """A run that takes seconds: tiny backbones, two steps a stage, four questions."""
    return [
        "run", "pocket-quick", "--out", str(out), f"model.vision={root / 'vision'}",
        f"model.language={root / 'language'}", f"data={world}", "world.images=6",
        "world.eval_images=6", "stages.align.steps=2", "stages.tune.steps=2",
        "stages.align.batch_size=2", "stages.tune.batch_size=2", "eval.benchmarks=[scienceqa]",
        "eval.limit=4", *more,
    ]  # fmt: skip


def test_run_a_recipe(root: Path, world: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    code, stdout, _ = run(*recipe_args(root, world, out), "--json")
    assert code == 0
    summary = json.loads(stdout)
    assert list(summary["stages"]) == ["align", "tune"]
    for name in ("recipe.yaml", "metrics.jsonl", "scores.json", "report.html"):
        assert (out / name).is_file(), name
    scores = json.loads((out / "scores.json").read_text())["benchmarks"]["scienceqa"]
    assert scores["n"] == 4 and scores["shuffled"]["protocol"]["control"] == "shuffled"
    assert scores == summary["benchmarks"]["scienceqa"]
    assert "ScienceQA" in (out / "report.html").read_text(encoding="utf-8")
    trained = (out / "tune" / "model.safetensors").stat().st_mtime_ns
    # The resolved recipe is the same run, however it is evaluated; nothing is trained again.
    more = ("eval.benchmarks=[scienceqa, vqav2]", "eval.options.vqav2.scorer=before-2021")
    code, stdout, _ = run("run", out / "recipe.yaml", *more, "--out", out)
    assert code == 0 and f"report: {out / 'report.html'}" in stdout
    protocol = json.loads((out / "eval" / "vqav2" / "scores.json").read_text())["protocol"]
    assert protocol["options"]["scorer"] == "before-2021"
    assert (out / "tune" / "model.safetensors").stat().st_mtime_ns == trained
    code, _, err = run(*recipe_args(root, world, out, "stages.tune.steps=3"))
    assert code == 2 and "stages.tune.steps: 2 there, 3 now" in err and "--resume never" in err
    assert "steps: 3" not in (out / "recipe.yaml").read_text()


def test_a_run_goes_on_after_everything_was_moved(
    root: Path, world: Path, tmp_path: Path, run: Run
) -> None:
    assert run(*recipe_args(root, world, tmp_path / "run"))[0] == 0
    trained = (tmp_path / "run" / "tune" / "model.safetensors").stat().st_mtime_ns
    out, data = tmp_path / "moved", tmp_path / "data"
    (tmp_path / "run").rename(out)
    shutil.copytree(world, data)
    shutil.copytree(root / "vision", tmp_path / "vision")
    args = recipe_args(root, data, out, f"model.vision={tmp_path / 'vision'}")
    assert run(*args)[0] == 0
    assert (out / "tune" / "model.safetensors").stat().st_mtime_ns == trained
    kept = (out / "recipe.yaml").read_text()
    assert str(data) in kept
    # Other content is refused, and the recipe beside the results stays that of the results.
    changed = data / "llava" / "instruct.json"
    changed.write_bytes(changed.read_bytes() + b" ")
    code, _, err = run(*args, "name=other")
    assert code == 2 and "other data" in err
    assert (out / "recipe.yaml").read_text() == kept


def test_run_refuses_before_it_makes_anything(
    root: Path, world: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    for more, said in (
        ("model.connector=mlpx", "connector 'mlpx'"),
        ("model.template=vicuna", "Did you mean 'vicuna_v1'?"),
        ("model.vision=pocket-visoin", "Did you mean 'pocket-vision'?"),
        ("stages.tune.lora={targets: [q_porj]}", "Did you mean 'q_proj'?"),
        ("eval.benchmarks=[popee]", "Did you mean 'pope'?"),
        ("eval.options.scienceqa.labels=2910", "scienceqa has no option 'labels'"),
        ("eval.options.pope.labels=2910", "pope, which is not asked for"),
    ):
        code, _, err = run(*recipe_args(root, world, out, more))
        assert code == 2 and said in err
    code, _, err = run(*recipe_args(root, world, out, "stages.align=null"), "--stage", "align")
    assert code == 2 and "has no stage 'align'" in err
    with monkeypatch.context() as two:
        two.setenv("WORLD_SIZE", "2")
        code, _, err = run(*recipe_args(root, world, out, "stages.tune.batch_size=3"))
    assert code == 2 and "2 processes take equal shares" in err
    assert not out.exists()
    (tmp_path / "none.json").write_text("[]")
    none = f"stages.tune.data=[{{path: {tmp_path / 'none.json'}}}]"
    code, _, err = run(*recipe_args(root, world, out, none))
    assert code == 2 and "has no rows" in err and not (out / "align").exists()
    code, _, err = run(*recipe_args(root, world, out), "--stage", "tune")
    assert code == 2 and "Run the stage 'align' first" in err
    args = recipe_args(root, world, out, "world=null", f"data={tmp_path}")
    code, _, err = run(*args, "--resume", "never")
    assert code == 2 and "pretrain.json" in err


def test_lines_of_a_stage_that_has_not_begun_may_change(
    root: Path, world: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "run"
    few = ("stages.tune.max_tokens=20", "eval=null")
    code, _, err = run(*recipe_args(root, world, out, *few))
    assert code == 2 and "are allowed and nothing is cut off" in err
    aligned = (out / "align" / "model.safetensors").stat().st_mtime_ns
    # What was wrong with tune is mended, and align need not be trained again.
    assert run(*recipe_args(root, world, out, "eval=null"))[0] == 0
    assert (out / "align" / "model.safetensors").stat().st_mtime_ns == aligned
    assert "max_tokens: 20" not in (out / "recipe.yaml").read_text()
    code, _, err = run(*recipe_args(root, world, out, *few))
    assert code == 2 and "was made with another recipe" in err and "--stage tune" in err
    # That stage alone, anew; the recipe beside it cannot say what was not done.
    alone = ("--stage", "tune", "--resume", "never")
    anew = recipe_args(root, world, out, "stages.tune.steps=3", "eval=null")
    assert run(*anew, *alone)[0] == 0
    code, _, err = run(*anew, "stages.align.steps=5", *alone)
    assert code == 2 and "stages.align.steps: 2 there, 5 now" in err
    kept = json.loads((out / "tune" / "training.json").read_text())
    assert kept["result"]["steps"] == 3
    assert (out / "align" / "model.safetensors").stat().st_mtime_ns == aligned


def test_two_runs_do_not_work_in_one_directory(
    root: Path, world: Path, tmp_path: Path, run: Run
) -> None:
    args = recipe_args(root, world, tmp_path / "out", "eval=null")
    (tmp_path / "out").mkdir()
    held = "from filelock import FileLock; import sys\n"
    held += "with FileLock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", held, str(tmp_path / "out" / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        code, _, err = run(*args)
        assert code == 2 and "another run is at work in" in err and "another --out" in err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.lock"]
        other.kill()
    code, out, _ = run(*args)
    report = tmp_path / "out" / "report.html"
    assert code == 0 and f"report: {report}" in out
    # Nothing judges this run, and its curves are drawn.
    assert "The run asked for no evaluation" in report.read_text(encoding="utf-8")
