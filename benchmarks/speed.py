"""pumice beside transformers' own LLaVA on identical weights: training, answering, start-up.

    python benchmarks/speed.py --threads 1 --clock cpu --rounds 7

Every round runs all contestants in turn, so noise hits all alike; a ratio is the median over
rounds. Losses and answers must agree, or there is no result. Writes benchmarks/results/speed.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from step_cost import copy_gbytes, gemm_gflops, step_cost
from transformers_llava import (
    IMAGE_TOKEN,
    Answering,
    TrainingStep,
    build_model,
    build_processor,
    training_inputs,
)

import pumice
from pumice.core.shipped import shipped
from pumice.data.loader import Loader
from pumice.data.mixture import Mixture, Part
from pumice.data.sources import LlavaJson
from pumice.eval.benchmarks import BENCHMARKS
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.lmm import LMM
from pumice.processing.collate import Batch
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from pumice.processing.response_formats import SHORT
from pumice.train.parallel import SharedModel
from pumice.train.stages import StageSpec
from pumice.train.trainer import Trainer
from pumice.world.datasets import make_world

RESULTS = Path(__file__).resolve().parent / "results" / "speed.json"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATE, CLIP, ROWS = 1e-3, 1.0, 16
BATCHES = 3
IMAGES, QUESTIONS, NEW_TOKENS = 16, 4, 32
# bfloat16 keeps 8 bits, and the two sides round at different places.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}

log = logging.getLogger("speed")


def main() -> None:
    """Run the parts asked for and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", action="store_true", help="print the record, not the table")
    parser.add_argument("--model", type=Path, help="another checkpoint than the shipped pocket")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    # Subprocesses of the start-up part get the same number.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments)
        record = {
            "command": f"python benchmarks/speed.py --threads {arguments.threads} "
            f"--rounds {arguments.rounds} --clock {arguments.clock}",
            "machine": machine(),
            "model": bench.origin,
            "clock": arguments.clock,
            "rounds": arguments.rounds,
            **{part: PARTS[part](bench) for part in arguments.parts},
        }
    text = json.dumps(rounded(record), indent=1) + "\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    sys.stdout.write(text if arguments.json else table(record))


class Bench:
    """What all parts share: a world, a checkpoint, a clock."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.rounds = folder, arguments.rounds
        self.clock = CLOCKS[arguments.clock]
        self.world = folder / "world"
        make_world(self.world, images=64, eval_images=IMAGES + 8)
        pocket = shipped("pocket")
        if arguments.model or pocket:
            self.checkpoint: Path = arguments.model or pocket
            self.origin = "given by --model" if arguments.model else "the shipped pocket"
        else:
            self.checkpoint = fresh_checkpoint(folder)
            self.origin = "pocket size, fresh weights of seed 0"
        self.processor = Processor.load(self.checkpoint)

    def interleave(self, work: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Each contestant's figures; `ratio` is how many times longer than pumice it takes."""
        for run in work.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in work}
        names = list(work)
        for number in range(self.rounds):
            # Whoever comes first finds other caches than whoever follows.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start = self.clock()
                work[name]()
                seconds[name].append(self.clock() - start)
        figures: dict[str, Any] = {}
        for name, times in seconds.items():
            ratios = [b / a for a, b in zip(seconds["pumice"], times, strict=True)]
            figures[name] = {
                "seconds": statistics.median(times),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        return figures


def fresh_checkpoint(folder: Path) -> Path:
    """A checkpoint of the pocket's size; its weights are drawn, not trained."""
    from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

    from pumice.world.language_backbone import new_model
    from pumice.world.tokenizer import train_tokenizer

    vision, language = folder / "vision", folder / "language"
    train_tokenizer(language)
    tokenizer = AutoTokenizer.from_pretrained(language)
    model = new_model(len(tokenizer), seed=0)
    # Untrained, it would say bytes that are no character; the two sides write those differently.
    broken = [tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256)]
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = 0
    model.save_pretrained(language)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=96, patch_size=16, hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(vision)
    lmm = LMM.from_backbones(vision, language, "mlp2x_gelu", -1, "patch").eval()
    lmm.match_connector_scale(torch.randn(4, 3, 96, 96))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    spec = ImageSpec(mode="pad", size=96, mean=mean, std=std)
    processor = Processor(tokenizer, spec, "vicuna_v1", "", lmm.image_tokens)
    save_checkpoint(folder / "model", lmm, processor.save, {})
    return folder / "model"


def training(bench: Bench) -> dict[str, Any]:
    """Steps over the same prepared batches: vision frozen, connector and language model learnt."""
    source = LlavaJson(bench.world / "llava" / "instruct.json", bench.world / "images")
    loader = Loader(Mixture([Part(source)], 0), bench.processor, ROWS, 0, max_tokens=512)
    start = bench.clock()
    batches = [loader.micro_batches_at(step)[0] for step in range(BATCHES)]
    record: dict[str, Any] = {
        "batch": [list(batch.input_ids.shape) for batch in batches],
        "supervised": [batch.num_supervised for batch in batches],
        "loading_samples_per_s": BATCHES * ROWS / (bench.clock() - start),
        "copy_gbyte_per_s": copy_gbytes(bench.clock),
    }
    for dtype in ("float32", "bfloat16"):
        log.info("training, %s", dtype)
        record[dtype] = training_in(bench, batches, loader, dtype)
    return record


def training_in(bench: Bench, batches: list[Batch], loader: Loader, dtype: str) -> dict[str, Any]:
    """One precision: pumice's own training step against transformers' in both attentions."""
    lmm = load_lmm(bench.checkpoint)
    token = bench.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    theirs = [training_inputs(batch, token) for batch in batches]
    autocast = dtype == "bfloat16"
    peers = {
        f"transformers_{attention}": TrainingStep(
            build_model(lmm, token, attention), RATE, CLIP, autocast
        )
        for attention in ("sdpa", "eager")
    }
    trainer = own_trainer(bench, copy.deepcopy(lmm), loader, autocast)
    losses = {"pumice": trainer._step(0, batches[:1])["loss"]}
    losses |= {name: step(theirs[0]) for name, step in peers.items()}
    apart = max(losses.values()) - min(losses.values())
    if not apart <= LOSS_TOLERANCE[dtype]:
        raise AssertionError(f"{dtype}: the first losses are {losses}")
    own = {"pumice": lambda: [trainer._step(1, [batch]) for batch in batches]}
    others = {
        name: lambda step=step: [step(inputs) for inputs in theirs] for name, step in peers.items()
    }
    figures = bench.interleave(own | others)
    peak = max(gemm_gflops(getattr(torch, dtype), bench.clock) for _ in range(bench.rounds))
    for name, figure in figures.items():
        heads = [b.num_supervised if name == "pumice" else b.input_ids.numel() for b in batches]
        costs = [
            step_cost(trainer.lmm, batch, head, 2 if autocast else 4)
            for batch, head in zip(batches, heads, strict=True)
        ]
        cost = {key: statistics.mean(one[key] for one in costs) for key in costs[0]}
        achieved = cost["gflop"] * BATCHES / figure["seconds"]
        figure |= {"samples_per_s": BATCHES * ROWS / figure["seconds"], **cost}
        figure |= {"gflop_per_s": achieved, "share_of_gemm_peak": achieved / peak}
    return {"first_loss": losses, "gemm_peak_gflop_per_s": peak, **figures}


def own_trainer(bench: Bench, lmm: LMM, loader: Loader, autocast: bool) -> Trainer:
    """The trainer of a run, whose step is measured as it is."""
    spec = StageSpec(
        name="speed", vision=(bench.checkpoint,), vision_layer=-1, vision_select="patch",
        connector="mlp2x_gelu", language=bench.checkpoint, init=bench.checkpoint, image_mode="pad",
        template="vicuna_v1", system="", final_template="vicuna_v1", final_system="",
        train={"connector": RATE, "language": RATE}, data=(), steps=10**6, epochs=None,
        batch_size=ROWS, warmup=0.0, schedule="constant", clip=CLIP,
    )  # fmt: skip
    lmm.vision.requires_grad_(False).eval()
    lmm.connector.train()
    lmm.language.train()
    model = SharedModel(lmm)
    trainer = Trainer(spec, model, loader, bench.folder, fingerprint="")
    trainer.autocast = autocast
    return trainer


def generation(bench: Bench) -> dict[str, Any]:
    """Questions about pictures, from files to texts, greedy in float32."""
    asked = questions(bench)
    model = pumice.load(bench.checkpoint, device="cpu", max_batch=ROWS)
    engine, lmm = model.engine, model.lmm
    sampling = pumice.Sampling(max_new_tokens=NEW_TOKENS)
    requests = [pumice.Request((pumice.user(text, path),), sampling) for text, path in asked]
    peer = Answering(
        build_model(lmm, bench.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        build_processor(bench.processor, bench.checkpoint, lmm.vision.patch_size),
        bench.processor.end_token_ids,
        NEW_TOKENS,
    )
    ready = [peer.inputs(asked[i : i + ROWS]) for i in range(0, len(asked), ROWS)]
    log.info("generation: comparing %d answers", len(asked))
    results = engine.generate(requests)
    texts = [result.text for result in results]
    for rows in (1, ROWS):
        for question, ours, other in zip(asked, texts, peer(asked, rows), strict=True):
            if ours != other:
                raise AssertionError(f"{question}, {rows} at once: {ours!r} and {other!r}")
    log.info("generation: measuring")
    figures = bench.interleave(
        {
            "pumice": lambda: engine.generate(requests),
            "pumice_one_by_one": lambda: [engine.generate([request]) for request in requests],
            "transformers_one_by_one": lambda: peer(asked, 1),
            "transformers_batched": lambda: peer(asked, ROWS),
            # Without reading, preparing and tokenising, which pumice's figure contains.
            "transformers_batched_prepared": lambda: [peer.decode(inputs) for inputs in ready],
        }
    )
    for figure in figures.values():
        figure["questions_per_s"] = len(asked) / figure["seconds"]
    new = [result.new_tokens for result in results]
    lengths = {"mean_new_tokens": statistics.mean(new), "longest": max(new)}
    return {"questions": len(asked), "images": IMAGES, **lengths, **figures}


def questions(bench: Bench) -> list[tuple[str, Path]]:
    """(question, image file): four per image, every second one without the short-answer prompt."""
    by_image: dict[Path, list[str]] = {}
    for item in BENCHMARKS["vqav2"].load(bench.world):
        assert item.image is not None
        by_image.setdefault(item.image, []).append(item.prompt)
    enough = [(path, found) for path, found in by_image.items() if len(found) >= QUESTIONS]
    return [
        (prompt.removesuffix("\n" + SHORT) if number % 2 else prompt, path)
        for path, found in enough[:IMAGES]
        for number, prompt in enumerate(found[:QUESTIONS])
    ]


def startup(bench: Bench) -> dict[str, Any]:
    """Seconds of a new process until it is done; the median over rounds."""
    question, image = questions(bench)[0]
    own = [sys.executable, "-m", "pumice"]
    commands = {
        "import pumice": [sys.executable, "-c", "import pumice"],
        "pumice --help": [*own, "--help"],
        "pumice ask": [
            *own, "ask", str(bench.checkpoint), question, "--image", str(image),
            "--max-new-tokens", str(NEW_TOKENS),
        ],
        "import transformers' LLaVA": [
            sys.executable, "-c", "from transformers import LlavaForConditionalGeneration",
        ],
        "import torch": [sys.executable, "-c", "import torch"],
    }  # fmt: skip
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(bench.rounds + 1):
        for name, command in commands.items():
            figures = process_seconds(command)
            # The first round fills the file cache.
            if number:
                measured[name].append(figures)
    return {
        name: {
            "cpu_seconds": statistics.median(cpu for cpu, _ in figures),
            "wall_seconds": statistics.median(wall for _, wall in figures),
        }
        for name, figures in measured.items()
    }


def process_seconds(command: list[str]) -> tuple[float, float]:
    """CPU seconds (user and system) and wall seconds of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was with other work."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(record: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{record['model']}; {record['clock']} clock, {record['rounds']} rounds"]
    sections = [
        (f"training, {dtype}", record.get("training", {}).get(dtype, {}), "samples_per_s")
        for dtype in LOSS_TOLERANCE
    ]
    sections.append(("generation", record.get("generation", {}), "questions_per_s"))
    for title, figures, speed in sections:
        for name, figure in figures.items():
            if isinstance(figure, dict) and speed in figure:
                low, high = figure["ratio_range"]
                lines.append(
                    f"{title:20} {name:32} {figure[speed]:8.1f}/s   pumice is "
                    f"{figure['ratio']:5.2f} times as fast ({low:.2f} to {high:.2f})"
                )
    for name, figure in record.get("startup", {}).items():
        lines.append(
            f"{'start-up':20} {name:32} {figure['cpu_seconds']:8.2f} s of CPU, "
            f"{figure['wall_seconds']:.2f} s"
        )
    return "\n".join(lines) + "\n"


def rounded(value: Any) -> Any:
    """Every number to four digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "training": training,
    "generation": generation,
    "startup": startup,
}


if __name__ == "__main__":
    main()
