"""The house keeps its shape: arrows, sizes, names, and nothing heavy at import."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "pumice"
LEVELS = {
    "core": 0,
    "models": 1,
    "processing": 2,
    "convert": 3,
    "data": 3,
    "infer": 4,
    "train": 5,
    "serve": 5,
    "eval": 5,
    "recipe": 6,
    "study": 7,
    "cli": 8,
}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
IDS = [str(path.relative_to(ROOT)) for path in TREES]
each_module = pytest.mark.parametrize("path", TREES, ids=IDS)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in TREES}


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """The pumice modules a file imports; with `at_import` only those imported when it is."""
    body: list[ast.AST] = list(ast.iter_child_nodes(TREES[path]))
    found = set()
    while body:
        node = body.pop()
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_import and (lazy or typing_only):
            continue
        body.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= imported_from(path, node)
    return {name for name in found if name.split(".")[0] == "pumice"}


def imported_from(path: Path, node: ast.ImportFrom) -> set[str]:
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        if path.name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, *([node.module] if node.module else [])])
    whole = {f"{base}.{alias.name}" for alias in node.names}
    modules = whole & NAMES
    return modules if modules == whole else modules | {base}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def allowed(source: str, target: str) -> bool:
    """Whether a file of room `source` may import from room `target`; "" is the package itself."""
    if source == target:
        return True
    if source in {"", "__main__"}:
        return target != "world"
    if source == "world":
        return target == "core"
    if target == "world":
        return source == "cli"
    if target == "":
        return source == "cli"
    return LEVELS[source] > LEVELS[target]


def test_every_room_has_a_level() -> None:
    rooms = {path.name for path in ROOT.iterdir() if any(path.glob("*.py"))}
    assert rooms <= LEVELS.keys() | {"world"}
    assert rooms >= {"core", "models", "processing", "data", "infer", "train", "eval", "cli"}


@each_module
def test_arrows_point_down(path: Path) -> None:
    source = room(module_name(path))
    wrong = [name for name in imports(path) if not allowed(source, room(name))]
    assert not wrong, f"{module_name(path)} must not import {wrong}"


def test_the_arrow_rule_refuses() -> None:
    assert not allowed("models", "processing")
    assert not allowed("train", "eval")
    assert not allowed("data", "infer")
    assert not allowed("eval", "recipe")
    assert not allowed("world", "models")
    assert not allowed("recipe", "world")
    assert not allowed("core", "")
    assert allowed("cli", "world")


def test_no_import_cycles() -> None:
    graph = {}
    for path in TREES:
        name = module_name(path)
        graph[name] = {other for other in imports(path, at_import=True) if other != name}
    # Raises CycleError with the modules of the cycle.
    graphlib.TopologicalSorter(graph).prepare()


@each_module
def test_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(TREES[path])


@each_module
def test_module_name_says_something(path: Path) -> None:
    assert not {"utils", "util", "helpers", "helper", "misc", "common"} & {
        path.stem,
        path.parent.name,
    }


@each_module
def test_nothing_prints(path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"print", "pprint", "breakpoint"}
    ]
    assert not calls


@each_module
def test_nothing_is_swallowed(path: Path) -> None:
    handlers = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ExceptHandler)]
    names = [ast.unparse(node.type) if node.type else "everything" for node in handlers]
    assert not {"everything", "Exception", "BaseException"} & set(names)


@each_module
def test_sizes(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long


def test_importing_is_light_and_changes_nothing() -> None:
    code = """
import logging, random, sys
random.seed(1); before = random.getstate()
import pumice
import pumice.cli.app
heavy = {"torch", "transformers", "numpy", "PIL", "pydantic", "rich"} & set(sys.modules)
assert not heavy, heavy
assert random.getstate() == before
assert not logging.getLogger().handlers and not logging.getLogger("pumice").handlers
assert pumice.__version__ and "load" in dir(pumice)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
