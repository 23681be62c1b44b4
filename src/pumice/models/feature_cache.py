"""Image features of a frozen vision backbone, kept on disk so that no picture is encoded twice.

An entry is named by what decides its content: the weights and settings of the backbone, and the
pixels it reads, which are the image after its preprocessing. Nothing is ever out of date.

Shapes: N images or tiles, S side of the pixel square, P features of one, Dv vision width.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.files import sha256_bytes, write_atomic, write_json
from pumice.core.log import get_logger

log = get_logger(__name__)

# On CUDA a kernel is chosen by the shape of its batch, and with it the last bits of the result; in
# batches of one size an entry does not depend on how many pictures it was first met with. On CPU
# the bits of a picture's features were the same in every batch (float32 and bfloat16 autocast).
_CUDA_BATCH = 8


class FeatureCache:
    """Feature files in a directory; several processes and runs may share it.

    With `max_bytes` nothing more is written once the files take up that much. Old files stay:
    training goes through its pictures in turns, and a cache that always drops the oldest would
    drop each one shortly before its use.
    """

    def __init__(self, directory: Path | str, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise PumiceError(
                f"a feature cache of {max_bytes} bytes can hold nothing; give a positive number, "
                f"or none for no limit."
            )
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PumiceError(
                f"the feature cache directory {self.directory} cannot be made ({error.strerror}); "
                f"give a directory that can be written to."
            ) from error
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        # Without a limit nobody needs the number, and half a million files take seconds to count.
        self._bytes = 0 if max_bytes is None else self._count_bytes()
        self._full = False
        self._described: set[str] = set()

    def get(self, group: str, key: str) -> torch.Tensor | None:
        """The features stored under `key`, float[P, Dv] on the CPU; None without a sound file."""
        path = self._path(group, key)
        try:
            with safe_open(path, framework="pt") as file:
                features: torch.Tensor = file.get_tensor("features")
                checksum = (file.metadata() or {}).get("crc32")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read and is made again: %s", path, error)
            return None
        if checksum != _checksum(features):
            log.warning("%s is damaged and is made again", path)
            return None
        return features

    def put(self, group: str, key: str, features: torch.Tensor) -> None:
        """Store float[P, Dv] under `key`, unless the cache is full."""
        features = features.detach().to("cpu").contiguous()
        data = save({"features": features}, metadata={"crc32": _checksum(features)})
        if self.max_bytes is not None and self._bytes + len(data) > self.max_bytes:
            self._stop_writing(f"its limit of {self.max_bytes} bytes is reached")
        if self._full:
            return
        try:
            # Without waiting for the disk: after a power cut the checksum tells what was lost.
            write_atomic(self._path(group, key), data, sync=False)
        except OSError as error:
            self._stop_writing(str(error))
        self._bytes += len(data)

    def describe(self, setting: dict[str, Any]) -> str:
        """The name of the group of `setting`; the setting is written there for people to read."""
        group = sha256_bytes(json.dumps(setting, sort_keys=True).encode())[:16]
        if group not in self._described:
            self._described.add(group)
            about = self.directory / group / "about.json"
            if not about.is_file():
                write_json(about, setting)
        return group

    def _stop_writing(self, reason: str) -> None:
        if not self._full:
            log.warning(
                "the feature cache %s is not written to any more (%s); further images are encoded "
                "each time",
                self.directory,
                reason,
            )
        self._full = True

    def _path(self, group: str, key: str) -> Path:
        return self.directory / group / key[:2] / f"{key[2:]}.safetensors"

    def _count_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.directory.glob("*/*/*.safetensors"))


def encode_cached(
    encode: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    cache: FeatureCache,
    setting: dict[str, Any],
) -> torch.Tensor:
    """float[N, 3, S, S] -> float[N, P, Dv]: from the cache, or by `encode`, which then fills it.

    `setting` is everything but the pixels that decides what `encode` gives.
    """
    if not len(pixel_values):
        return encode(pixel_values)
    device = pixel_values.device
    group = cache.describe(setting | _precision(pixel_values))
    keys = [pixel_digest(view) for view in pixel_values.cpu()]
    found = {key: cache.get(group, key) for key in dict.fromkeys(keys)}
    missing = [key for key, features in found.items() if features is None]
    cache.hits += len(found) - len(missing)
    cache.misses += len(missing)
    if missing:
        views = pixel_values[[keys.index(key) for key in missing]]
        cpu = device.type == "cpu"
        fresh = encode(views) if cpu else in_equal_batches(encode, views, _CUDA_BATCH)
        for key, features in zip(missing, fresh, strict=True):
            cache.put(group, key, features)
            found[key] = features
    return torch.stack(
        [features.to(device) for key in keys if (features := found[key]) is not None]
    )


def pixel_digest(view: torch.Tensor) -> str:
    """float[3, S, S] on the CPU -> a name for exactly these pixels."""
    return hashlib.sha256(_raw(view)).hexdigest()


@torch.no_grad()
def weights_digest(module: nn.Module) -> str:
    """A name for exactly these weights, their names and their types."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor.cpu()))
    return digest.hexdigest()


def in_equal_batches(
    encode: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, size: int
) -> torch.Tensor:
    """float[N, 3, S, S] -> float[N, P, Dv], encoded `size` at a time; the last batch is filled."""
    count = len(pixel_values)
    filling = pixel_values[-1:].expand(-count % size, -1, -1, -1)
    batches = torch.split(torch.cat([pixel_values, filling]), size)
    return torch.cat([encode(batch) for batch in batches])[:count]


def _precision(pixel_values: torch.Tensor) -> dict[str, str | None]:
    """The device and number types of this call: with others the last bits differ."""
    device = pixel_values.device.type
    mixed = torch.is_autocast_enabled(device)
    return {
        "device": device,
        "pixels": str(pixel_values.dtype),
        "autocast": str(torch.get_autocast_dtype(device)) if mixed else None,
    }


def _checksum(features: torch.Tensor) -> str:
    return f"{zlib.crc32(_raw(features)):08x}"


def _raw(tensor: torch.Tensor) -> memoryview:
    # As bytes, since numpy has no bfloat16.
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
