"""Studies: which runs they are, and that each is run once, whatever happens on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pumice.cli.app import main
from pumice.core.errors import DataError, PumiceError
from pumice.core.files import read_json
from pumice.processing.response_formats import SHORT
from pumice.recipe.schema import Recipe, World
from pumice.study.analyse import analyse, metrics_of
from pumice.study.cells import Cell, arms_of, cells_of, in_running_order
from pumice.study.costs import Cost
from pumice.study.findings import findings_text
from pumice.study.report import write_report
from pumice.study.runner import Job, run_missing
from pumice.study.spec import StudyFile, load_study, study_names
from pumice.study.store import Store
from pumice.world.datasets import make_world
from study_files import COST, InProcess, study_tree, write_study

Run = Callable[..., tuple[int, str, str]]
NOWHERE = Path("study.yaml")


def cells(
    tree: dict[str, Any], cost_of: Callable[[Recipe], Cost] = lambda recipe: COST
) -> list[Cell]:
    return cells_of(StudyFile.model_validate(tree), NOWHERE, cost_of)


def make_no_world(place: Path, asked: World) -> None:
    raise AssertionError("the recipe names its data")


def run_study(tree: dict[str, Any], store: Store, launch: InProcess | None = None) -> list[str]:
    """Runs what is missing; gives the keys that were started."""
    launch = launch or InProcess()
    run_missing(cells(tree), store, launch, make_no_world)
    return launch.keys


def table(tree: dict[str, Any], store: Store) -> dict[str, Any]:
    """What a study shows, without what it took."""
    found = analyse(StudyFile.model_validate(tree), cells(tree), store).to_dict()
    for arm in found["arms"]:
        del arm["cost"]
    return found


TWO_AXES: dict[str, Any] = {
    "axes": {
        "connector": {"path": "model.connector", "values": ["mlp2x_gelu", "linear"]},
        "steps": {"variants": {"few": {}, "more": {"stages.tune.steps": 5}}},
    },
    "claims": [
        {"text": "more steps help", "source": "-", "metric": "scienceqa.img_accuracy",
         "axis": "steps", "more": "more", "less": "few", "within": {"connector": "linear"}},
    ],
}  # fmt: skip


# --- which runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axis": {}}, "unknown key"),
        ({"axes": {"a": {"path": "model.connector"}}}, "set path and values, or variants"),
        ({"axes": {"a": {"path": "x", "values": [1], "cumulative": True}}}, "needs variants"),
        ({"reference": {"connector": "liner"}}, "Did you mean 'linear'?"),
        ({"reference": {"conector": "linear"}}, "Did you mean 'connector'?"),
        ({"seeds": [0, 0]}, "names a seed twice"),
        ({"against": [["resolution", "pope.mean_f1"]]}, "names the axis 'resolution'"),
        ({"budget": {"equal": "hours"}}, "'steps', 'tokens' or 'flops'"),
        ({"grid": "one-at-a-time", **TWO_AXES}, "the grid one-at-a-time does not have"),
        ({"sizes": {"paper": {"seeds": [0]}}}, ""),
    ],
)
def test_a_study_file_is_checked(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s.yaml", study_tree(tmp_path, tmp_path, **change))
    if not said:
        assert load_study(str(file), "paper")[0].seeds == [0]
        assert load_study(str(file))[0].seeds == [0, 1]
        with pytest.raises(PumiceError, match="Did you mean 'paper'"):
            load_study(str(file), "papr")
        return
    with pytest.raises(PumiceError) as caught:
        load_study(str(file))
    assert said in str(caught.value) and "s.yaml" in str(caught.value)


def test_what_the_command_line_sets_in_a_study(tmp_path: Path) -> None:
    file = write_study(tmp_path / "s.yaml", study_tree(tmp_path, tmp_path, **TWO_AXES))

    def loaded(*overrides: str) -> StudyFile:
        return load_study(str(file), overrides=overrides)[0]

    # A path of the recipe is one key: no section around it is set as a whole.
    study = loaded("set.stages.tune.steps=9", "axes.steps.variants.more.stages.tune.steps=8")
    assert study.set == {**loaded().set, "stages.tune.steps": 9}
    assert study.axes["steps"].levels()["more"] == {"stages.tune.steps": 8}
    assert loaded("axes.steps.variants.none={}").axes["steps"].levels()["none"] == {}
    assert set(loaded("axes.seed={path: seed, values: [0, 1]}").axes) == {*TWO_AXES["axes"], "seed"}
    with pytest.raises(PumiceError, match="Did you mean 'connector'"):
        loaded("axes.conector.values.1=resampler")
    with pytest.raises(PumiceError, match="sizes is an unknown key"):
        loaded("sizes.paper.seeds=[0]")


def test_grids_and_ladders(root: Path, world: Path) -> None:
    axes = {
        "connector": {"path": "model.connector", "values": ["mlp2x_gelu", "linear"]},
        "steps": {"path": "stages.tune.steps", "values": [3, 5, 7]},
    }
    tree = study_tree(root, world, axes=axes)
    assert len(cells(tree)) == 2 * 3 * 2
    one = StudyFile.model_validate({**tree, "grid": "one-at-a-time"})
    assert [arm.name for arm in arms_of(one)] == [
        "connector mlp2x_gelu, steps 3", "connector linear, steps 3",
        "connector mlp2x_gelu, steps 5", "connector mlp2x_gelu, steps 7",
    ]  # fmt: skip
    steps = {"a": {}, "b": {"model.connector": "linear"}, "c": {"stages.tune.steps": 9}}
    ladder = {"rung": {"variants": steps, "cumulative": True}}
    last = cells(study_tree(root, world, axes=ladder))[-1].recipe
    assert (last.model.connector, last.stages.tune and last.stages.tune.steps) == ("linear", 9)


def test_a_run_is_named_by_what_it_computes(root: Path, world: Path) -> None:
    tree = study_tree(root, world)
    keys = [cell.key for cell in cells(tree)]
    assert len(set(keys)) == 4
    # One value changed: the runs of the others keep their names.
    other = study_tree(
        root, world, axes={"c": {"path": "model.connector", "values": ["mlp2x_gelu", "mlp3x_gelu"]}}
    )
    assert [cell.key for cell in cells(other)][:2] == keys[:2]
    assert not set(keys[2:]) & {cell.key for cell in cells(other)}
    # A run's name changes nothing, its data does.
    named = study_tree(root, world, axes={"n": {"path": "name", "values": ["a", "b"]}})
    assert [cell.key for cell in cells(named)] == keys[:2] * 2
    tree["set"]["world"] = None
    before = cells(tree)[0].key
    file = world / "llava" / "instruct.json"
    content = file.read_bytes()
    try:
        file.write_bytes(content + b" ")
        assert cells(tree)[0].key != before
    finally:
        file.write_bytes(content)
    tree["set"]["model.vision"] = "owner/not-on-this-machine"
    assert cells(tree)[0].key != before


def test_first_stages_come_before_those_that_take_them_over(root: Path, world: Path) -> None:
    axes = {"steps": {"path": "stages.tune.steps", "values": [3, 4]}}
    order = in_running_order(cells(study_tree(root, world, axes=axes)))
    assert [cell.seed for cell in order] == [0, 1, 0, 1]
    assert len({cell.begins for cell in order}) == 2


@pytest.mark.parametrize(("equal", "steps"), [("steps", 3), ("tokens", 6), ("flops", 4)])
def test_a_budget_decides_the_steps(root: Path, world: Path, equal: str, steps: int) -> None:
    cheap = Cost(16, 58, {"align": 100, "tune": 150}, 1000)

    def cost_of(recipe: Recipe) -> Cost:
        return cheap if recipe.model.connector == "linear" else COST

    tree = study_tree(root, world, budget={"equal": equal, "stage": "tune"})
    tuned = [cell.recipe.stages.tune for cell in cells(tree, cost_of)]
    assert [stage and stage.steps for stage in tuned] == [3, 3, steps, steps]
    assert cells(tree, cost_of)[2].recipe.stages.align == cells(tree)[0].recipe.stages.align


def test_shipped_studies_hold_in_every_size(tmp_path: Path) -> None:
    assert study_names()
    for name in study_names():
        for size in ("pocket", "paper"):
            study, file = load_study(name, size)
            found = cells_of(study, file, lambda recipe: COST)
            assert len(found) == len(arms_of(study)) * len(study.seeds)
            assert metrics_of(study, found)
            assert study.about and study.source, (name, size)


@pytest.mark.parametrize("name", ["ladder", "answer-length"])
def test_every_arm_is_asked_as_its_short_answers_were_trained(name: str, tmp_path: Path) -> None:
    make_world(tmp_path, images=8, eval_images=2, sources=True)
    study, file = load_study(name)
    forms = {"short": SHORT, "none": "?", "qa": " A:"}
    for cell in cells_of(study, file, lambda recipe: COST):
        assert cell.recipe.world and cell.recipe.world.sources and cell.recipe.eval
        chosen = cell.recipe.eval.options.get("pope", {}).get("prompt", "short")
        assert cell.recipe.stages.tune
        files = {entry.path: tmp_path / entry.path for entry in cell.recipe.stages.tune.data}
        for path, place in files.items():
            asked = [row["conversations"][0]["value"] for row in read_json(place)]
            assert asked
            if any(source in path for source in ("vqav2", "gqa", "ocrvqa")):
                assert all(text.endswith(forms[chosen]) for text in asked), (cell.arm.name, path)


# --- running ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(root: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which the study of `study_tree` is run."""
    store = Store(tmp_path_factory.mktemp("store"))
    assert len(run_study(study_tree(root, world), store)) == 4
    return store


def test_every_run_is_run_once(root: Path, world: Path, ran: Store) -> None:
    tree = study_tree(root, world)
    assert run_study(tree, ran) == []
    # Another study with the same base and a value more: only that is run, from a known stage.
    axes = {"steps": {"path": "stages.tune.steps", "values": [3, 4]}}
    more = study_tree(root, world, axes=axes, name="other", seeds=[0])
    new = run_study(more, ran)
    assert new == [cells(more)[1].key]
    kept = [path for path in ran.stages.iterdir() if path.is_dir()]
    stages = [json.loads((p / "checkpoint" / "training.json").read_text())["stage"] for p in kept]
    assert sorted(stages) == ["align"] * 4 + ["tune"] * 5
    found = table(tree, ran)
    (mlp, linear) = found["arms"]
    assert mlp["metrics"]["scienceqa.img_accuracy"]["verdict"] == "reference"
    assert linear["metrics"]["scienceqa.img_accuracy"]["difference"] is not None
    assert len(mlp["metrics"]["scienceqa.img_accuracy"]["seeds"]) == 2
    assert str(ran.root) not in json.dumps(found)


def test_a_stopped_study_gives_the_same_table(
    root: Path, world: Path, ran: Store, tmp_path: Path
) -> None:
    tree, broken = study_tree(root, world, seeds=[0]), Store(tmp_path)

    def dies(job: Job) -> str | None:
        # In the middle of the second run: its first stage is there, the second is not.
        if broken.state(cells(tree)[0].key) == "done":
            with pytest.raises(SystemExit):
                main(["run", str(job.recipe), "--out", str(job.out), "--stage", "align"])
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        run_study(tree, broken, InProcess(dies))
    assert [broken.state(cell.key) for cell in cells(tree)] == ["done", "missing"]
    assert len(run_study(tree, broken)) == 1
    assert table(tree, broken) == table(tree, ran)


def test_what_another_study_works_on_comes_last(root: Path, world: Path, tmp_path: Path) -> None:
    tree, store = study_tree(root, world, seeds=[0]), Store(tmp_path)
    first, second = (cell.key for cell in cells(tree))
    store.lock(first).parent.mkdir(parents=True)
    theirs = FileLock(store.lock(first), thread_local=False).acquire().lock

    def told(job: Job) -> str:
        theirs.release()
        return "enough for this test"

    assert run_study(tree, store, InProcess(told)) == [second, first]
    assert not theirs.is_locked


def test_a_failed_run_is_a_line_with_its_error(
    root: Path, world: Path, ran: Store, tmp_path: Path
) -> None:
    axes = {"c": {"path": "model.connector", "values": ["mlp2x_gelu", "mlp3x_gelu"]}}
    tree = study_tree(root, world, axes=axes)
    new = [cell.key for cell in cells(tree)][2:]
    assert run_study(tree, ran, InProcess(lambda job: "out of <memory>")) == new
    study = StudyFile.model_validate(tree)
    found = write_report(study, cells(tree), ran, tmp_path)
    arm = found.to_dict()["arms"][1]
    assert found.failed and arm["errors"] == {"0": "out of <memory>", "1": "out of <memory>"}
    assert arm["metrics"]["scienceqa.img_accuracy"]["verdict"] == "not measured"
    for name, said in (("study.md", "of <"), ("study.html", "of &lt;"), ("study.json", "of <")):
        assert f"out {said}" in (tmp_path / name).read_text(encoding="utf-8")
    # It is tried again; with one seed there, the difference is over that one and says so.
    tree = {**tree, "seeds": [0]}
    assert run_study(tree, ran) == new[:1]
    tree["seeds"] = [0, 1]
    arm = table(tree, ran)["arms"][1]
    assert list(arm["errors"]) == ["1"]
    assert arm["metrics"]["scienceqa.img_accuracy"]["verdict"].endswith("(one seed)")


def test_an_axis_that_cannot_matter_makes_no_difference(
    root: Path, world: Path, ran: Store
) -> None:
    axes = {"name": {"path": "name", "values": ["one", "two"]}}
    tree = study_tree(root, world, axes=axes)
    assert run_study(tree, ran) == []
    found = table(tree, ran)["arms"][1]["metrics"]["scienceqa.img_accuracy"]
    assert found["difference_interval"] == (0, 0)
    assert found["verdict"] == "no difference at this size"


def test_the_same_questions_in_other_prompts_are_compared_and_other_questions_are_not(
    root: Path, world: Path, tmp_path: Path
) -> None:
    store, wordings = Store(tmp_path), {"short": {}, "qa": {"eval.options.vqav2.prompt": "qa"}}
    tree = study_tree(
        root, world, axes={"p": {"variants": wordings}}, seeds=[0], evaluations=["vqav2"],
        metrics=["vqav2.answer_words"],
    )  # fmt: skip
    run_study(tree, store)
    short, asked = table(tree, store)["arms"]
    assert asked["metrics"]["vqav2.answer_words"]["difference"] is not None
    assert not short["errors"] and not asked["errors"]
    # Another scorer makes other numbers of the same answers.
    other = {"short": {}, "scorer": {"eval.options.vqav2.scorer": "always"}}
    tree["axes"] = {"p": {"variants": other}}
    assert len(run_study(tree, store)) == 1
    with pytest.raises(DataError, match="other questions of vqav2"):
        table(tree, store)


# --- the command --------------------------------------------------------------------------------


def test_the_plan_lists_runs_and_time(root: Path, world: Path, tmp_path: Path, run: Run) -> None:
    file = write_study(tmp_path / "s.yaml", study_tree(root, world))
    code, out, _ = run("study", file, "--plan", "--out", tmp_path / "out", "--json")
    plan = json.loads(out)
    assert code == 0 and not (tmp_path / "out").exists()
    assert (plan["runs"], plan["missing"], plan["first_stages"]) == (4, 4, 4)
    assert plan["seconds"] > 0 and "record of the pocket studies" in plan["rate_from"]
    assert plan["cells"][0]["image_tokens"] == 16 and plan["cells"][0]["flops"] > 1e6
    code, out, _ = run("study", file, "--plan", "--seeds", 1)
    assert code == 0 and "2 runs, 2 of them missing" in out and "Time" in out
    code, _, err = run("study", file, "--plan", "--seeds", 3)
    assert code == 2 and "has 2: 0, 1" in err
    tree = study_tree(root, world, metrics=["popee.f1"])
    code, _, err = run("study", write_study(file, tree), "--plan")
    assert code == 2 and "popee.f1" in err and "scienceqa" in err
    # Before hours of runs, not after them.
    tree = study_tree(root, world, metrics=["scienceqa.acuracy"])
    code, _, err = run("study", write_study(file, tree), "--plan")
    assert code == 2 and "scienceqa" in err and "Did you mean 'accuracy'?" in err
    code, _, err = run("study", file)
    assert code == 2 and "--out" in err
    assert "data-efficiency" in run("study", "--list")[1]


def test_findings_are_made_from_the_records() -> None:
    """docs/findings.md is what `python benchmarks/findings.py` writes, from records."""
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "findings.md").read_text(encoding="utf-8")
    kept = root / "benchmarks" / "results" / "studies"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in kept.glob("*/study.json")]
    studies = {name: load_study(name)[0] for name in study_names()}
    assert page == findings_text(kept, studies)
    plots = re.findall(r"\]\(\.\./([^)]+\.svg)\)", page)
    assert plots and all((root / plot).is_file() for plot in plots)
    assert records and all(len(record["seeds"]) >= 3 for record in records)
    unrun = page.partition("## Not run yet")[2]
    assert all(
        (f"`{name}`" in unrun) == (name not in {r["name"] for r in records}) for name in studies
    )
