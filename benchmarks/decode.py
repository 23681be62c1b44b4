"""Decoding in bfloat16 at the shapes of papers: pumice beside transformers' generate.

    python benchmarks/infer.py --device cuda --shape llava15-7b
    python benchmarks/infer.py --shape llava15-7b --scale 0.1 --batches 1 4

Random weights; every prompt is an image and twenty words. A rate is of 64 steps in which all rows
are in flight; transformers' is of the 63 tokens behind the first. The limit is what memory gives: a
step reads every weight but the embeddings once, and the keys and values of all positions.
`logits_apart` is how far logits are from transformers', relative to the largest. Contestants have
the machine to themselves, one after the other, and leave nothing behind. With many rows
transformers' dynamic cache measures torch's allocator, too: each token moves all of it.
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
from torch._inductor.cudagraph_trees import reset_cudagraph_trees
from train_cost import this_accelerator
from train_model import SHAPES, new_model
from transformers import StaticCache
from transformers_llava import IMAGE_TOKEN, build_model, stored_as

from pumice.infer.best_decoder import logits_apart
from pumice.infer.decoder import AnyDecoder
from pumice.infer.engine import Engine
from pumice.infer.scheduler import Limits
from pumice.infer.slot_decoder import SlotDecoder
from pumice.models.compiled import has_compiler
from pumice.models.lmm import LMM
from pumice.models.quantize import quantize_language

NEW = 64
# Passes after which recordings must have come to an end: slots grow a few times, and each growth
# drops them.
_PASSES = 8
Round = Callable[[], tuple[float, float]]
"""Seconds until every row has its first token, and seconds of a step of all of them."""


class Decoding:
    """A model of one shape on one device, and who decodes with it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.device, self.rounds, self.sides = arguments.device, arguments.rounds, arguments.sides
        self.on_gpu = self.device != "cpu"
        shape = SHAPES[arguments.shape].scaled(arguments.scale)
        self.lmm: LMM = stored_as(new_model(shape, self.device), torch.bfloat16).eval()
        self.processor = word_processor(self.lmm, folder)
        self.image_id = int(self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self.asking = Questions(self.processor, self.image_id)

    def contestants(self, rows: int) -> dict[str, Callable[[], Round]]:
        """Who takes part with so many rows, or those asked for."""
        found: dict[str, Callable[[], Round]] = {
            "pumice": lambda: self.pumice(rows),
            "transformers": lambda: self.transformers(rows),
            "transformers static": lambda: self.transformers(rows, static=True),
        }
        if has_compiler(self.device):
            found["pumice compiled"] = lambda: self.pumice(rows, compiled=True)
        if self.on_gpu:
            found["pumice unrecorded"] = lambda: self.pumice(rows, recorded=False)
            # Of more rows its weights are unpacked at each step.
            if rows == 1 and has_compiler(self.device):
                found["pumice int8 compiled"] = lambda: self.pumice(
                    rows, compiled=True, lmm=self.eight()
                )
        return {name: make for name, make in found.items() if name in (self.sides or found)}

    def eight(self) -> LMM:
        """A copy with the language model's linear layers in 8 bits."""
        twin = copy.deepcopy(self.lmm)
        quantize_language(twin.language, "int8")
        return twin

    def pumice(
        self, rows: int, compiled: bool = False, recorded: bool = True, lmm: LMM | None = None
    ) -> Round:
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

        def measured() -> tuple[float, float]:
            found = self.steps(engine, rows)
            if self.on_gpu and recorded and decoder._graphs is None:
                raise SystemExit("steps could not be recorded (see the warning above)")
            return found

        for _ in range(_PASSES):
            before = set(decoder._memory.recorded)
            measured()
            if before == set(decoder._memory.recorded):
                break
        return measured

    def steps(self, engine: Engine, rows: int) -> tuple[float, float]:
        """Seconds until every row has its first token, and seconds of a step of all of them."""
        scheduler = engine.scheduler(Limits(rows))
        start = self.now()
        # Enough that none ends before the last has joined and all have been timed.
        for request in self.requests(rows, NEW + rows + 2):
            scheduler.add(engine.row(request))
        while len(scheduler.running.rows) < rows:
            scheduler.step()
        begin = self.now()
        for _ in range(NEW):
            scheduler.step()
        if len(scheduler.running.rows) != rows:
            raise SystemExit("an answer ended early")
        return begin - start, (self.now() - begin) / NEW

    @torch.inference_mode()
    def transformers(self, rows: int, static: bool = False) -> Round:
        """transformers' own generate, on the same weights."""
        with torch.device(self.device):
            peer = build_model(self.lmm, self.image_id, dtype=torch.bfloat16).eval()
        inputs = {
            name: part.to(self.device, torch.bfloat16 if part.is_floating_point() else None)
            for name, part in self.asking.inputs(self.requests(rows, NEW)).items()
        }
        # One for all calls: it is compiled for, and recorded over, where it lies.
        longest = inputs["input_ids"].shape[1] + NEW
        text = peer.config.get_text_config()
        kept = StaticCache(config=text, max_cache_len=longest) if static else None

        @torch.inference_mode()
        def answer(new: int) -> float:
            start = self.now()
            if kept is not None:
                kept.reset()
            peer.generate(
                **inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new,
                eos_token_id=None, pad_token_id=0, past_key_values=kept,
            )  # fmt: skip
            return self.now() - start

        def measured() -> tuple[float, float]:
            first = answer(1)
            return first, (answer(NEW) - first) / (NEW - 1)

        for _ in range(2):
            measured()
        return measured

    def requests(self, rows: int, new: int) -> list[Any]:
        """So many questions about two pictures."""
        return [self.asking.request(number, number % 2, new) for number in range(rows)]

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
        for name, make in self.contestants(rows).items():
            measured = make()
            rounds = [measured() for _ in range(self.rounds)]
            first, step = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
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
            del measured
            self.forget()
            if usual := found.get("transformers"):
                for one in found.values():
                    one["over_transformers"] = one["tokens_per_s"] / usual["tokens_per_s"]
            yield found

    def forget(self) -> None:
        """Lets go of what a contestant held, on the GPU and in what was compiled for it."""
        if self.on_gpu:
            reset_cudagraph_trees()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

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
