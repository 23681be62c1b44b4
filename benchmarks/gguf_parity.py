"""Our answers beside llama.cpp's own, from the GGUF files `write_gguf` exports.

Needs the package llama-cpp-python (its low-level functions alone are used). The prompt goes through
the chat template and tokenizer inside the file, the image through llama.cpp's own preparation.

    python benchmarks/gguf_parity.py --model pocket --build "llama-cpp-python 0.3.36"
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jinja2
import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import PIL.Image
import PIL.ImageDraw

import pumice
from pumice.convert.gguf import GGUFExport, write_gguf
from pumice.convert.gguf_file import TYPES
from pumice.core.types import user
from pumice.infer.model import Model

QUESTIONS = (
    "How many circles are there?\nAnswer the question using a single word or phrase.",
    "Describe the image.",
)
NEW_TOKENS = 24
CONTEXT = 1024
RESULTS = Path(__file__).parent / "results" / "gguf_parity.json"


class Peer:
    """llama.cpp with one exported model; cache and attention in float32 on one thread."""

    def __init__(self, files: GGUFExport) -> None:
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(files.language).encode(), settings)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = CONTEXT, CONTEXT
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = params.type_k = params.type_v = 0
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        eyes = mtmd.mtmd_context_params_default()
        eyes.use_gpu = eyes.warmup = False
        eyes.n_threads, eyes.flash_attn_type = 1, 0
        self.eyes = mtmd.mtmd_init_from_file(str(files.mmproj).encode(), self.model, eyes)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        reader = gguf.GGUFReader(files.language)
        self.template = jinja2.Template(reader.fields["tokenizer.chat_template"].contents())

    def prompt(self, question: str, picture: PIL.Image.Image) -> tuple[list[int], Any]:
        """Ids with -1 at the image's places, and float[V] after the last of them."""
        marker = mtmd.mtmd_default_marker().decode()
        text = self.template.render(
            messages=[{"role": "user", "content": f"{marker}\n{question}"}],
            bos_token="",  # llama.cpp adds it
            eos_token="</s>",
            add_generation_prompt=True,
        ).encode()
        pixels = np.ascontiguousarray(np.asarray(picture))
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(*picture.size, data)
        given = mtmd.mtmd_input_text()
        given.text, given.add_special, given.parse_special = text, True, True
        if hasattr(given, "text_len"):
            given.text_len = len(text)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd.mtmd_tokenize(self.eyes, chunks, ctypes.byref(given), bitmaps, 1) == 0
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.at = llama_cpp.llama_pos(0)
        done = mtmd.mtmd_helper_eval_chunks(
            self.eyes, self.context, chunks, 0, 0, CONTEXT, True, ctypes.byref(self.at)
        )
        assert done == 0
        return self._ids(chunks), self._logits(-1)

    def answer(self, logits: Any) -> list[int]:
        """Greedy ids after `prompt`, without the end token."""
        said: list[int] = []
        while len(said) < NEW_TOKENS:
            token = int(logits.argmax())
            if llama_cpp.llama_vocab_is_eog(self.vocab, token):
                break
            said.append(token)
            batch = llama_cpp.llama_batch_get_one((ctypes.c_int32 * 1)(token), 1)
            assert llama_cpp.llama_decode(self.context, batch) == 0
            logits = self._logits(-1)
        return said

    def _ids(self, chunks: Any) -> list[int]:
        ids: list[int] = []
        for number in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, number)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += list(tokens[: count.value])
            else:
                ids += [-1] * mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        return ids

    def _logits(self, place: int) -> Any:
        size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        values = llama_cpp.llama_get_logits_ith(self.context, place)
        return np.ctypeslib.as_array(values, shape=(size,)).copy()


def pictures(side: int) -> list[tuple[str, PIL.Image.Image]]:
    """Six squares that need no resizing and four wide pictures that are padded and resized."""
    chance = random.Random(3)
    made = []
    for kind, size in [("square", (side, side))] * 6 + [("wide", (2 * side, side))] * 4:
        picture = PIL.Image.new("RGB", size, (230, 230, 230))
        draw = PIL.ImageDraw.Draw(picture)
        for _ in range(4):
            left, top = (chance.randrange(edge * 3 // 4) for edge in size)
            shape = draw.ellipse if chance.random() < 0.5 else draw.rectangle
            color = chance.choice(["red", "blue", "green", "yellow", "black"])
            shape([left, top, left + size[0] // 5, top + size[1] // 5], fill=color)
        made.append((kind, picture))
    return made


def compare(model: Model, peer: Peer) -> dict[str, Any]:
    """Prompt ids, logits after the prompt, and greedy answers, by kind of picture."""
    found: dict[str, list[tuple[bool, float, float, bool]]] = {}
    for kind, picture in pictures(model.processor.image_spec.size):
        for question in QUESTIONS:
            ids, logits = peer.prompt(question, picture)
            ours = model.processor.encode_prompt([user(question, picture)]).input_ids
            wanted = model.logits(question, images=[picture])[-1].float().numpy()
            text = model.ask(question, images=[picture], max_new_tokens=NEW_TOKENS).text
            same = model.processor.decode(peer.answer(logits)) == text
            alike = [max(index, -1) for index in ours] == ids
            apart = float(np.abs(logits - wanted).max())
            found.setdefault(kind, []).append((alike, apart, float(wanted.std()), same))
    return {
        kind: {
            "prompts": len(rows),
            "equal_ids": sum(row[0] for row in rows),
            "max_logit_difference": round(max(row[1] for row in rows), 4),
            "logit_spread": round(sum(row[2] for row in rows) / len(rows), 3),
            "equal_answers": sum(row[3] for row in rows),
        }
        for kind, rows in found.items()
    }


def main() -> None:
    """Measures every type and adds the build to the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--build", required=True, help="which llama.cpp this is")
    given = parser.parse_args()
    model = pumice.load(given.model, device="cpu", dtype="float32")
    types = {}
    for dtype in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            state = model.lmm.state_dict()
            files = write_gguf(model.lmm.config, state, model.processor, folder, dtype)
            types[dtype] = compare(model, Peer(files))
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known[given.build] = {"model": given.model, "types": types}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
