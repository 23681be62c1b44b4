"""Writes tensors one by one into safetensors files of limited size, and their index.

Only one tensor is in memory at a time: the header's place is kept free and filled in at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from pumice.core.files import write_json
from pumice.models.tensor_files import INDEX, WEIGHTS

SHARD_BYTES = 5_000_000_000

_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Of one tensor in the header beside its name: type, shape and offsets with room to spare.
_ENTRY = 160
_FRONT = 64


def write_shards(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes model.safetensors, or model-00001-of-0000N.safetensors with an index; their bytes.

    `dtype` stores numbers with a point in another type than they have.
    """
    room = 8 + sum(len(json.dumps(name)) + _ENTRY for name in tensors) + _FRONT
    room += -room % _FRONT  # so that the tensors behind it begin at a round address
    shards: list[_Shard] = []
    try:
        for name in tensors:
            tensor = tensors[name].detach()
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            size = tensor.numel() * tensor.element_size()
            if not shards or (shards[-1].size and shards[-1].size + size > shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(directory / f".shard-{len(shards)}.part", room))
            shards[-1].add(name, tensor)
    finally:
        for shard in shards:
            shard.close()
    return _name(directory, shards)


class _Shard:
    def __init__(self, path: Path, room: int) -> None:
        self.path, self.size, self.names = path, 0, list[str]()
        self._room = room
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._file: BinaryIO | None = path.open("wb")
        self._file.seek(room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends one tensor."""
        assert self._file is not None
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + data.nbytes],
        }
        self._file.write(cast(Any, data))
        self.size += data.nbytes
        self.names.append(name)

    def close(self) -> None:
        """Writes the header into the place kept for it; closing twice is fine."""
        if self._file is None:
            return
        header = json.dumps(self._header, separators=(",", ":")).encode()
        length = self._room - 8
        assert len(header) <= length  # `write_shards` made room for every tensor's entry
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + header.ljust(length))
        self._file.close()
        self._file = None


def _name(directory: Path, shards: list[_Shard]) -> int:
    total = sum(shard.size for shard in shards)
    if len(shards) == 1:
        shards[0].path.rename(directory / WEIGHTS)
        return total
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(directory / name)
        weight_map |= dict.fromkeys(shard.names, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, index)
    return total
