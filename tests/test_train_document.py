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
# What the document says of a run that stops, and a change to a sound run that makes it say so.
PROVOKED = {
    "are allowed and nothing is cut off": ["stages.align.max_tokens=40"],
    "a packed row must hold the longest conversation": ["stages.tune.packing={tokens: 100}"],
    "was made with another recipe": ["stages.tune.batch_size=8"],
    "which does not exist": ["data=elsewhere"],
    "both must be finite": [
        "stages.align.train={connector: 1e30}", "stages.align.clip=null", "stages.align.steps=4",
    ],
}  # fmt: skip


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
    verify = ("data", "verify", "photos/train.json", "--images", "photos/images")
    assert run(*verify, "--recipe", "mine.yaml")[0] == 0
    code, out, err = run("run", "mine.yaml", "--out", "runs/mine", *short)
    assert code == 0, err
    assert Path("runs/mine/tune/training.json").is_file()
    for message, change in PROVOKED.items():
        assert message in table()
        place = "runs/mine" if "another recipe" in message else f"runs/{len(message)}"
        code, _, err = run("run", "mine.yaml", "--out", place, *short, *change)
        assert (code, message in err) == (2, True), err
    Path("photos/images/2.png").write_bytes(b"no picture")
    code, _, err = run("run", "mine.yaml", "--out", "runs/broken", *short)
    assert code == 2 and "is not an image that can be read" in err
    code, _, _ = run(*verify)
    assert code == 1 and "2.png" in Path("photos/train.json.verify.jsonl").read_text()


def table() -> list[str]:
    """The messages that the document lists."""
    return re.findall(r"^\| `([^`]+)` \|", TEXT.split("## When a run stops")[1], re.MULTILINE)


def test_the_messages_are_those_of_the_code() -> None:
    code = "".join(path.read_text("utf-8") for path in (ROOT / "src/pumice").rglob("*.py"))
    # Sentences are written over several lines.
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    assert len(table()) >= 8
    assert [message for message in table() if message not in code] == []
