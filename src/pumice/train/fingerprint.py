"""What a stage depends on, named by content: moving data, output or package changes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.core.files import read_json, sha256_bytes, sha256_ends, sha256_file
from pumice.core.shipped import SHIPPED_DIR

if TYPE_CHECKING:
    from pumice.train.stages import DataSpec, StageSpec

# They decide how often a stage is saved, how fast it reads, when it gives up and what it keeps in
# memory, not what it computes.
FREE = ("workers", "save_every", "watchdog_minutes", "spike", "checkpointing")
# A stage that does not use these is named as it was before there was such a choice.
_LATER = {
    "packing": None,
    "micro_batch_size": None,
    "group_by_modality": False,
    "compile": False,
    "validation": None,
}
# Small files of a backbone that decide what is computed, where a folder has them.
_READ_WHOLE = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
# Training changes every tensor, so the ends of a file tell two trainings apart; 13 GB are not read.
_WEIGHTS = {".safetensors", ".bin"}


def spec_fingerprint(spec: StageSpec) -> str:
    """A hash of everything that decides what a stage computes, wherever its files lie.

    Of the images nothing is taken: their names are in the data files, their pixels are too many.
    """
    from pumice.models.connectors import named_by_content

    content: dict[str, Any] = asdict(spec)
    for key in FREE:
        content.pop(key)
    for key, unused in _LATER.items():
        if content[key] == unused:
            content.pop(key)
    content["data"] = [_data_content(entry) for entry in spec.data]
    content["vision"] = [folder_content(folder) for folder in spec.vision]
    content["language"] = folder_content(spec.language)
    content["connector"] = named_by_content(spec.connector)
    # A stage without it is named as it was before there was such a thing.
    if (source := content.pop("connector_from")) is not None:
        content["connector_from"] = _connector_content(source)
    content["init"] = None if spec.init is None else _checkpoint_content(spec.init)
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())


def spec_record(spec: StageSpec, out: Path) -> dict[str, Any]:
    """The spec as plain values for training.json. No path in it is absolute."""
    from pumice.models.connectors import own_file, with_file

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return told(value, out)
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value

    record: dict[str, Any] = plain(asdict(spec))
    if (file := own_file(spec.connector)) is not None:
        record["connector"] = with_file(spec.connector, told(file, out))
    return record


def told(path: Path, out: Path) -> str:
    """A path for people: relative to the output or the package, else as given; never absolute."""
    for base in (out, SHIPPED_DIR):
        if path.resolve().is_relative_to(base.resolve()):
            return path.resolve().relative_to(base.resolve()).as_posix()
    if not path.is_absolute():
        return path.as_posix()
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    # A checkpoint may be given away, and a home directory tells a name.
    return "/".join(("...", *path.parts[1:][-2:]))


def _data_content(entry: DataSpec) -> dict[str, Any]:
    content = {"sha256": entry.open().fingerprint(), "weight": entry.weight, "cap": entry.cap}
    # Data without it is named as it was before there was such a thing.
    return content if entry.question is None else content | {"question": entry.question}


def folder_content(folder: Path) -> dict[str, str]:
    """Hashes of what decides how a backbone's folder computes, by file name."""
    found = {name: sha256_file(folder / name) for name in _READ_WHOLE if (folder / name).is_file()}
    weights = (path for path in sorted(folder.glob("*")) if path.suffix in _WEIGHTS)
    return found | {path.name: sha256_ends(path) for path in weights}


def _connector_content(source: Path) -> dict[str, str]:
    if source.is_file():
        return {"weights": sha256_file(source)}
    return _checkpoint_content(source)


def _checkpoint_content(folder: Path) -> dict[str, str]:
    """A checkpoint a stage wrote is named by that stage's fingerprint, others by their files."""
    record = folder / "training.json"
    made = read_json(record).get("fingerprint") if record.is_file() else None
    if made is None:
        return folder_content(folder)
    return {"fingerprint": made, "config.json": sha256_file(folder / "config.json")}
