"""Checkpoints that hold an adapter (LoRA) and name the model it changes, opened as one model.

Such a directory has the whole connector and vision backbone, the adapter as peft writes it, and not
the language model; that is read from the base, and the adapter is merged into each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.core.shipped import shipped
from pumice.models.checkpoint import FORMAT, load_lmm, read_lmm_config
from pumice.models.lmm import LMM
from pumice.models.lora import CONFIG, WEIGHTS, MergedTensors, read_adapter, weights_sample
from pumice.models.quantize import Method
from pumice.models.tensor_files import JoinedTensors, RenamedTensors, TensorFiles

_LANGUAGE = "language.model."
_HEAD = "lm_head.weight"


def load_checkpoint(
    directory: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    quantize: Method | None = None,
) -> LMM:
    """The model of a pumice checkpoint, whole or an adapter with its base; see `load_lmm`."""
    directory = Path(directory)
    tensors = checkpoint_tensors(directory) if (directory / CONFIG).is_file() else None
    return load_lmm(directory, dtype=dtype, device=device, quantize=quantize, tensors=tensors)


def checkpoint_tensors(
    directory: Path, base: Path | None = None, *, merge: bool = True
) -> Mapping[str, torch.Tensor]:
    """Every tensor of a pumice checkpoint by its name there, read when asked for.

    With an adapter in the directory, the language model's come from its base (`base` when the place
    the file names no longer holds), merged in float32 (as they are without `merge`).
    """
    own = TensorFiles.of_folder(directory)
    if not (directory / CONFIG).is_file():
        return own
    adapter = read_adapter(directory)
    found = language_tensors(base or _base_directory(directory, adapter.base))
    adapter.check_base(found)
    _check_sample(directory, weights_sample(found, adapter.pairs))
    changed = MergedTensors(found, adapter) if merge else found
    tied = read_lmm_config(directory).language.get("tie_word_embeddings")
    # A Hugging Face folder may store a tied output head a second time.
    names = {_LANGUAGE + name: name for name in found if not (tied and name == _HEAD)}
    return JoinedTensors(own, RenamedTensors(changed, names))


def language_tensors(directory: Path) -> Mapping[str, torch.Tensor]:
    """The language model's tensors of a checkpoint or a Hugging Face folder, by their names there.

    Names are the Hugging Face model's: `model.layers.0.self_attn.q_proj.weight`.
    """
    if not is_checkpoint(directory):
        return TensorFiles.of_folder(directory)
    tensors = checkpoint_tensors(directory)
    names = [name for name in tensors if name.startswith(_LANGUAGE)]
    return RenamedTensors(tensors, {name.removeprefix(_LANGUAGE): name for name in names})


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a pumice checkpoint, with or without an adapter."""
    path = directory / "config.json"
    config = read_json(path) if path.is_file() else None
    return isinstance(config, dict) and config.get("format") == FORMAT


def _base_directory(directory: Path, name: str | None) -> Path:
    """The base as the adapter names it: a shipped name, or a place as seen from the checkpoint."""
    found = shipped(name) if name else None
    if found is None and name:
        found = directory / name
    if found is None or not found.is_dir():
        raise PumiceError(
            f"{directory} holds an adapter, and the model it changes is not there: {CONFIG} names "
            f"{name!r}, looked for at {found}. Put the base back, or write its place into "
            f"base_model_name_or_path of {directory / CONFIG}."
        )
    return found


def _check_sample(directory: Path, sample: str) -> None:
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        wanted = (file.metadata() or {}).get("base_sample")
    if wanted is not None and wanted != sample:
        raise PumiceError(
            f"the base model of {directory} is not the one its adapter was trained on (its weights "
            f"give {sample}, the adapter expects {wanted}). Give the same weights, in the "
            f"precision they had."
        )
