"""Decoding in bfloat16 at the shapes of papers: pumice beside transformers' generate.

    python benchmarks/infer.py --device cuda --shape llava15-7b
    python benchmarks/infer.py --shape llava15-7b --scale 0.1 --batches 1 4

Random weights; every prompt is an image and twenty words, every answer 64 tokens. A rate is of the
63 tokens behind the first. The limit is what memory gives: a step reads every weight but the
embeddings once, and the keys and values of all positions. `logits_apart` is how far logits are from
transformers', relative to the largest. Contestants have the machine to themselves, one after the
other, and leave nothing behind.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from questions import Questions, endless, word_processor
from speed import machine
from step_cost import copy_gbytes
from train_cost import this_accelerator
from train_model import SHAPES, new_model
from transformers_llava import IMAGE_TOKEN, build_model, stored_as

from pumice.infer.best_decoder import logits_apart
from pumice.infer.decoder import AnyDecoder
from pumice.infer.engine import Engine
from pumice.infer.slot_decoder import SlotDecoder
from pumice.models.compiled import has_compiler
from pumice.models.lmm import LMM
from pumice.models.quantize import quantize_language

NEW = 64
Answer = Callable[[int], object]
"""Says so many new tokens of every row."""


class Decoding:
    """A model of one shape on one device, and who decodes with it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.device, self.rounds = arguments.device, arguments.rounds
        self.on_gpu = self.device != "cpu"
        shape = SHAPES[arguments.shape].scaled(arguments.scale)
        self.lmm: LMM = stored_as(new_model(shape, self.device), torch.bfloat16).eval()
        self.processor = word_processor(self.lmm, folder)
        self.image_id = int(self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self.asking = Questions(self.processor, self.image_id)

    def contestants(self) -> dict[str, Callable[[int], Answer]]:
        """Who takes part: of a number of rows, what answers them."""
        found: dict[str, Callable[[int], Answer]] = {
            "pumice": self.pumice,
            "transformers": self.transformers,
        }
        if has_compiler(self.device):
            found["pumice compiled"] = lambda rows: self.pumice(rows, compiled=True)
        if self.on_gpu:
            found["pumice unrecorded"] = lambda rows: self.pumice(rows, recorded=False)
            found["transformers static"] = lambda rows: self.transformers(rows, "static")
            if has_compiler(self.device):
                found["pumice int8 compiled"] = lambda rows: self.pumice(
                    rows, compiled=True, lmm=self.eight()
                )
        return found

    def eight(self) -> LMM:
        """A copy with the language model's linear layers in 8 bits."""
        twin = copy.deepcopy(self.lmm)
        quantize_language(twin.language, "int8")
        return twin

    def pumice(
        self, rows: int, compiled: bool = False, recorded: bool = True, lmm: LMM | None = None
    ) -> Answer:
        """The engine, which knows nothing from before."""
        engine = Engine(
            lmm or self.lmm, self.processor, rows, prefix_bytes=0, feature_bytes=0,
            compiled=compiled,
        )  # fmt: skip
        endless(engine)
        engine.prepare()
        decoder = engine._decoder
        self.apart = logits_apart(engine.lmm, AnyDecoder(engine.lmm), decoder)
        if not isinstance(decoder, SlotDecoder):
            raise SystemExit("the decoder made for this model is not used")
        if not recorded:
            decoder._graphs = None

        def answer(new: int) -> None:
            results = engine.generate(self.requests(rows, new))
            if any(result.error or result.new_tokens != new for result in results):
                raise SystemExit(f"{results[0].error or 'an answer ended early'}")
            if self.on_gpu and recorded and decoder._graphs is None:
                raise SystemExit("steps could not be recorded (see the warning above)")

        return answer

    @torch.inference_mode()
    def transformers(self, rows: int, cache: str | None = None) -> Answer:
        """transformers' own generate, on the same weights."""
        with torch.device(self.device):
            peer = build_model(self.lmm, self.image_id, dtype=torch.bfloat16).eval()
        inputs = {
            name: part.to(self.device, torch.bfloat16 if part.is_floating_point() else None)
            for name, part in self.asking.inputs(self.requests(rows, NEW)).items()
        }

        @torch.inference_mode()
        def answer(new: int) -> None:
            more = {} if cache is None else {"cache_implementation": cache}
            peer.generate(
                **inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new,
                eos_token_id=None, pad_token_id=0, **more,
            )  # fmt: skip

        return answer

    def requests(self, rows: int, new: int) -> list[Any]:
        """So many questions about two pictures."""
        return [self.asking.request(number, number % 2, new) for number in range(rows)]

    def seconds(self, answer: Answer) -> tuple[float, float]:
        """A token of every row behind the first, and the first itself."""
        # Twice: what comes again is recorded, and the second time it has come.
        for _ in range(2):
            answer(NEW)
        taken: dict[int, list[float]] = {1: [], NEW: []}
        for _ in range(self.rounds):
            for new, found in taken.items():
                start = self.now()
                answer(new)
                found.append(self.now() - start)
        first, whole = (statistics.median(found) for found in taken.values())
        return (whole - first) / (NEW - 1), first

    def now(self) -> float:
        """Seconds of the wall, when the GPU is done."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def read_bytes(self, rows: int) -> int:
        """What a step in the middle of the answers has to read."""
        language = self.lmm.language
        held = sum(p.numel() for p in language.parameters()) - language.token_embeddings.numel()
        config = language.config
        positions = len(self.processor.encode_prompt(self.requests(1, 1)[0].messages).input_ids)
        width = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        return 2 * (held + rows * (positions + NEW // 2) * width)

    def batch(self, rows: int) -> Iterator[dict[str, Any]]:
        """All contestants with so many rows, and those before again; after each of them."""
        limit = self.limit_gbytes()
        found: dict[str, Any] = {}
        for name, make in self.contestants().items():
            answer = make(rows)
            step, first = self.seconds(answer)
            gbytes = self.read_bytes(rows) / 1e9 / step
            found[name] = {
                "tokens_per_s": rows / step,
                "ms_a_step": step * 1e3,
                "first_token_s": first,
                "read_gbyte_per_s": gbytes,
                "share_of_limit": gbytes / limit,
            }
            if name.startswith("pumice"):
                found[name]["logits_apart"] = self.apart
            if "int8" in name:
                # Its weights are half as many bytes; the share is of what bfloat16 would read.
                del found[name]["read_gbyte_per_s"], found[name]["share_of_limit"]
            del answer
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()
            if usual := found.get("transformers"):
                for one in found.values():
                    one["over_transformers"] = one["tokens_per_s"] / usual["tokens_per_s"]
            yield found

    def limit_gbytes(self) -> float:
        """GB/s that memory gives: a GPU's by its data sheet, a CPU's as a copy measures it."""
        if self.on_gpu:
            return this_accelerator(self.device, time.perf_counter).bandwidth / 1e9
        return copy_gbytes()


def shape_records(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The record of one shape as it grows: whoever is cut short has what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Decoding(arguments, Path(folder))
        record = {
            "command": command(arguments),
            "machine": machine(),
            "accelerator": torch.cuda.get_device_name() if bench.on_gpu else "CPU",
            "limit_gbyte_per_s": bench.limit_gbytes(),
            "language_parameters": sum(p.numel() for p in bench.lmm.language.parameters()),
            "dtype": "bfloat16",
        }
        for rows in arguments.batches:
            for found in bench.batch(rows):
                record[f"batch {rows}"] = found
                yield record


def command(arguments: argparse.Namespace) -> str:
    """What was run."""
    scale = "" if arguments.scale == 1 else f" --scale {arguments.scale:g}"
    batches = " ".join(map(str, arguments.batches))
    return (
        f"python benchmarks/infer.py --device {arguments.device} --shape {arguments.shape}{scale} "
        f"--rounds {arguments.rounds} --threads {arguments.threads} --batches {batches}"
    )
