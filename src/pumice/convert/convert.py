"""A model directory in any format that can be opened, written in any that can be written.

Every conversion ends with a proof (`parity.json` beside the result); without it nothing is left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from pumice.convert.gguf import write_gguf
from pumice.convert.gguf_file import TYPES, GGUFType
from pumice.convert.llama2c import convert_llama2c, is_llama2c
from pumice.convert.open import open_parts
from pumice.convert.opened import Opened
from pumice.convert.proof import Source, ask_source, check_proof, prove
from pumice.convert.pumice_format import write_pumice
from pumice.convert.shards import SHARD_BYTES
from pumice.convert.text_only import is_language_folder
from pumice.convert.write_hf import write_hf
from pumice.convert.write_llava import write_llava
from pumice.core.errors import PumiceError
from pumice.core.files import write_json
from pumice.core.log import get_logger
from pumice.core.memory import give_back_memory
from pumice.core.registry import suggest

log = get_logger(__name__)

Target = Literal["pumice", "hf", "llava", "gguf"]
TARGETS: tuple[Target, ...] = get_args(Target)
PARITY_FILE = "parity.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What llama.cpp calls the same types.
_GGUF = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

_Writer = Callable[[Opened, Path, torch.dtype | None, int], dict[str, Any]]
_WRITERS: Mapping[str, _Writer] = {"pumice": write_pumice, "hf": write_hf, "llava": write_llava}


def convert(
    src: Path | str,
    dst: Path | str,
    to: str,
    *,
    base: Path | str | None = None,
    vision: Path | str | None = None,
    template: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Converts the model in `src` and gives the report that also stands in DST/parity.json.

    `dtype` stores the weights in another type (for gguf also q8_0 and q4_0); without it they stay
    as they are. Raises PumiceError, and leaves no `dst`, when something cannot be expressed or the
    result does not answer as the source does.
    """
    src, dst = Path(src), Path(dst)
    _check(to, dtype, dst)
    if is_llama2c(src):
        return _convert_llama2c(src, dst, to)
    if is_language_folder(src):
        raise PumiceError(
            f"{src} is a language model alone, without a vision backbone and a connector; only "
            f"whole models are converted. Name it as the language model of a recipe, or give the "
            f"directory of a multimodal model."
        )
    dst.parent.mkdir(parents=True, exist_ok=True)
    fresh = dst.with_name(f".{dst.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        options = {"base": base, "vision": vision, "template": template}
        report, source = _write(src, options, fresh, to, dtype, shard_bytes)
        give_back_memory()  # closes the source's files before those of the result are opened
        report["parity"] = prove(source, fresh, to, _DTYPES.get(_plain_name(dtype)))
        if not _is_quantised(dtype):
            check_proof(report["parity"])
        write_json(fresh / PARITY_FILE, report)
        if dst.exists():
            dst.rmdir()
        fresh.rename(dst)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return report


def _check(to: str, dtype: str | None, dst: Path) -> None:
    if to not in TARGETS:
        raise PumiceError(
            f"--to {to!r} is unknown; allowed: {', '.join(TARGETS)}.{suggest(to, TARGETS)}"
        )
    known = (*_DTYPES, *TYPES) if to == "gguf" else tuple(_DTYPES)
    if dtype is not None and dtype not in known:
        raise PumiceError(
            f"dtype {dtype!r} cannot be written as {to}; allowed: {', '.join(known)}."
            f"{suggest(dtype, known)}"
        )
    if dst.is_file() or (dst.is_dir() and any(dst.iterdir())):
        raise PumiceError(
            f"{dst} exists and is not empty; nothing is overwritten. Give a new directory, or "
            f"remove this one first."
        )


def _convert_llama2c(src: Path, dst: Path, to: str) -> dict[str, Any]:
    if to != "hf":
        raise PumiceError(
            f"{src} is a llama2.c model, a language model alone; it can be written as hf only. "
            f"Use --to hf, and name the result as the language model of a recipe."
        )
    convert_llama2c(src, dst)
    return {"from": "llama2.c", "to": to, "parity": None}


def _write(
    src: Path, options: dict[str, Any], dst: Path, to: str, dtype: str | None, shard_bytes: int
) -> tuple[dict[str, Any], Source]:
    """Writes the result and asks the source the questions of the proof."""
    opened = open_parts(src, **options)
    log.info("%s is %s", src, opened.format)
    report: dict[str, Any] = {"from": opened.format, "to": to}
    if to == "gguf":
        report |= _write_gguf(opened, dst, dtype)
    else:
        report |= _WRITERS[to](opened, dst, _DTYPES[dtype] if dtype else None, shard_bytes)
    return report, ask_source(opened)


def _write_gguf(opened: Opened, dst: Path, dtype: str | None) -> dict[str, Any]:
    kind = cast(GGUFType, _GGUF.get(dtype or _name(opened.dtype), dtype))
    export = write_gguf(opened.config, opened.tensors, opened.processor, dst, kind)
    return {
        "files": [export.language.name, export.mmproj.name],
        "gguf_type": kind,
        "notes": list(export.notes),
    }


def _is_quantised(dtype: str | None) -> bool:
    return dtype in ("q8_0", "q4_0")


def _plain_name(dtype: str | None) -> str:
    """The name that torch has for a type of llama.cpp's."""
    return {theirs: ours for ours, theirs in _GGUF.items()}.get(dtype or "", dtype or "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
