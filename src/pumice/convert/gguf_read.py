"""The tensors of an exported pair of GGUF files under our names again, to prove the export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pumice.convert.gguf_file import gguf_package
from pumice.convert.gguf_names import LANGUAGES, check_complete, language_names, vision_names
from pumice.convert.rotary import to_halves
from pumice.core.errors import PumiceError
from pumice.models.config import LMMConfig
from pumice.models.pretrained import config_from_dict
from pumice.models.vision import num_blocks


class GGUFTensors(Mapping[str, torch.Tensor]):
    """Our name -> float32 tensor, dequantised when it is asked for; the files are memory-mapped."""

    def __init__(self, config: LMMConfig, language: Path | str, mmproj: Path | str) -> None:
        vision = config_from_dict(config.vision, part="vision backbone")
        self._package = gguf_package()
        self._config = config.language
        self._names = {
            **language_names(config.language),
            **vision_names(config.vision, num_blocks(vision, config.vision_layer)),
        }
        self._stored = {**self._entries(language), **self._entries(mmproj)}
        # Rotary factors are a table of llama.cpp's, made of the config.
        check_complete(self._names.values(), set(self._stored) - {"rope_freqs.weight"})

    def __getitem__(self, name: str) -> torch.Tensor:
        theirs = self._names[name]
        entry = self._stored[theirs]
        shape = tuple(int(size) for size in reversed(entry.shape))
        values = self._package.quants.dequantize(entry.data, entry.tensor_type).reshape(shape)
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        turned = self._heads(theirs)
        return to_halves(tensor, turned) if turned else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _heads(self, theirs: str) -> int | None:
        if not LANGUAGES[self._config["model_type"]].neighbours or theirs.startswith("v."):
            return None
        heads: int = self._config["num_attention_heads"]
        kv_heads: int = self._config.get("num_key_value_heads") or heads
        return {"attn_q": heads, "attn_k": kv_heads}.get(theirs.split(".")[-2])

    def _entries(self, path: Path | str) -> dict[str, Any]:
        try:
            reader = self._package.GGUFReader(path)
        except (OSError, ValueError) as error:
            raise PumiceError(
                f"{path} cannot be read as a GGUF file: {error}. Export the model again."
            ) from error
        return {entry.name: entry for entry in reader.tensors}
