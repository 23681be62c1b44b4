"""One GGUF file, written tensor by tensor: never more than one tensor is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
TYPES: tuple[GGUFType, ...] = ("f32", "f16", "bf16", "q8_0", "q4_0")

# llama.cpp's general.file_type, LLAMA_FTYPE_* in llama.h.
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}


def gguf_package() -> Any:
    """The `gguf` package, or an error that says how to get it."""
    try:
        import gguf
        import gguf.quants  # noqa: F401
    except ImportError as error:
        raise PumiceError(
            "GGUF files need the package gguf, which is not installed. Install it with "
            "pip install 'pumice[gguf]'."
        ) from error
    return gguf


@dataclass(frozen=True)
class _Tensor:
    name: str
    read: Callable[[], torch.Tensor]
    stored: GGMLQuantizationType


class GGUFFile:
    """Collects metadata (through `meta`, the package's writer) and tensors, then writes both."""

    def __init__(self, path: Path, arch: str, kind: GGUFType) -> None:
        package = gguf_package()
        self.path = path
        self.kind = kind
        self._part = path.with_name(f".{path.name}.part")
        self.meta: GGUFWriter = package.GGUFWriter(self._part, arch)
        self.meta.add_file_type(_FILE_TYPES[kind])
        self.meta.add_quantization_version(package.GGML_QUANT_VERSION)
        self._package = package
        self._tensors: list[_Tensor] = []

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        read: Callable[[], torch.Tensor],
        kind: GGUFType | None = None,
    ) -> None:
        """One tensor, read when it is written; `kind` where it differs from the file's.

        Vectors are stored in full, and rows which are no multiple of a block (32) as f16.
        """
        stored = self._package.GGMLQuantizationType[self._stored(shape, kind or self.kind).upper()]
        if stored.name in ("F32", "F16"):
            kept: tuple[int, ...] = shape
            width = np.dtype(np.float32 if stored.name == "F32" else np.float16)
        else:
            kept = self._package.quant_shape_to_byte_shape(shape, stored)
            width = np.dtype(np.uint8)
        size = math.prod(kept) * width.itemsize
        self.meta.add_tensor_info(name, kept, width, size, raw_dtype=stored)
        self._tensors.append(_Tensor(name, read, stored))

    def write(self) -> None:
        """Writes the file in full or not at all."""
        try:
            self.meta.write_header_to_file()
            self.meta.write_kv_data_to_file()
            self.meta.write_ti_data_to_file()
            for tensor in self._tensors:
                self.meta.write_tensor_data(self._encoded(tensor))
            self.meta.close()
            self._part.replace(self.path)
        finally:
            self.meta.close()
            self._part.unlink(missing_ok=True)

    def _encoded(self, tensor: _Tensor) -> np.ndarray[Any, Any]:
        values = tensor.read().detach().cpu().float().contiguous().numpy()
        with np.errstate(over="ignore"):
            encoded: np.ndarray[Any, Any] = self._package.quants.quantize(values, tensor.stored)
        if tensor.stored.name == "F16" and not np.isfinite(encoded).all():
            raise PumiceError(
                f"{tensor.name} holds values up to {float(np.abs(values).max()):.3g}, and f16 ends "
                f"at 65504. Write bf16, f32 or q8_0 instead."
            )
        return encoded

    @staticmethod
    def _stored(shape: tuple[int, ...], kind: GGUFType) -> GGUFType:
        if len(shape) < 2:
            return "f32"
        return "f16" if kind in ("q8_0", "q4_0") and shape[-1] % 32 else kind
