"""A connector of the user's own: a Python file named where a connector is, such as `mine.py`.

The file holds what a file of this shelf holds, and its function `build(name, sizes, options)`. A
checkpoint keeps a copy of it, so that it still describes itself. That copy is code, and checkpoints
may come from anywhere: it is run if a recipe has named the same content in this process, or if the
environment says so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.files import sha256_bytes, sha256_file
from pumice.models.connectors.base import Builder, Connector, Sizes

BUILDER = "build"
COPY = "connector.py"
TRUST = "PUMICE_TRUST_CODE"
_NAME = re.compile(r"(?P<before>(?:(?:shuffle|average)[2-9]x[2-9]\+)*)(?P<file>.+\.py)")
_trusted: set[str] = set()
# What each file held when it was last built: it may be edited while its weights are trained.
_built: dict[Path, bytes] = {}


def own_file(name: str) -> Path | None:
    """The file that a connector's name ends with; None where the name is one of the shelf's."""
    found = _NAME.fullmatch(name)
    return Path(found["file"]).expanduser() if found else None


def with_file(name: str, file: str) -> str:
    """The name with another file in the place of its own."""
    found = _NAME.fullmatch(name)
    assert found is not None
    return found["before"] + file


def build_own(name: str, sizes: Sizes, options: dict[str, Any]) -> Connector:
    """The connector that the file `name` builds."""
    path = _existing(name).resolve()
    code = path.read_bytes()
    content = sha256_bytes(code)
    connector = _builder(path, content)(name, sizes, options)
    if not isinstance(connector, Connector):
        raise PumiceError(
            f"{BUILDER}() of {path} gave {connector!r}; a pumice.models.connectors.Connector is "
            "needed. See docs/adding.md."
        )
    _trusted.add(content)
    _built[path] = code
    return connector


def named_by_content(name: str) -> str:
    """A connector's name with its own file, where it has one, told by what is in it."""
    return name if own_file(name) is None else with_file(name, sha256_file(_existing(name)))


def keep_own(name: str, folder: Path) -> str:
    """Writes a connector's own code, as it was built, into a checkpoint's folder.

    Gives the name to store there.
    """
    path = own_file(name)
    if path is None:
        return name
    code = _built.get(path.resolve())
    (folder / COPY).write_bytes(_existing(name).read_bytes() if code is None else code)
    return with_file(name, COPY)


def kept_own(name: str, folder: Path) -> str:
    """The name by which a checkpoint's connector is built: that of its copy, if it may be run."""
    if own_file(name) is None:
        return name
    path = folder / COPY
    if not path.is_file():
        raise PumiceError(
            f"{folder} was trained with a connector of its own, and its code is not there. Put the "
            f"file back as {COPY}."
        )
    content = sha256_file(path)
    if content not in _trusted and os.environ.get(TRUST) != "1":
        raise PumiceError(
            f"{path} is a connector of its own (sha256 {content[:12]}...), and opening the model "
            f"would run this code. If it is yours, or you have read it and trust it, set {TRUST}=1 "
            "in the environment and give the command again."
        )
    return with_file(name, str(path))


def _existing(name: str) -> Path:
    path = own_file(name)
    assert path is not None
    if not path.is_file():
        raise PumiceError(
            f"connector {name!r} is a Python file, and {path} does not exist (in {Path.cwd()}). "
            "Give the path of the file, or the name of a connector of the shelf."
        )
    return path


@cache
def _builder(path: Path, content: str) -> Builder:
    """What the file calls `build`. It is run once, and again when its `content` is another."""
    module_name = f"pumice_own_connector_{content[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses and pickle look for what a class was defined in.
    sys.modules[module_name] = module
    # Its own errors are shown as they are: with the line of the user's file.
    spec.loader.exec_module(module)
    builder: Builder | None = getattr(module, BUILDER, None)
    if builder is None:
        raise PumiceError(
            f"{path} defines no function {BUILDER}(name, sizes, options) that gives a Connector. "
            "See docs/adding.md."
        )
    return builder
