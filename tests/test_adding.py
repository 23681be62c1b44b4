"""docs/adding.md is true: its benchmark goes on the shelf and its test passes."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest

from command_lines import code_blocks
from pumice.core.registry import Registry
from pumice.eval import benchmarks
from pumice.eval.benchmark import Benchmark
from pumice.eval.runner import rescore

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding.md"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, object], str, str]:
    """What the page's first block defines, its table line, and its test."""
    code, line, test = code_blocks(PAGE.read_text(encoding="utf-8"), "python")
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
    code = code_blocks(PAGE.read_text(encoding="utf-8"), "python")[0]
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
