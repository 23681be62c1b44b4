"""Decoding in bfloat16 at the shapes of papers: pumice beside transformers' generate.

    python benchmarks/infer.py --device cuda --shape llava15-7b
    python benchmarks/infer.py --shape llava15-7b --scale 0.1 --batches 1 4

Random weights; every prompt is an image and twenty words, every answer 64 tokens. A rate is of the
63 tokens behind the first. The limit is what memory gives: a step reads every weight but the
embeddings once, and the keys and values of all positions. Contestants have the machine to
themselves, one after the other, and leave nothing behind.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from questions import Questions, endless, word_processor
from speed import machine
from step_cost import copy_gbytes
from train_cost import this_accelerator
from train_model import SHAPES, new_model
from transformers_llava import IMAGE_TOKEN, build_model

from pumice.infer.engine import Engine
from pumice.infer.slot_decoder import SlotDecoder
from pumice.models.compiled import has_compiler
from pumice.models.lmm import LMM
from pumice.models.quantize import quantize_language

NEW = 64
Answer = Callable[[int], list[list[int]]]
"""The tokens of every row, of so many new ones."""


class Decoding:
    """A model of one shape on one device, and who decodes with it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.device, self.rounds = arguments.device, arguments.rounds
        self.on_gpu = self.device != "cpu"
        shape = SHAPES[arguments.shape].scaled(arguments.scale)
        self.lmm: LMM = new_model(shape, self.device).to(torch.bfloat16).eval()
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
        engine.prepare()
        decoder = engine._decoder
        if not isinstance(decoder, SlotDecoder):
            raise SystemExit("the decoder made for this model is not used")
        if not recorded:
            decoder._graphs = None

        def answer(new: int) -> list[list[int]]:
            made = []
            row = engine.row
            engine.row = lambda *given: made.append(row(*given)) or made[-1]  # type: ignore
            results = endless(engine).generate(self.requests(rows, new))
            engine.row = row  # type: ignore[method-assign]
            errors = [result.error for result in results if result.error]
            if errors:
                raise SystemExit(errors[0])
            if self.on_gpu and recorded and decoder._graphs is None:
                raise SystemExit("steps could not be recorded (see the warning above)")
            return [row.answer.ids for row in sorted(made, key=lambda row: row.sampler.seed)]

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
        def answer(new: int) -> list[list[int]]:
            more = {} if cache is None else {"cache_implementation": cache}
            out = peer.generate(
                **inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new,
                eos_token_id=None, pad_token_id=0, **more,
            )  # fmt: skip
            tokens: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
            return tokens

        return answer

    def requests(self, rows: int, new: int) -> list[Any]:
        """So many questions about two pictures."""
        return [self.asking.request(number, number % 2, new) for number in range(rows)]

    def seconds(self, answer: Answer) -> tuple[float, float, list[list[int]]]:
        """A token of every row behind the first, the first itself, and the tokens said."""
        # Twice: what comes again is recorded, and the second time it has come.
        for _ in range(2):
            said = answer(NEW)
        taken: dict[int, list[float]] = {1: [], NEW: []}
        for _ in range(self.rounds):
            for new, found in taken.items():
                start = self.now()
                answer(new)
                found.append(self.now() - start)
        first, whole = (statistics.median(found) for found in taken.values())
        return (whole - first) / (NEW - 1), first, said

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

    def batch(self, rows: int) -> dict[str, Any]:
        """All contestants with so many rows."""
        limit = self.limit_gbytes()
        found: dict[str, Any] = {}
        said: dict[str, list[list[int]]] = {}
        for name, make in self.contestants().items():
            answer = make(rows)
            step, first, said[name] = self.seconds(answer)
            gbytes = self.read_bytes(rows) / 1e9 / step
            found[name] = {
                "tokens_per_s": rows / step,
                "ms_a_step": step * 1e3,
                "first_token_s": first,
                "read_gbyte_per_s": gbytes,
                "share_of_limit": gbytes / limit,
            }
            if "int8" in name:
                # Its weights are half as many bytes; the share is of what bfloat16 would read.
                del found[name]["read_gbyte_per_s"], found[name]["share_of_limit"]
            del answer
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()
        for name, one in found.items():
            one["over_transformers"] = one["tokens_per_s"] / found["transformers"]["tokens_per_s"]
            one["equal_tokens_before_the_first_difference"] = agreement(
                said[name], said["transformers"]
            )
        return found

    def limit_gbytes(self) -> float:
        """GB/s that memory gives: a GPU's by its data sheet, a CPU's as a copy measures it."""
        if self.on_gpu:
            return this_accelerator(self.device, time.perf_counter).bandwidth / 1e9
        return copy_gbytes()


def shape_record(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of one shape."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Decoding(arguments, Path(folder))
        return {
            "command": command(arguments),
            "machine": machine(),
            "accelerator": torch.cuda.get_device_name() if bench.on_gpu else "CPU",
            "limit_gbyte_per_s": bench.limit_gbytes(),
            "language_parameters": sum(p.numel() for p in bench.lmm.language.parameters()),
            "dtype": "bfloat16",
            **{f"batch {rows}": bench.batch(rows) for rows in arguments.batches},
        }


def command(arguments: argparse.Namespace) -> str:
    """What was run."""
    scale = "" if arguments.scale == 1 else f" --scale {arguments.scale:g}"
    batches = " ".join(map(str, arguments.batches))
    return (
        f"python benchmarks/infer.py --device {arguments.device} --shape {arguments.shape}{scale} "
        f"--rounds {arguments.rounds} --threads {arguments.threads} --batches {batches}"
    )


def agreement(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """The share of tokens before the first that differs in its row.

    In bfloat16 two orders of the same sums part ways where two tokens are as likely.
    """
    alike = 0
    for mine, theirs in zip(one, other, strict=True):
        pairs = list(zip(mine, theirs, strict=True))
        alike += next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return alike / sum(map(len, one))
