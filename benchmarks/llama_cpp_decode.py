"""llama.cpp and pumice's decoder on one language model: a prompt of text read, then greedy tokens.

Used by `infer.py --llama-cpp`; needs the package llama-cpp-python. The model is exported by
`write_gguf`; both sides get the same ids, so neither tokenises, and no image is in the prompt.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from pumice.convert.gguf import write_gguf
from pumice.convert.gguf_file import GGUFType
from pumice.core.shipped import resolve_model
from pumice.infer.best_decoder import best_decoder
from pumice.infer.decoder import Chunk
from pumice.models.lmm import LMM
from pumice.processing.processor import Processor

PROMPT = 288
CONTEXT = 512


class LlamaCpp:
    """One exported model in llama.cpp; cache in float32, attention as it is without flash."""

    def __init__(self, lmm: LMM, kind: GGUFType, threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            processor = Processor.load(resolve_model("pocket"))
            files = write_gguf(lmm.config, lmm.state_dict(), processor, Path(folder), kind)
            settings = llama_cpp.llama_model_default_params()
            settings.use_mmap = False
            path = str(files.language).encode()
            self._model = llama_cpp.llama_model_load_from_file(path, settings)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = params.type_k = params.type_v = 0
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompt: list[int], new: int) -> list[int]:
        """Reads the prompt and says `new` tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        said: list[int] = []
        given = prompt
        for _ in range(new):
            ids = (ctypes.c_int32 * len(given))(*given)
            batch = llama_cpp.llama_batch_get_one(ids, len(given))
            assert llama_cpp.llama_decode(self._context, batch) == 0
            values = llama_cpp.llama_get_logits_ith(self._context, -1)
            token = int(np.ctypeslib.as_array(values, shape=(self._size,)).argmax())
            said.append(token)
            given = [token]
        return said


class Ours:
    """pumice's decoder on the same ids."""

    def __init__(self, lmm: LMM) -> None:
        self._lmm = lmm
        self._decoder = best_decoder(lmm)

    @torch.inference_mode()
    def generate(self, prompt: list[int], new: int) -> list[int]:
        """Reads the prompt and says `new` tokens."""
        with self._decoder.at_work():
            return self._said(prompt, new)

    def _said(self, prompt: list[int], new: int) -> list[int]:
        cache = self._decoder.cache(len(prompt))
        embeds = self._lmm.language.embed(torch.tensor(prompt))
        [logits] = self._decoder.read([Chunk(embeds, 0, cache, None, True)])
        said = [int(logits.argmax())]
        for number in range(1, new):
            length = len(prompt) + number - 1
            logits = self._decoder.step([said[-1]], [length], cache, None)[0]
            said.append(int(logits.argmax()))
        return said


def contestants(
    lmm: LMM, eight: LMM, new: int, threads: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """What is timed, by name, and how many tokens each says alike with pumice in float32."""
    draw = torch.Generator().manual_seed(5)
    prompt = torch.randint(300, 1300, (PROMPT,), generator=draw).tolist()
    sides: dict[str, LlamaCpp | Ours] = {
        "pumice": Ours(lmm),
        "pumice int8": Ours(eight),
        "llama.cpp f32": LlamaCpp(lmm, "f32", threads),
        "llama.cpp q8_0": LlamaCpp(lmm, "q8_0", threads),
    }
    said = {name: side.generate(prompt, new) for name, side in sides.items()}
    alike = {
        name: sum(a == b for a, b in zip(tokens, said["pumice"], strict=True))
        for name, tokens in said.items()
    }
    work: dict[str, Callable[[], Any]] = {}
    for name, side in sides.items():
        for count in (1, new):
            work[f"{name} {count}"] = lambda side=side, count=count: side.generate(prompt, count)
    return work, alike
