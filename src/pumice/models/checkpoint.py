"""The self-describing checkpoint directory: config.json, model.safetensors, training.json.

The processor adds its own files. The directory's name means nothing; loading is strict.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from pumice.core.errors import PumiceError, some_of
from pumice.core.files import read_json, write_json
from pumice.models.config import LMMConfig
from pumice.models.connectors import keep_own, kept_own
from pumice.models.lmm import LMM
from pumice.models.lora import has_lora
from pumice.models.quantize import (
    Method,
    QuantizedLinear,
    full_shapes,
    quantize_language,
    quantized_as,
)
from pumice.models.tensor_files import WEIGHTS, TensorFiles, shape_of

FORMAT = "pumice"
VERSION = 1


def save_checkpoint(
    directory: Path | str,
    lmm: LMM,
    processor_save: Callable[[Path], None] | None,
    training: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    without: str | None = None,
) -> None:
    """Writes a checkpoint in full or not at all; an older one at the same place is replaced.

    `processor_save` writes the processor's files; `training` says how the weights were made;
    `dtype` stores the weights in another type than they have; tensors whose names begin with
    `without` are left out (an adapter that `processor_save` writes beside them names their place).
    """
    _check_whole(lmm, without)
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        write_lmm_config(fresh, lmm.config)
        state = lmm.state_dict()
        tensors = {
            name: state[name].detach().to("cpu", dtype).contiguous()
            for name in _stored_names(lmm)
            if without is None or not name.startswith(without)
        }
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        # safetensors leaves its file to its owner alone; a checkpoint is for the whole team.
        (fresh / WEIGHTS).chmod((fresh / "config.json").stat().st_mode)
        write_json(fresh / "training.json", training)
        if processor_save is not None:
            processor_save(fresh)
        if directory.exists():
            directory.rename(old)
        fresh.rename(directory)
    except (OSError, SafetensorError) as error:
        raise PumiceError(
            f"the checkpoint {directory} could not be written ({error}). What was there before is "
            f"untouched. Check the free space and the permissions, and give the same command again."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def load_lmm(
    directory: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    attention: str | None = None,
    quantize: Method | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> LMM:
    """The model of a checkpoint directory, in evaluation mode; float32 unless `dtype` is given.

    `quantize` stores the language model's linear layers in 8 or 4 bits, each as it is read.
    `tensors` are taken in place of the directory's own, under the same names. The weights are
    copies: training on does not depend on the file.
    """
    directory = Path(directory)
    config = read_lmm_config(directory)
    if tensors is None:
        tensors = TensorFiles.of_folder(directory)
    return build_lmm(
        config,
        tensors,
        directory,
        dtype=dtype or torch.float32,
        device=device,
        attention=attention,
        quantize=quantize,
        copy=True,
    )


def build_lmm(
    config: LMMConfig,
    tensors: Mapping[str, torch.Tensor],
    source: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    attention: str | None = None,
    quantize: Method | None = None,
    copy: bool = False,
) -> LMM:
    """The model of `config` with exactly these tensors, in evaluation mode; `source` names them.

    It is built without weights, and each tensor takes its place as it is read: there is never a
    second copy. Without `copy` those that have the right type and device stay what `tensors` gave,
    for files views of the mapped file. Raises PumiceError and leaves no half-filled model.
    """
    lmm = empty_lmm(config, attention=attention, quantize=quantize)
    wanted = full_shapes(lmm)
    known = {name: shape_of(tensors, name) for name in tensors}
    _check_fit(
        source, {n: s if s is not None else wanted.get(n, ()) for n, s in known.items()}, wanted
    )
    places = {id(p): found for p, found in parameter_places(lmm)}
    for name in tensors:
        tensor = tensors[name]
        if known[name] is None:
            _check_fit(source, {name: tuple(tensor.shape)}, {name: wanted[name]})
        _put(lmm, name, tensor.to(device, dtype, copy=copy), places)
    # What no file holds (positions, rotary tables) was computed when the model was built.
    return lmm.to(device).eval() if device is not None else lmm.eval()


def empty_lmm(
    config: LMMConfig, *, attention: str | None = None, quantize: Method | None = None
) -> LMM:
    """A model of `config` whose parameters take no memory and have yet to be put in their places.

    Quantised layers have their (unset) codes.
    """
    with weightless():
        lmm = LMM.from_config(config, attention=attention, init=False)
        if quantize is not None:
            quantize_language(lmm.language, quantize, fill=False)
    return lmm


def check_tensors(
    config: LMMConfig, tensors: Mapping[str, torch.Tensor], source: Path | str
) -> None:
    """Raises PumiceError unless these are, by name and shape, what a model of `config` holds."""
    wanted = model_shapes(config)
    known = {name: shape_of(tensors, name) for name in tensors}
    found = {n: s if s is not None else wanted.get(n, ()) for n, s in known.items()}
    _check_fit(source, found, wanted)


def model_shapes(config: LMMConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of every tensor that a model of `config` stores; nothing is computed."""
    with weightless():
        return full_shapes(LMM.from_config(config, init=False))


@contextmanager
def weightless() -> Iterator[None]:
    """New parameters take no memory; buffers are real, since files do not hold all of them."""
    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is empty already keeps its identity: it may be tied to another.
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def parameter_places(
    lmm: LMM,
) -> Iterator[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Each parameter and where it stands; one that is tied stands in several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in lmm.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, leaf))
    return ((parameter, places[id(parameter)]) for parameter in lmm.parameters())


def _put(
    lmm: LMM, name: str, tensor: torch.Tensor, places: dict[int, list[tuple[nn.Module, str]]]
) -> None:
    owner, _, leaf = name.rpartition(".")
    layer = lmm.get_submodule(owner)
    if isinstance(layer, QuantizedLinear) and leaf == "weight":
        layer.fill(tensor)
        return
    empty = getattr(layer, leaf)
    if not isinstance(empty, nn.Parameter):
        setattr(layer, leaf, tensor)
        return
    filled = nn.Parameter(tensor, requires_grad=empty.requires_grad)
    for module, place in places[id(empty)]:
        setattr(module, place, filled)


def write_lmm_config(directory: Path, config: LMMConfig) -> None:
    """Writes config.json, and beside it the code of a connector that is not of the shelf."""
    stored = replace(config, connector=keep_own(config.connector, directory))
    write_json(
        directory / "config.json", {"format": FORMAT, "version": VERSION, **stored.to_dict()}
    )


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
    config = LMMConfig.from_dict({k: v for k, v in data.items() if k not in ("format", "version")})
    return replace(config, connector=kept_own(config.connector, directory))


def _check_whole(lmm: LMM, without: str | None) -> None:
    method = quantized_as(lmm)
    if without is None and method is not None:
        raise PumiceError(
            f"the language model is quantised ({method}); a checkpoint holds full precision. Load "
            f"the model without quantisation to save it."
        )
    if without is None and has_lora(lmm):
        raise PumiceError(
            "the language model has adapters on; merge them (`merge_lora`), or save them as an "
            "adapter."
        )


def _stored_names(lmm: LMM) -> list[str]:
    # A tied LM head is a second name of the embedding; safetensors stores each tensor once.
    aliases = {name for name, _ in lmm.named_parameters(remove_duplicate=False)}
    aliases -= {name for name, _ in lmm.named_parameters()}
    return [name for name in lmm.state_dict() if name not in aliases]


def _check_fit(
    path: Path | str, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
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
    told = [f"{what}: {some_of(names)}" for what, names in complaints.items() if names]
    if told:
        raise PumiceError(
            f"{path} does not fit its config.json. {'; '.join(told)}. The file must hold exactly "
            f"the tensors of the config; take config.json and {WEIGHTS} of the same checkpoint."
        )
