"""The self-describing checkpoint directory: config.json, model.safetensors, training.json.

The processor adds its own files. The directory's name means nothing; loading is strict.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pumice.core.errors import PumiceError
from pumice.core.files import read_json, write_json
from pumice.models.config import LMMConfig
from pumice.models.lmm import LMM

FORMAT = "pumice"
VERSION = 1
WEIGHTS = "model.safetensors"


def save_checkpoint(
    directory: Path | str,
    lmm: LMM,
    processor_save: Callable[[Path], None] | None,
    training: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a checkpoint in full or not at all; an older one at the same place is replaced.

    `processor_save` writes the processor's files; `training` says how the weights were made;
    `dtype` stores the weights in another type than they have.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        config = {"format": FORMAT, "version": VERSION, **lmm.config.to_dict()}
        write_json(fresh / "config.json", config)
        state = lmm.state_dict()
        tensors = {
            name: state[name].detach().to("cpu", dtype).contiguous() for name in _stored_names(lmm)
        }
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        write_json(fresh / "training.json", training)
        if processor_save is not None:
            processor_save(fresh)
        if directory.exists():
            directory.rename(old)
        fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def load_lmm(
    directory: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    attention: str | None = None,
) -> LMM:
    """The model of a checkpoint directory, in evaluation mode; float32 unless `dtype` is given."""
    directory = Path(directory)
    lmm = LMM.from_config(read_lmm_config(directory), attention=attention, init=False)
    if dtype is not None:
        lmm.to(dtype)
    path = directory / WEIGHTS
    if not path.is_file():
        raise PumiceError(
            f"{directory} has no {WEIGHTS}; a checkpoint holds config.json and {WEIGHTS}. Copy the "
            f"directory again in full."
        )
    state = lmm.state_dict()
    names = _stored_names(lmm)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            _check_fit(path, shapes, {name: tuple(state[name].shape) for name in names})
            with torch.no_grad():
                for name in names:
                    state[name].copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise PumiceError(
            f"{path} cannot be read: {error}. A whole safetensors file is needed; copy it again."
        ) from error
    return lmm.to(device).eval() if device is not None else lmm.eval()


def read_lmm_config(directory: Path | str) -> LMMConfig:
    """The architecture in a checkpoint's config.json; other directories are an error."""
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        state = "it has no config.json" if directory.is_dir() else "there is no such directory"
        raise PumiceError(
            f"{directory} is not a pumice checkpoint: {state}. Give a directory that `pumice run` "
            f"wrote, or a shipped name."
        )
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        kind = data.get("model_type") if isinstance(data, dict) else None
        found = f"a Hugging Face config of model_type {kind!r}" if kind else "another config.json"
        raise PumiceError(
            f"{directory} is not a pumice checkpoint: it holds {found}. A config.json with "
            f'"format": "{FORMAT}" is needed; give a directory that `pumice run` wrote.'
        )
    if data.get("version") != VERSION:
        raise PumiceError(
            f"{path} has version {data.get('version')!r}; this pumice reads version {VERSION}. "
            f"Install the pumice release that wrote the checkpoint."
        )
    return LMMConfig.from_dict({k: v for k, v in data.items() if k not in ("format", "version")})


def _stored_names(lmm: LMM) -> list[str]:
    # A tied LM head is a second name of the embedding; safetensors stores each tensor once.
    aliases = {name for name, _ in lmm.named_parameters(remove_duplicate=False)}
    aliases -= {name for name, _ in lmm.named_parameters()}
    return [name for name in lmm.state_dict() if name not in aliases]


def _check_fit(
    path: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    misshapen = [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    complaints = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "wrong shape": misshapen,
    }
    told = [f"{what}: {_some(names)}" for what, names in complaints.items() if names]
    if told:
        raise PumiceError(
            f"{path} does not fit its config.json. {'; '.join(told)}. The file must hold exactly "
            f"the tensors of the config; take config.json and {WEIGHTS} of the same checkpoint."
        )


def _some(names: list[str], limit: int = 8) -> str:
    more = f" (+{len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
