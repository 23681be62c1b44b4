"""What the documents say is true: commands parse, files exist, names are public."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import pumice
from command_lines import code_blocks, parse
from pumice.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = set(
    re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
)
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def commands(markdown: str) -> list[str]:
    lines = [line for block in code_blocks(markdown, "bash") for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def check(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS, line
    elif words[0] == "pumice":
        parse(line)
    else:
        assert words == [".", ".venv/bin/activate"], f"unknown command: {line}"


@each_document
def test_every_command_is_known(path: Path) -> None:
    for line in commands(path.read_text(encoding="utf-8")):
        check(line)


def test_the_readme_has_its_commands() -> None:
    lines = commands(README)
    assert len([line for line in lines if line.startswith("pumice ")]) >= 6
    assert "make demo" in README and "make test" in README


@pytest.mark.parametrize(
    "line", ["make nonsense", "pumice rnu pocket --out x", "pumice ask pocket hi --imag x", "ls"]
)
def test_the_check_refuses(line: str) -> None:
    with pytest.raises(AssertionError):
        check(line)


@each_document
def test_inline_commands_parse(path: Path) -> None:
    for text in re.findall(r"`(pumice [^`\n]+)`", path.read_text(encoding="utf-8")):
        if "--help" in text:
            continue
        if len(text.split()) == 2:
            assert text.split()[1] in {command.name for command in app.registered_commands} | {
                group.name for group in app.registered_groups
            }, text
        else:
            check(text)


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (path.parent / target).exists(), target


@each_document
def test_files_named_in_backticks_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rooms = "core|models|processing|data|infer|train|eval|recipe|study|cli|world"
    for name in re.findall(rf"`((?:{rooms})/[\w/]+(?:\.\w+|/))`", text):
        assert (ROOT / "src" / "pumice" / name).exists(), name
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).exists(), name


def test_python_blocks_use_public_names() -> None:
    for block in code_blocks(README, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pumice":
                assert node.attr in pumice.__all__


def test_every_room_is_on_the_map() -> None:
    folders = {path.parent.name for path in (ROOT / "src" / "pumice").glob("*/__init__.py")}
    mapped = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    assert mapped == folders


def test_the_demo_ends_with_every_benchmark() -> None:
    """In the directory that its run leaves; the twelve run offline there."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ndemo:")[1].split("\n\n")[0]
    lines = [line.strip().removeprefix("$(BIN)/") for line in recipe.splitlines()[1:]]
    asked = [line.replace("$(OUT)", "out") for line in lines if line.startswith("pumice ")]
    for line in asked:
        parse(line)
    assert asked[0].startswith("pumice run pocket --out out")
    assert "eval out/tune --bench all" in asked[1] and "--data out/data" in asked[1]
