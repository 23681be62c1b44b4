"""docs/train.md: its ten lines train, and its messages are those of the code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from command_lines import code_blocks

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
Run = Callable[..., tuple[int, str, str]]


def test_own_data_in_ten_lines(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = code_blocks(TEXT, "yaml")[0]
    assert len(recipe.strip().splitlines()) == 10
    monkeypatch.chdir(tmp_path)
    Path("photos/images").mkdir(parents=True)
    rows = []
    for number in range(4):
        tiny.noise(number).save(f"photos/images/{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "Noise."},
        ]
        rows.append({"id": f"{number}", "image": f"{number}.png", "conversations": turns})
    Path("photos/train.json").write_text(json.dumps(rows))
    Path("mine.yaml").write_text(recipe)
    short = [f"stages.{stage}.{key}" for stage in ("align", "tune") for key in ("steps=2",)]
    code, out, err = run("run", "mine.yaml", "--out", "runs/mine", *short)
    assert code == 0, err
    assert Path("runs/mine/tune/training.json").is_file()


def test_the_messages_are_those_of_the_code() -> None:
    code = "".join(path.read_text("utf-8") for path in (ROOT / "src/pumice").rglob("*.py"))
    # Sentences are written over several lines.
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    table = TEXT.split("## When a run stops")[1]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) >= 8
    assert [message for message in messages if message not in code] == []
