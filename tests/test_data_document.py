"""docs/data.md is true: its commands run on the world's files, its rules are those of the shelf."""

from __future__ import annotations

import json
import shlex
import sys
import types
from pathlib import Path

import pytest

from command_lines import code_blocks
from conftest import Run
from pumice.core.errors import PumiceError
from pumice.core.registry import Registry
from pumice.data.academic import CONVERTERS, convert
from pumice.data.academic.base import Converter
from pumice.recipe.mixture import load_mixture

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text("utf-8")


def test_the_commands_on_the_world_run(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    Path("runs/mixture.yaml").write_text(code_blocks(PAGE, "yaml")[0], "utf-8")
    lines = [line for line in code_blocks(PAGE, "bash")[0].splitlines() if line]
    assert len(lines) == 7
    for line in lines:
        code, out, err = run(*shlex.split(line)[1:])
        assert code == 0, (line, out, err)
    assert "no errors" in out
    record = json.loads(Path("runs/train.jsonl.mix.json").read_text("utf-8"))
    assert {name: entry["rows"] for name, entry in record["sources"].items()}["vg"] == 20


def test_the_tables_name_what_there_is() -> None:
    whole, _ = load_mixture("llava15-665k")
    for name, entry in whole.sources.items():
        assert entry.expect is not None and f"| `{name}` | {entry.expect.rows:,} |" in PAGE
        assert f"pumice data convert {name} " in PAGE and entry.path in PAGE
    rules = {rule for name in CONVERTERS for rule in CONVERTERS[name].rules.model_fields}
    shown = [
        line.split("|")[1] for line in PAGE.split("## The rules")[1].splitlines() if "|" in line
    ]
    named = {word for cell in shown for word in cell.split("`")[1::2]}
    assert named and named <= rules


def test_the_example_of_a_source_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = code_blocks(PAGE, "python")
    module = types.ModuleType("counting")
    monkeypatch.setitem(sys.modules, "counting", module)
    exec(compile(code, "data.md", "exec"), module.__dict__)
    table = eval("{" + line + "}", module.__dict__ | {"Converter": Converter})
    monkeypatch.setattr(convert, "CONVERTERS", Registry("source", table))
    rows = [{"image": f"{n}.jpg", "question": " How many? ", "number": n} for n in (3, 30)]
    file, out = tmp_path / "counting.json", tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    report = convert.convert("counting", [file], out, rules={"image": "x/{image}"})
    (row,) = json.loads(out.read_text())
    asked, said = (turn["value"] for turn in row["conversations"])
    assert row["image"] == "x/3.jpg" and said == "3"
    assert asked == "<image>\nHow many?\nAnswer the question using a single word or phrase."
    assert report["dropped"] == {"larger number": 1} and report["read"] == 2
    with pytest.raises(PumiceError, match="least|most"):
        convert.convert("counting", [file], out, rules={"mots": "3"})
