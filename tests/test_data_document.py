"""docs/data.md is true: its commands run on the world's files, its rules are those of the shelf."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from command_lines import code_blocks
from conftest import Run
from pumice.data.academic import CONVERTERS
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
