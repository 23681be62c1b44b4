"""Model folders by their names on the Hugging Face Hub: from the local cache, else downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.core.log import get_logger

log = get_logger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")
# The last one holds LLaVA's connector alone, a few megabytes.
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "mm_projector.bin")
_CONFIGS = ("config.json", "preprocessor_config.json")


def is_hub_name(text: str) -> bool:
    """Whether it looks like OWNER/NAME; a relative path of two parts does too."""
    return _NAME.fullmatch(text) is not None


def hub_folder(name: str) -> Path:
    """The folder of the repository OWNER/NAME, with its configuration, tokenizer and weights.

    What the local cache holds is used as it is; otherwise it is downloaded into that cache. Raises
    PumiceError where neither is possible (offline, no such repository, no leave to read it).
    """
    from huggingface_hub import snapshot_download

    cached = _cached(name)
    if cached is not None and _has_weights(cached):
        return cached
    log.info("%s is fetched from the Hugging Face Hub into the local cache", name)
    try:
        return Path(snapshot_download(name, allow_patterns=_wanted(name)))
    except (_network_error(), OSError) as error:
        raise PumiceError(
            f"{name!r} is no directory here, is not in the local cache of the Hugging Face Hub and "
            f"cannot be fetched: {_reason(error)}. Download it where there is a network (hf "
            f"download {name} --local-dir DIR), and give DIR in its place."
        ) from error


def hub_configs(name: str, *, fetch: bool) -> Path | None:
    """A folder with the configuration of OWNER/NAME, perhaps without its weights.

    From the local cache; else fetched if `fetch`, and None otherwise. Raises PumiceError where the
    Hub does not give it.
    """
    from huggingface_hub import snapshot_download

    cached = _cached(name)
    if cached is not None and (cached / _CONFIGS[0]).is_file():
        return cached
    if not fetch:
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_CONFIGS)))
    except (_network_error(), OSError) as error:
        raise PumiceError(
            f"the configuration of {name!r} is not in the local cache of the Hugging Face Hub and "
            f"cannot be fetched: {_reason(error)}. Give a directory that holds its config.json in "
            f"its place."
        ) from error


def _cached(name: str) -> Path | None:
    """What the local cache holds of a repository, which may be a part of it."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        return None


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _network_error() -> type[Exception]:
    # The base class of the HTTP library the client builds on, which has changed between releases.
    from huggingface_hub import errors

    found: type[Exception] = getattr(errors, "HTTPError", OSError)
    return found


def _wanted(name: str) -> list[str]:
    """One kind of weights alone: repositories often hold the same ones several times."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(name)
    safe = any(file.endswith(".safetensors") and "/" not in file for file in files)
    return [*_SMALL, "*.safetensors" if safe else "pytorch_model*.bin"]


def _has_weights(folder: Path) -> bool:
    """Whether the configuration is there, and every file of weights (a download may have ended)."""
    shards: set[str] = set()
    for index in folder.glob("*.index.json"):
        shards |= set(read_json(index).get("weight_map", {}).values())
    if not all((folder / shard).is_file() for shard in shards):
        return False
    weights = any(any(folder.glob(kind)) for kind in ("*.safetensors", "*.bin"))
    return weights and (folder / "config.json").is_file()
