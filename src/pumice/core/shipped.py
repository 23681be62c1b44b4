"""The models and backbones that come with the package, and names turned into directories."""

from __future__ import annotations

from pathlib import Path

from pumice.core.errors import PumiceError
from pumice.core.hub import hub_folder, is_hub_name
from pumice.core.log import get_logger
from pumice.core.registry import suggest

log = get_logger(__name__)

SHIPPED_DIR = Path(__file__).resolve().parent.parent / "shipped"
MODELS = ("pocket",)
BACKBONES = ("pocket-vision", "pocket-language")


def shipped(name: str) -> Path | None:
    """The directory of a shipped model or backbone; None when nothing of that name is here."""
    if name not in MODELS + BACKBONES:
        return None
    path = SHIPPED_DIR / name
    return path if path.is_dir() else None


def resolve_model(name_or_dir: Path | str) -> Path:
    """The directory of a model, given as a directory or by a shipped name."""
    return _resolve("model", name_or_dir, MODELS)


def resolve_backbone(name_or_dir: Path | str) -> Path:
    """The Hugging Face folder of a backbone: a directory, a shipped name, or OWNER/NAME of the Hub.

    A name of the Hub is fetched when the local cache does not hold it.
    """
    name = str(name_or_dir)
    if is_hub_name(name) and not Path(name_or_dir).expanduser().exists():
        return hub_folder(name)
    return _resolve("backbone", name_or_dir, BACKBONES)


def _resolve(kind: str, name_or_dir: Path | str, names: tuple[str, ...]) -> Path:
    name = str(name_or_dir)
    directory = Path(name_or_dir).expanduser()
    if directory.is_dir():
        if name in names:
            log.info("the directory %s is taken, not the shipped %s of that name", directory, kind)
        return directory
    found = shipped(name) if name in names else None
    if found is not None:
        return found
    if name in names:
        raise PumiceError(
            f"the shipped {kind} {name!r} is missing from this installation (looked in "
            f"{SHIPPED_DIR}). Install pumice again, or give a directory instead."
        )
    what = "is a file, not a directory" if directory.is_file() else "is unknown"
    raise PumiceError(
        f"{kind} {name!r} {what}; allowed: a directory that exists, or a shipped name "
        f"({', '.join(names)}).{suggest(name, names)}"
    )
