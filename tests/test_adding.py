"""docs/adding.md is true: its connector gets its row, its benchmark goes on the shelf."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from command_lines import code_blocks
from pumice.core.errors import PumiceError
from pumice.core.registry import Registry
from pumice.eval import benchmarks
from pumice.eval.benchmark import Benchmark
from pumice.eval.runner import rescore
from pumice.infer.model import load
from pumice.models.connectors import build_connector, own
from pumice.recipe.yaml_text import parse_yaml
from pumice.study.analyse import analyse
from pumice.study.cells import cells_of
from pumice.study.runner import run_missing
from pumice.study.spec import load_study
from pumice.study.store import Store
from study_files import COST, InProcess, study_tree, write_study

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding.md"


def _python() -> list[str]:
    return code_blocks(PAGE.read_text(encoding="utf-8"), "python")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, object], str, str]:
    """What the page's first block defines, its table line, and its test."""
    code, line, test = _python()[1:]
    module = types.ModuleType("counting")
    monkeypatch.setitem(sys.modules, "counting", module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module.__dict__, line, test


def test_the_example_is_a_benchmark_of_about_sixty_lines(
    page: tuple[dict[str, object], str, str],
) -> None:
    names, line, _ = page
    table = eval("{" + line + "}", names)
    shelf: Registry[Benchmark] = Registry(
        "benchmark", {**{name: benchmarks.BENCHMARKS[name] for name in ("pope",)}, **table}
    )
    assert shelf["counting"].name == "counting"
    code = _python()[1]
    assert len(code.splitlines()) < 80


def test_the_examples_own_test_passes_and_can_fail(
    page: tuple[dict[str, object], str, str], tmp_path: Path
) -> None:
    names, _, test = page
    names |= {"json": json, "rescore": rescore}
    exec(test, names)
    run = names["test_counting"]
    assert callable(run)
    run(tmp_path)
    names["_NUMBER"] = re.compile(r"^\d+")
    with pytest.raises(AssertionError):
        run(tmp_path)


# --- a connector --------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's connector in a directory of the user's, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own, "_trusted", set())
    file = tmp_path / "norm_mlp.py"
    file.write_text(_python()[0], encoding="utf-8")
    return file


def test_an_own_connector_gets_its_row_and_shares_the_other_runs(
    root: Path, world: Path, mine: Path
) -> None:
    levels = {name: {"model.connector": name} for name in ("mlp2x_gelu", "linear")}
    shipped = study_tree(root, world, seeds=[0], axes={"connector": {"variants": levels}})
    write_study(Path("shipped.yaml"), shipped)
    (text,) = code_blocks(PAGE.read_text(encoding="utf-8"), "yaml")
    write_study(Path("mine.yaml"), {**parse_yaml(text, "the page"), "extends": "shipped.yaml"})
    store, launch = Store(Path("store")), InProcess()

    def run(name: str, *overrides: str) -> list[dict]:
        study, file = load_study(name, overrides=overrides)
        cells = cells_of(study, file, lambda recipe: COST)
        launch.keys.clear()
        run_missing(cells, store, launch, lambda place, settings: None)
        return analyse(study, cells, store).to_dict()["arms"]

    assert [arm["name"] for arm in run("shipped.yaml")] == ["mlp2x_gelu", "linear"]
    rows = run("shipped.yaml", "axes.connector.variants.norm_mlp={model.connector: norm_mlp.py}")
    assert [arm["name"] for arm in rows] == ["mlp2x_gelu", "linear", "norm_mlp"]
    assert len(launch.keys) == 1 and not rows[2]["errors"]
    assert rows[2]["metrics"]["scienceqa.img_accuracy"]["difference"] is not None
    # The file that extends it has one row more, and that is all that is run.
    assert [arm["name"] for arm in run("mine.yaml")][2:] == ["norm_mlp", "norm_mlp, wide"]
    assert len(launch.keys) == 1
    # Another name of the same file is the same run; another content is another.
    moved = mine.rename("again.py")
    again = "axes.connector.variants.again={model.connector: again.py}"
    assert not run("shipped.yaml", again)[2]["errors"] and launch.keys == []
    moved.write_text(moved.read_text().replace("gelu", "silu"))
    assert not run("shipped.yaml", again)[2]["errors"] and len(launch.keys) == 1


def test_a_checkpoint_keeps_the_code_and_runs_it_for_those_who_trust_it(
    root: Path, world: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = study_tree(root, world, seeds=[0], axes={"c": {"path": "model.connector",
                      "values": ["shuffle2x2+norm_mlp.py"]}})  # fmt: skip
    study, file = load_study(str(write_study(Path("s.yaml"), tree)))
    (cell,) = cells_of(study, file, lambda recipe: COST)
    store = Store(Path("store"))
    run_missing([cell], store, InProcess(), lambda place, settings: None)
    checkpoint = store.run(cell.key) / "tune"
    told = (checkpoint / "config.json").read_text() + (checkpoint / "training.json").read_text()
    assert '"shuffle2x2+connector.py"' in told and str(mine.parent) not in told
    mine.unlink()
    monkeypatch.setattr(own, "_trusted", set())
    with pytest.raises(PumiceError, match="PUMICE_TRUST_CODE=1"):
        load(checkpoint)
    monkeypatch.setenv("PUMICE_TRUST_CODE", "1")
    assert load(checkpoint).lmm.connector.num_tokens == 4
    (checkpoint / "connector.py").unlink()
    with pytest.raises(PumiceError, match=r"its code is not there"):
        load(checkpoint)


def test_a_checkpoint_keeps_the_code_that_was_built(mine: Path, tmp_path: Path) -> None:
    """The file may be edited, or go, while the weights are trained."""
    code, folder = mine.read_text(), tmp_path / "checkpoint"
    folder.mkdir()
    build_connector("norm_mlp.py", 32, 24, 16, {}, vocab_size=9)
    for change in (lambda: mine.write_text("the next idea"), mine.unlink):
        change()
        assert own.keep_own("norm_mlp.py", folder) == "connector.py"
        assert (folder / "connector.py").read_text() == code
    assert own.kept_own("connector.py", folder) == str(folder / "connector.py")


def test_what_can_be_wrong_with_a_connector_file(mine: Path) -> None:
    def build(name: str, **options: object) -> torch.nn.Module:
        return build_connector(name, 32, 24, 16, options, vocab_size=9)

    assert build("norm_mlp.py", width=48)(torch.zeros(2, 16, 32)).shape == (2, 16, 24)
    with pytest.raises(PumiceError, match="Did you mean 'width'"):
        build("norm_mlp.py", wdth=48)
    with pytest.raises(PumiceError, match=r"nrm_mlp\.py does not exist"):
        build("nrm_mlp.py")
    mine.write_text("def make(name, sizes, options): ...")
    with pytest.raises(PumiceError, match=r"defines no function build"):
        build("norm_mlp.py")
    mine.write_text("def build(name, sizes, options): return 5")
    with pytest.raises(PumiceError, match=r"gave 5; a pumice"):
        build("norm_mlp.py")
