"""Opening Hugging Face folders strictly; the one place that knows transformers' loading habits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, initialization
from transformers.utils import logging as hf_logging

from pumice.core.errors import PumiceError, some_of
from pumice.core.files import entries_of

# Not architecture: where a backbone came from (the first even names a machine), labels of classes.
_NOT_ARCHITECTURE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "problem_type",
)


def default_attention() -> str:
    """`sdpa` with CUDA, else `eager`: measured on CPU, bf16 autocast trains 1.5x faster with it."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def config_to_dict(config: Any) -> dict[str, Any]:
    """A Hugging Face config as plain JSON types, without traces of the machine it was read on."""
    data = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in data.items() if k not in _NOT_ARCHITECTURE}


def config_from_dict(data: dict[str, Any], *, part: str) -> Any:
    """The Hugging Face config that `config_to_dict` wrote for the model's `part`."""
    data = dict(data)
    model_type = data.pop("model_type", None)
    try:
        return AutoConfig.for_model(model_type, **data)
    except ValueError as error:
        raise PumiceError(
            f"the {part} config cannot be used: model_type is {model_type!r}, and transformers "
            f"says: {error}. Any model_type of the installed transformers is allowed; correct the "
            f"config, or install the transformers release that knows this model."
        ) from error


def read_config(folder: Path | str, *, part: str) -> Any:
    """The config of a Hugging Face folder; anything else is an error that says what was found."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        state = f"it holds {entries_of(folder)}" if folder.is_dir() else "no such directory"
        raise PumiceError(
            f"the {part} needs a Hugging Face folder with a config.json; given {folder} ({state}). "
            f"Give the directory that holds config.json and the weights."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise PumiceError(
            f"{folder / 'config.json'} cannot be read as the config of a {part}: {error}. A config "
            f"with a model_type the installed transformers knows is needed."
        ) from error


def load_pretrained(
    auto: Any,
    folder: Path,
    config: Any,
    attention: str | None,
    *,
    part: str,
    spare: Callable[[Any], tuple[str, ...]] = lambda model: (),
) -> Any:
    """The float32 model of `folder`; weights that are missing or of a wrong shape are an error.

    Weights beyond those the config asks for are left out: text halves, blocks that are cut off.
    `spare` names the submodules of the model whose weights may be missing.
    """
    try:
        with quiet():
            model, info = auto.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention or default_attention(),
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError) as error:
        raise PumiceError(
            f"the {part} in {folder} cannot be loaded: {error}. A folder with config.json and "
            f"model.safetensors of the same model is needed."
        ) from error
    unneeded = tuple(f"{name}." for name in spare(model))
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unneeded))
    complaints = [f"missing: {some_of(missing)}"] if missing else []
    if info["mismatched_keys"]:
        shapes = [
            f"{key} is {tuple(was)}, expected {tuple(want)}"
            for key, was, want in sorted(info["mismatched_keys"], key=lambda entry: str(entry[0]))
        ]
        complaints.append(f"wrong shape: {some_of(shapes)}")
    if complaints:
        raise PumiceError(
            f"the weights in {folder} do not fit its config.json ({part}). "
            f"{'; '.join(complaints)}. Every tensor of the config is needed; "
            f"correct config.json or fetch the weights again."
        )
    return model


def without_init(skip: bool) -> AbstractContextManager[None]:
    """Leaves new weights unset when `skip`, for models whose weights are read right afterwards."""
    blank: AbstractContextManager[None] = (
        initialization.no_init_weights() if skip else nullcontext()
    )
    return blank


@contextmanager
def quiet() -> Iterator[None]:
    """transformers loads without its own bars and warnings while this lasts."""
    # transformers would draw a bar, and report the blocks left out on purpose as suspicious.
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
