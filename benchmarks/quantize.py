"""int8 and int4 beside full precision: memory, how far the answers move, and speed.

    python benchmarks/quantize.py --rounds 5

Answers are those of the shipped pocket on held-out scenes. Memory and speed are those of a Llama of
`--width` and `--blocks` with random weights, in CPU seconds of this process; every round runs all
contestants in turn. Writes benchmarks/results/quantize.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

import pumice
from pumice.core.types import Request, Sampling
from pumice.data.sources import LlavaJson
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.config import LMMConfig
from pumice.models.lmm import LMM
from pumice.models.pretrained import config_to_dict
from pumice.models.quantize import pack_for_cpu, quantized_layers
from pumice.world.datasets import make_world

RESULTS = Path(__file__).resolve().parent / "results" / "quantize.json"
WAYS: dict[str, tuple[torch.dtype, str | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float32, int8": (torch.float32, "int8"),
    "bfloat16, int8": (torch.bfloat16, "int8"),
    "float32, int4": (torch.float32, "int4"),
    "bfloat16, int4": (torch.bfloat16, "int4"),
}
PROMPT, ANSWERED = 256, 8


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--load", nargs=2, metavar=("DIR", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.load:
        sys.stdout.write(json.dumps(loading(Path(arguments.load[0]), arguments.load[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        record = {
            "command": "python benchmarks/quantize.py " + " ".join(sys.argv[1:]),
            "machine": machine(),
            "answers": answers(Path(folder), arguments.questions),
            "size": sizes(Path(folder), arguments.width, arguments.blocks),
        }
        record["speed"] = speed(Path(folder) / "model", arguments.rounds)
    text = json.dumps(record, indent=1) + "\n"
    arguments.out.write_text(text)
    sys.stdout.write(text)


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was with other work."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def answers(folder: Path, questions: int) -> dict[str, Any]:
    """The shipped pocket's answers to held-out questions, and its logits for twenty of them."""
    make_world(folder / "world", images=questions, eval_images=4, seed=99)
    rows = LlavaJson(folder / "world" / "llava" / "instruct.json", folder / "world" / "images")
    samples = [rows[row] for row in range(min(questions, len(rows)))]
    settings = Sampling(max_new_tokens=48)
    asked = [
        Request((sample.messages[0],), settings, id=str(number))
        for number, sample in enumerate(samples)
    ]
    found: dict[str, Any] = {}
    texts: list[str | None] = []
    wanted: list[torch.Tensor] = []
    for way, (dtype, quantize) in WAYS.items():
        model = pumice.load("pocket", device="cpu", dtype=dtype, quantize=quantize)
        given = [result.text for result in model.generate(asked)]
        logits = [model.logits(request.messages).float() for request in asked[:20]]
        if way == "float32":
            texts, wanted = given, logits
            continue
        errors = [(a - b).norm() / b.norm() for a, b in zip(logits, wanted, strict=True)]
        tokens = [
            (a.argmax(-1) == b.argmax(-1)).float().mean()
            for a, b in zip(logits, wanted, strict=True)
        ]
        same = sum(a == b for a, b in zip(given, texts, strict=True))
        found[way] = {
            "equal_texts": round(same / len(asked), 3),
            "equal_likeliest_tokens": round(float(torch.stack(tokens).mean()), 4),
            "relative_logit_error": float(f"{float(torch.stack(errors).mean()):.2e}"),
            "max_logit_difference": round(
                max(float((a - b).abs().max()) for a, b in zip(logits, wanted, strict=True)), 3
            ),
        }
    return {"model": "the shipped pocket", "questions": len(asked), "against": "float32", **found}


def sizes(folder: Path, width: int, blocks: int) -> dict[str, Any]:
    """Bytes of the language model's linear layers, and the most memory that loading takes."""
    save(folder / "model", width, blocks)
    file = (folder / "model" / "model.safetensors").stat().st_size
    found: dict[str, Any] = {"width": width, "blocks": blocks, "file_mbyte": round(file / 1e6)}
    for way in WAYS:
        command = [sys.executable, __file__, "--load", str(folder / "model"), way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = json.loads(done.stdout)
        measured["peak_of_float32_file"] = round(measured["loading_peak_mbyte"] * 1e6 / file, 3)
        found[way] = measured
    whole = found["float32"]["model_mbyte"]
    for way in WAYS:
        found[way]["of_float32"] = round(found[way]["model_mbyte"] / whole, 3)
    return found


def save(directory: Path, width: int, blocks: int) -> None:
    """A checkpoint with a tiny vision backbone and a Llama of that size, random, in float32."""
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=2, image_size=32, patch_size=8)  # fmt: skip
    llama = LlamaConfig(vocab_size=4096, hidden_size=width, intermediate_size=width * 11 // 4,
                        num_hidden_layers=blocks, num_attention_heads=width // 64,
                        num_key_value_heads=width // 64, tie_word_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    config = LMMConfig(
        vision=config_to_dict(vision), vision_layer=-1, vision_select="patch", vision_norm=False,
        connector="linear", connector_options={}, tiling=None, language=config_to_dict(llama),
    )  # fmt: skip
    save_checkpoint(directory, LMM.from_config(config), None, {})


def loading(directory: Path, way: str) -> dict[str, Any]:
    """Load in a process of its own; file pages that are only mapped do not count."""
    dtype, quantize = WAYS[way]
    before, peak, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    lmm = load_lmm(directory, dtype=dtype, quantize=quantize)  # type: ignore[arg-type]
    seconds = time.process_time() - start
    peak[0] = max(peak[0], anonymous())
    stop.set()
    watcher.join()
    return {
        "model_mbyte": round(sum(t.nbytes for t in lmm.state_dict().values()) / 1e6, 1),
        "loading_peak_mbyte": round((peak[0] - before) / 1e6, 1),
        "loading_seconds": round(seconds, 2),
    }


def anonymous() -> int:
    """This process's memory in bytes, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


@torch.inference_mode()
def speed(directory: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds of a prompt and of a token after it, median over rounds."""
    models = {}
    for way, (dtype, quantize) in WAYS.items():
        models[way] = load_lmm(directory, dtype=dtype, quantize=quantize)  # type: ignore[arg-type]
        pack_for_cpu(models[way].language)
        assert all(layer.packed for layer in quantized_layers(models[way])) or quantize != "int4"
    times: dict[str, dict[str, list[float]]] = {way: {"prompt": [], "token": []} for way in WAYS}
    for _ in range(rounds + 1):
        for way, lmm in models.items():
            for part, seconds in passes(lmm).items():
                times[way][part].append(seconds)
    found: dict[str, Any] = {"prompt_tokens": PROMPT, "clock": "CPU seconds, one thread"}
    for way in WAYS:
        found[way] = {
            "prompt_ms": round(1e3 * statistics.median(times[way]["prompt"][1:]), 1),
            "token_ms": round(1e3 * statistics.median(times[way]["token"][1:]), 2),
        }
    for way in WAYS:
        for part in ("prompt", "token"):
            ratio = found["float32"][f"{part}_ms"] / found[way][f"{part}_ms"]
            found[way][f"{part}_times_as_fast"] = round(ratio, 2)
    return found


def passes(lmm: LMM) -> dict[str, float]:
    """CPU seconds of one prompt and of one of the tokens after it."""
    from pumice.infer.cache import BufferCache

    cache = BufferCache()
    x = torch.randn(1, PROMPT, lmm.language.hidden_size).to(lmm.dtype)
    keep = torch.zeros(1, PROMPT, dtype=torch.bool)
    keep[:, -1] = True
    start = time.process_time()
    lmm.language(x, cache=cache, keep=keep)
    middle = time.process_time()
    for _ in range(ANSWERED):
        lmm.language(x[:, :1], cache=cache)
    return {"prompt": middle - start, "token": (time.process_time() - middle) / ANSWERED}


if __name__ == "__main__":
    main()
