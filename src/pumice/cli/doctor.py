"""`pumice doctor`: what is installed, what it will run on, and what is missing for what."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import typer

import pumice
from pumice.cli.options import JsonOption, example
from pumice.cli.output import say, say_json, table
from pumice.core.shipped import BACKBONES, MODELS, shipped

_MODEL = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "threadpoolctl")
_RECIPE = ("pydantic", "pyyaml")
_CLI = ("typer", "rich")
_SERVE = ("fastapi", "uvicorn", "prometheus-client")

# command -> packages it imports, shipped things its first example needs
_NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "run": ((*_MODEL, *_RECIPE), BACKBONES),
    "recipes": (_RECIPE, ()),
    "launch slurm": (_RECIPE, ()),
    "plan": ((*_MODEL, *_RECIPE), ()),
    "study": ((*_MODEL, *_RECIPE), BACKBONES),
    "ask": (_MODEL, MODELS),
    "chat": (_MODEL, MODELS),
    "generate": (_MODEL, MODELS),
    "eval": (_MODEL, MODELS),
    "serve": ((*_MODEL, *_SERVE), MODELS),
    "page": (("fastapi", "uvicorn", "pillow"), ()),
    "score": (("numpy", "pillow"), ()),
    "submit": (("numpy", "pillow"), ()),
    "data convert": (("pyyaml", "pydantic"), ()),
    "data mix": (("numpy", *_RECIPE), ()),
    "data verify": ((*_MODEL, *_RECIPE), ()),
    "data generate": ((), ()),
    "data show": ((*_MODEL, *_RECIPE), MODELS),
    "convert": (_MODEL, ()),
    "tiles": (("torch", "numpy", "pillow"), ()),
    "world make": (("numpy", "pillow"), ()),
    "world teacher": ((), ()),
    "world backbones": (_MODEL, ()),
}


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("doctor", epilog=example("pumice doctor", "pumice doctor --json"))(doctor)


def doctor(as_json: JsonOption = False) -> None:
    """Show what is installed and what is missing.

    Versions, device, dtype, threads, shipped models, and what each command lacks. Exits with 1
    when something is missing.
    """
    found = examine()
    if as_json:
        say_json(found)
    else:
        say(_text(found))
    if not all(command["ready"] for command in found["commands"].values()):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain values."""
    versions = {name: _version(name) for name in (*_MODEL, *_RECIPE, *_CLI, *_SERVE)}
    here = {name: str(path) if (path := shipped(name)) else None for name in MODELS + BACKBONES}
    machine, problem = _machine()
    commands = {}
    for command, (packages, things) in _NEEDS.items():
        missing = [f"package {name}" for name in packages if versions[name] is None]
        missing += [f"shipped {name}" for name in things if here[name] is None]
        if problem and "torch" in packages and versions["torch"] is not None:
            missing.append(problem)
        commands[command] = {"ready": not missing, "missing": missing}
    return {
        "pumice": pumice.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        **machine,
        "shipped": here,
        "commands": commands,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> tuple[dict[str, Any], str | None]:
    """Device, dtype and threads a model would get, and why they are unknown if they are."""
    cores = os.cpu_count()
    try:
        import torch
    except (ImportError, OSError) as error:
        unknown = {"device": None, "dtype": None, "threads": None, "cores": cores}
        return unknown, f"a torch that can be imported ({error})"
    from pumice.infer.placement import default_placement

    device, dtype = default_placement()
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "device": f"{device}{name}",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": cores,
    }, None


def _text(found: dict[str, Any]) -> str:
    versions = [(name, version or "missing") for name, version in found["versions"].items()]
    ready = [
        (name, "ready" if state["ready"] else "missing: " + ", ".join(state["missing"]))
        for name, state in found["commands"].items()
    ]
    shown = [(name, path or "missing") for name, path in found["shipped"].items()]
    facts = [(key, str(found[key])) for key in ("pumice", "python", "system")]
    facts += [(key, str(found[key])) for key in ("device", "dtype", "threads", "cores")]
    blocks = [("", facts), ("Packages", versions), ("Shipped", shown), ("Commands", ready)]
    return "\n\n".join(
        (f"{title}\n" if title else "") + table(("  " + row[0], *row[1:]) for row in rows)
        for title, rows in blocks
    )
