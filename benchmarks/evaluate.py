"""Questions per second of `pumice eval` beside transformers' generate, with the same answers.

    python benchmarks/evaluate.py --threads 1 --rounds 5

POPE-shaped sets (18 questions an image, as its three categories ask of each of 500 images) and
MME-shaped ones (two) on the pocket model and on a mid-size model with random weights. pumice's time
holds everything `run_benchmark` does: reading the official files, asking, writing, scoring with
intervals. transformers' time holds reading and preparing the pictures, `generate` and decoding: one
question at a time, as the reference protocol asks them, and in batches of 16 sorted by length.
Loading a model is in neither time; to it belongs, once for each process, that pumice lays the
weights out in the processor's order (`preparing_s`). CPU time of one process (with several threads
the wall's time, on an idle machine), rounds interleaved.
Writes benchmarks/results/evaluate.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from speed import machine, rounded
from transformers_llava import IMAGE_TOKEN, Answering, build_model, build_processor

import pumice
from pumice.core.files import read_jsonl, write_atomic
from pumice.core.shipped import resolve_model
from pumice.eval.benchmark import Item
from pumice.eval.benchmarks.pope import Pope
from pumice.eval.runner import run_benchmark
from pumice.models.checkpoint import save_checkpoint
from pumice.models.lmm import LMM
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from pumice.world.datasets import make_world

RESULTS = Path(__file__).resolve().parent / "results" / "evaluate.json"
ROWS, NEW_TOKENS = 16, 8
# The pocket model answers a hundred times as fast; its sets are so many times larger.
POCKET_IMAGES = 5
MODELS = ("pocket", "mid_size")
# Questions on one image.
SHAPES = {"pope_shaped": 18, "mme_shaped": 2}

log = logging.getLogger("evaluate")


class Shaped(Pope):
    """POPE with answers of at most `NEW_TOKENS` tokens."""

    max_new_tokens = NEW_TOKENS


def official_files(world: Path, folder: Path, each: int, images: int) -> Path:
    """POPE's files with `each` questions about the first `images` images of the world alone."""
    by_image: dict[str, list[Item]] = {}
    for item in Pope().load(world):
        by_image.setdefault(item.group, []).append(item)
    kept = {item.id for items in list(by_image.values())[:images] for item in items[:each]}
    for path in world.rglob("coco_pope_*.json"):
        category = path.stem.removeprefix("coco_pope_")
        rows = [row for _, row in read_jsonl(path) if f"{category}/{row['question_id']}" in kept]
        write_atomic(folder / path.name, "".join(json.dumps(row) + "\n" for row in rows))
    (folder / "val2014").symlink_to(world / "val2014")
    return folder


def mid_size(folder: Path) -> Path:
    """CLIP 256 wide, 6 layers, 224 pixels; Llama 512 wide, 8 layers, 32,000 words."""
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    vision, language = folder / "vision", folder / "language"
    torch.manual_seed(0)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
            image_size=224, patch_size=14,
        )
    ).save_pretrained(vision)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("pocket"))
    tokenizer.save_pretrained(language)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
            vocab_size=32_000, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        # Only words the tokenizer has, and no broken bytes, which the two sides write differently.
        model.lm_head.weight[len(tokenizer) :] = 0
        broken = [tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256)]
        model.lm_head.weight[broken] = 0
    model.save_pretrained(language)
    lmm = LMM.from_backbones(vision, language, "mlp2x_gelu", -2, "patch").eval()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    spec = ImageSpec(mode="pad", size=224, mean=mean, std=std)
    processor = Processor(tokenizer, spec, "vicuna_v1", "", lmm.image_tokens)
    save_checkpoint(folder / "model", lmm, processor.save, {})
    return folder / "model"


def clock() -> float:
    """CPU seconds of this process; with several threads, which share them, those of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(checkpoint: Path, data: Path, rounds: int) -> dict[str, Any]:
    """One model on one set: questions/s of each contestant and how many times as fast we are."""
    processor = Processor.load(checkpoint)
    items = Shaped().load(data)
    asked = [(item.prompt, item.image) for item in items]
    model = pumice.load(checkpoint, device="cpu", max_batch=ROWS)
    peer = Answering(
        build_model(model.lmm, processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        build_processor(processor, checkpoint, model.lmm.vision.patch_size),
        processor.end_token_ids,
        NEW_TOKENS,
    )
    # As a careful user batches: neighbours of like length.
    order = sorted(range(len(asked)), key=lambda index: len(asked[index][0]))

    def fresh() -> pumice.Model:
        """A model that has just been loaded, which knows no image and no prompt yet."""
        made = pumice.Model(model.lmm, model.processor, ROWS)
        made.engine.prepare()
        return made

    ready = [fresh()]

    def own() -> list[str]:
        out = data / "out"
        shutil.rmtree(out, ignore_errors=True)
        run_benchmark(ready.pop().generate, Shaped(), data, out)
        return [row["text"] for _, row in read_jsonl(out / "predictions.jsonl")]

    def batched() -> list[str]:
        answers = dict(zip(order, peer([asked[index] for index in order], ROWS), strict=True))
        return [answers[index] for index in range(len(asked))]

    work: dict[str, Callable[[], list[str]]] = {
        "pumice_eval": own,
        "transformers_one_by_one": lambda: peer(asked, 1),
        "transformers_batched": batched,
    }
    texts = {name: run() for name, run in work.items()}
    for name, answers in texts.items():
        if answers != texts["pumice_eval"]:
            apart = [
                pair
                for pair in zip(texts["pumice_eval"], answers, strict=True)
                if len(set(pair)) > 1
            ]
            raise AssertionError(f"{name}: {len(apart)} other answers, such as {apart[0]}")
    seconds: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for number in range(rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            ready[:] = [fresh()]
            start = clock()
            work[name]()
            seconds[name].append(clock() - start)
    start = clock()
    fresh()
    figures: dict[str, Any] = {
        "questions": len(asked),
        "images": len({image for _, image in asked}),
        "preparing_s": clock() - start,
    }
    for name, times in seconds.items():
        ratios = [b / a for a, b in zip(seconds["pumice_eval"], times, strict=True)]
        figures[name] = {
            "questions_per_s": len(asked) / statistics.median(times),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    log.warning("%s", json.dumps(rounded(figures)))
    return figures


def main() -> None:
    """Measure both models on both sets and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {
        "command": f"python benchmarks/evaluate.py --threads {arguments.threads} "
        f"--rounds {arguments.rounds} --images {arguments.images}",
        "machine": machine(),
        "clock": "CPU time of the process" if arguments.threads == 1 else "time",
        "max_new_tokens": NEW_TOKENS,
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_world(folder / "world", images=4, eval_images=3 * POCKET_IMAGES * arguments.images)
        for name in arguments.models:
            checkpoint = resolve_model("pocket") if name == "pocket" else mid_size(folder)
            for title, each in SHAPES.items():
                images = arguments.images * (POCKET_IMAGES if name == "pocket" else 1)
                data = official_files(folder / "world", folder / f"{name}-{title}", each, images)
                record[f"{name}, {title}"] = measure(checkpoint, data, arguments.rounds)
    text = json.dumps(rounded(record), indent=1) + "\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
