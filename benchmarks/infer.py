"""The engine beside transformers' generate on identical weights: decoding, batches, shared images.

    python benchmarks/infer.py --rounds 5 [--threads 2] [--llama-cpp]
    python benchmarks/infer.py --device cuda --shape llava15-7b     (bfloat16; see decode.py)

One thread and process CPU time, all contestants in turn round by round: the machine may be shared.
With more threads the clock is the wall's, and the machine must be idle.
Models: the shipped pocket, and a random one of 64 million parameters (Llama 512 wide, 8 blocks,
vocabulary 32,000; CLIP 256 wide, 6 blocks, 224 pixels). Tokens must be equal in float32, or there
is no result. Writes benchmarks/results/infer.json (infer_2_threads.json).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from decode import shape_records
from questions import Questions, endless, word_processor
from speed import machine, rounded
from threadpoolctl import threadpool_limits
from train_model import SHAPES
from transformers import CLIPVisionConfig, LlamaConfig
from transformers_llava import IMAGE_TOKEN, build_model

import pumice
from pumice.core.files import read_json, write_json
from pumice.infer.engine import Engine
from pumice.infer.pages import Pages
from pumice.infer.scheduler import Limits
from pumice.models.config import LMMConfig
from pumice.models.lmm import LMM
from pumice.models.pretrained import config_to_dict
from pumice.models.quantize import pack_for_cpu, quantize_language
from pumice.processing.processor import Processor

RESULTS = Path(__file__).resolve().parent / "results" / "infer.json"
OTHER_RESULTS = str(RESULTS.with_name("infer_{}_threads.json"))
SHAPE_RESULTS = RESULTS.with_name("infer_bfloat16.json")
NEW = 64
LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64)
QUESTIONS = 8


def main() -> None:
    """Measure both models and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llama-cpp", action="store_true", help="beside llama.cpp too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="decode at this shape in bfloat16")
    parser.add_argument("--scale", type=float, default=1.0, help="of --shape: a trial run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128], help="of --shape")
    parser.add_argument("--sides", nargs="+", help="of --shape: some contestants alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    threads = arguments.threads
    torch.set_num_threads(threads)
    if arguments.shape:
        scale = "" if arguments.scale == 1 else f" x {arguments.scale:g}"
        name = f"{arguments.shape}{scale} {arguments.device}"
        out = arguments.out or SHAPE_RESULTS
        known = read_json(out) if out.is_file() else {}
        # Batches may be measured one after the other, in runs of their own.
        before = known.get(name, {})
        for found in shape_records(arguments):
            write_json(out, {**known, name: before | rounded(found)})
        return
    if arguments.device != "cpu":
        parser.error("on a GPU a shape is measured: give --shape llava15-7b")
    record: dict[str, Any] = {
        "command": f"python benchmarks/infer.py --rounds {arguments.rounds} --threads {threads}"
        + " --llama-cpp" * arguments.llama_cpp,
        "machine": machine(),
        "clock": "CPU seconds of the process" if threads == 1 else "seconds",
        "read_gbyte_per_s": read_gbytes(),
    }
    with tempfile.TemporaryDirectory() as folder:
        pocket = pumice.load("pocket", device="cpu", dtype="float32")
        for name, (lmm, processor) in {
            "pocket": (pocket.lmm, pocket.processor),
            "random 64M": mid_size(Path(folder)),
        }.items():
            record[name] = measure(lmm, processor, arguments.rounds, arguments.llama_cpp)
            decode = record[name]["decode_batch_1"]
            share = decode["weights_read_gbyte_per_s"] / record["read_gbyte_per_s"]
            decode["share_of_read_bandwidth"] = share
    out = arguments.out or (RESULTS if threads == 1 else OTHER_RESULTS.format(threads))
    Path(out).write_text(json.dumps(rounded(record), indent=1) + "\n")


def clock() -> float:
    """CPU seconds of this process; with several threads, which share them, those of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(lmm: LMM, processor: Processor, rounds: int, llama_cpp: bool) -> dict[str, Any]:
    """All parts for one model; float32 first, int8 beside it."""
    bench = Bench(lmm, processor, rounds)
    beside = {"decode_beside_llama_cpp": bench.beside_llama_cpp()} if llama_cpp else {}
    return {
        **beside,
        "decode_batch_1": bench.decode(),
        "batch_8_mixed_lengths": bench.mixed(),
        "questions_8_an_image": bench.questions(),
        "first_token_under_load": bench.under_load(),
    }


class Bench:
    """One model, as pumice and as transformers run it."""

    def __init__(self, lmm: LMM, processor: Processor, rounds: int) -> None:
        self.lmm, self.processor, self.rounds = lmm, processor, rounds
        self.peer = build_model(lmm, processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).eval()
        self.image_id = self.peer.config.image_token_index
        self.asking = Questions(processor, self.image_id)
        self.request, self.inputs = self.asking.request, self.asking.inputs

    def engine(self, batch: int, lmm: LMM | None = None, **kept: int) -> Engine:
        """An engine that never ends an answer early, as the peer is told not to."""
        return endless(Engine(lmm or self.lmm, self.processor, batch, **kept))

    @torch.inference_mode()
    def generate(self, inputs: dict[str, torch.Tensor], new: int) -> torch.Tensor:
        """transformers' own greedy generate, exactly `new` tokens a row."""
        out: torch.Tensor = self.peer.generate(
            **inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        return out[:, inputs["input_ids"].shape[1] :]

    def interleave(self, work: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """CPU seconds of every contestant in every round, each round in another order.

        A turn of the same order would leave each behind the same other, in what that has left of
        the processor's caches.
        """
        for run in work.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in work}
        names = list(work)
        for number in range(self.rounds):
            for name in random.Random(number).sample(names, len(names)):
                start = clock()
                work[name]()
                seconds[name].append(clock() - start)
        return seconds

    def decode(self) -> dict[str, Any]:
        """Tokens a second at batch 1: what 63 more tokens cost beyond the first."""
        engine = self.engine(1)
        eight = self.engine(1, quantized(self.lmm, "int8"))
        requests = {new: self.request(1, 0, new) for new in (1, NEW)}
        inputs = self.inputs([requests[NEW]])
        ours = engine.generate([requests[NEW]])[0].text
        theirs = self.processor.decode(self.generate(inputs, NEW)[0].tolist()).strip()
        if ours != theirs:
            raise AssertionError(f"{ours!r} and {theirs!r}")
        work: dict[str, Callable[[], Any]] = {}
        for new in (1, NEW):
            work[f"pumice {new}"] = lambda new=new: engine.generate([requests[new]])
            work[f"pumice int8 {new}"] = lambda new=new: eight.generate([requests[new]])
            work[f"transformers {new}"] = lambda new=new: self.generate(inputs, new)
        seconds = self.interleave(work)
        rates = token_rates(seconds, ("pumice", "pumice int8", "transformers"))
        weights = sum(p.numel() for p in self.lmm.language.parameters()) * 4
        if not self.lmm.language.config.tie_word_embeddings:
            weights -= self.lmm.language.token_embeddings.numel() * 4
        rate = statistics.median(rates["pumice"])
        return {
            "tokens_per_s": {name: statistics.median(found) for name, found in rates.items()},
            "float32_over_transformers": ratio(rates["pumice"], rates["transformers"]),
            "int8_over_float32": ratio(rates["pumice int8"], rates["pumice"]),
            "weights_read_gbyte_per_s": weights * rate / 1e9,
        }

    def beside_llama_cpp(self) -> dict[str, Any]:
        """Tokens a second of both decoders behind a prompt of text, at equal precision."""
        from llama_cpp_decode import contestants

        eight = quantized(self.lmm, "int8")
        work, alike = contestants(self.lmm, eight, NEW, torch.get_num_threads())
        if alike["llama.cpp f32"] != NEW:
            raise AssertionError(f"{alike['llama.cpp f32']} of {NEW} tokens are equal")
        seconds = self.interleave(work)
        rates = token_rates(seconds, tuple(alike))
        read = {name: statistics.median(seconds[f"{name} 1"]) * 1e3 for name in alike}
        return {
            "tokens_per_s": {name: statistics.median(found) for name, found in rates.items()},
            "prompt_ms": read,
            "float32_over_llama_cpp": ratio(rates["pumice"], rates["llama.cpp f32"]),
            "int8_over_llama_cpp": ratio(rates["pumice int8"], rates["llama.cpp q8_0"]),
            "tokens_as_in_float32": alike,
        }

    def mixed(self) -> dict[str, Any]:
        """Eight requests at once, 8 to 64 new tokens; nothing known from before."""
        requests = [self.request(n, n % 2, new) for n, new in enumerate(LENGTHS)]
        inputs = self.inputs(requests)
        engine = self.engine(8, prefix_bytes=0, feature_bytes=0)
        texts = [result.text for result in engine.generate(requests)]
        out = self.generate(inputs, NEW)
        for row, (text, new) in enumerate(zip(texts, LENGTHS, strict=True)):
            if text != self.processor.decode(out[row, :new].tolist()).strip():
                raise AssertionError(f"row {row} differs")
        seconds = self.interleave(
            {
                "pumice": lambda: engine.generate(requests),
                "transformers": lambda: self.generate(inputs, NEW),
            }
        )
        return throughput(seconds, sum(LENGTHS), "tokens_per_s")

    def questions(self) -> dict[str, Any]:
        """Eight short questions about one image, each round with nothing known from before."""
        requests = [self.request(n, 0, 4) for n in range(QUESTIONS)]
        inputs = [self.inputs([request]) for request in requests]
        together = self.inputs(requests)

        def ours() -> list[pumice.Result]:
            engine.memory.features.clear()
            engine.memory.prefixes.clear()
            return engine.generate(requests)

        engine = self.engine(QUESTIONS)
        texts = [result.text for result in ours()]
        for text, one in zip(texts, inputs, strict=True):
            if text != self.processor.decode(self.generate(one, 4)[0].tolist()).strip():
                raise AssertionError(text)
        seconds = self.interleave(
            {
                "pumice": ours,
                "transformers": lambda: [self.generate(one, 4) for one in inputs],
                "transformers batched": lambda: self.generate(together, 4),
            }
        )
        return throughput(seconds, QUESTIONS, "questions_per_s")

    def under_load(self) -> dict[str, Any]:
        """CPU seconds until the first token of a request that comes while seven are answered."""
        found: dict[str, list[float]] = {"alone": [], "beside 7": []}
        for number in range(self.rounds):
            for name, others in (("alone", 0), ("beside 7", 7)):
                engine = self.engine(8)
                engine.prepare()
                scheduler = engine.scheduler(Limits(8, prefill_chunk=256))
                for other in range(others):
                    scheduler.add(engine.row(self.request(other, 1, 200)))
                while others and len(scheduler.running.rows) < others:
                    scheduler.step()
                start = clock()
                row = engine.row(self.request(100 + number, 0, 2))
                scheduler.add(row)
                while not row.answer.new_tokens:
                    scheduler.step()
                found[name].append(clock() - start)
        return {f"{name}_ms": statistics.median(times) * 1e3 for name, times in found.items()}


def quantized(lmm: LMM, method: Any) -> LMM:
    """A copy with the language model's linear layers in 8 bits."""
    twin = copy.deepcopy(lmm)
    quantize_language(twin.language, method)
    pack_for_cpu(twin.language)
    return twin.eval()


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times the first is the second: median, least and largest over rounds."""
    found = [a / b for a, b in zip(one, other, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "largest": max(found)}


def token_rates(seconds: dict[str, list[float]], names: Sequence[str]) -> dict[str, list[float]]:
    """Tokens a second in each round, of what is timed as "NAME 1" and as "NAME 64" tokens."""
    return {
        name: [
            (NEW - 1) / (long - short)
            for long, short in zip(seconds[f"{name} {NEW}"], seconds[f"{name} 1"], strict=True)
        ]
        for name in names
    }


def throughput(seconds: dict[str, list[float]], count: int, unit: str) -> dict[str, Any]:
    """Rates, and how many times as fast pumice is."""
    rates = {name: [count / one for one in times] for name, times in seconds.items()}
    return {
        unit: {name: statistics.median(found) for name, found in rates.items()},
        **{
            f"over_{name.replace(' ', '_')}": ratio(rates["pumice"], found)
            for name, found in rates.items()
            if name != "pumice"
        },
    }


def read_gbytes() -> float:
    """What the threads read of memory in a second: 256 MiB in large pages times a vector."""
    vector = torch.ones(1024)
    table = Pages().empty((1024, 65536), torch.float32).fill_(1.0).numpy()
    best = 0.0
    with threadpool_limits(torch.get_num_threads(), "blas"):
        for _ in range(7):
            start = clock()
            np.dot(vector.numpy(), table)
            best = max(best, table.nbytes / 1e9 / (clock() - start))
    return best


def mid_size(folder: Path) -> tuple[LMM, Processor]:
    """The random model of 64 million parameters and a tokenizer of 32,000 words."""
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        image_size=224, patch_size=14,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    lmm = LMM.from_config(
        LMMConfig(
            vision=config_to_dict(vision), vision_layer=-2, vision_select="patch",
            vision_norm=False,
            connector="mlp2x_gelu", connector_options={}, tiling=None,
            language=config_to_dict(language),
        )
    )  # fmt: skip
    processor = word_processor(lmm, folder)
    return lmm.eval(), processor


if __name__ == "__main__":
    main()
