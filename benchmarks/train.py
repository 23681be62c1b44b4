"""A training step of pumice beside a transformers loop on identical weights, at three sizes.

    python benchmarks/train.py --shape mid --rounds 5
    python benchmarks/train.py --shape llava15-7b --device cuda --budget 16384 --clock wall

Conversations are drawn as long as LLaVA-1.5's 665K: 300 +- 250 tokens of text, of which the last
60 % are learnt, and 10 % without an image. Weights and pixels are random: neither changes a time.
The other side is LlavaForConditionalGeneration with padded batches, an attention mask, sdpa and its
own loss, in float32, with bfloat16 weights, and in bfloat16 autocast as pumice trains. Every round
runs all in turn; a ratio is the median over rounds. First losses must agree. Peak memory is that of
a process of its own for each. Adds its record to benchmarks/results/train.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from speed import machine, rounded
from transformers import CLIPVisionConfig, LlamaConfig
from transformers_llava import TrainingStep, build_model, training_inputs

from pumice.core.files import read_json, write_json
from pumice.data.packing import Packing, Size, pack_rows
from pumice.models.config import LMMConfig
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.lmm import LMM
from pumice.models.packed_attention import attend_to_documents
from pumice.models.pretrained import config_to_dict
from pumice.processing.collate import Batch, collate, collate_packed
from pumice.processing.encoded import Encoded
from pumice.train.adapters import set_trained
from pumice.train.build import PARTS
from pumice.train.parallel import SharedModel
from pumice.train.stages import StageSpec
from pumice.train.trainer import Trainer

RESULTS = Path(__file__).resolve().parent / "results" / "train.json"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATE, CLIP, BATCHES = 2e-5, 1.0, 2
# Half of the bits of a bfloat16 loss; the two sides round at different places.
LOSS_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Shape:
    """Widths and depths of both backbones; the heads are 64 wide, but for the pocket's."""

    vision: tuple[int, int, int, int]
    """Width, blocks, side of a picture, side of a patch."""
    language: tuple[int, int, int, int]
    """Width, blocks, inner width, vocabulary."""
    head: int = 64


SHAPES = {
    "pocket": Shape((128, 4, 96, 16), (128, 5, 352, 1335), head=32),
    "mid": Shape((256, 6, 224, 14), (512, 8, 1408, 32000)),
    "llava15-7b": Shape((1024, 24, 336, 14), (4096, 32, 11008, 32000), head=128),
}


def main() -> None:
    """Measure one shape and one stage, and add the record to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--stage", choices=("align", "tune"), default="tune")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="conversations of a step")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--peak-of", choices=CONTESTANTS, help="print one side's memory, and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    if arguments.peak_of:
        sys.stdout.write(f"{bench.peak(arguments.peak_of)}\n")
        return
    record = bench.record()
    known = read_json(arguments.out) if arguments.out.is_file() else {}
    name = f"{arguments.shape} {arguments.stage} {arguments.device}"
    write_json(arguments.out, {**known, name: rounded(record)})
    sys.stdout.write(json.dumps(rounded(record), indent=1) + "\n")


class Bench:
    """One model, the conversations of two steps, and the sides that train on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.clock = CLOCKS[arguments.clock]
        self.shape = SHAPES[arguments.shape]
        self.align = arguments.stage == "align"
        self.lmm = new_model(self.shape)
        rng = random.Random(0)
        self.steps = [
            [conversation(self.lmm, rng) for _ in range(arguments.batch)] for _ in range(BATCHES)
        ]

    @property
    def image_id(self) -> int:
        """The last id of the vocabulary, which no drawn text holds."""
        return self.lmm.language.vocab_size - 1

    def own(self) -> Step:
        """pumice's step as a stage runs it, packed."""
        torch.manual_seed(0)
        lmm = new_model(self.shape).to(self.arguments.device)
        lmm.load_state_dict(self.lmm.state_dict())
        for part in PARTS:
            set_trained(lmm, part, part in trained_parts(self.align))
        attend_to_documents(lmm.language)
        trainer = own_trainer(lmm, self.align)
        packed = [pack(step, self.arguments.budget) for step in self.steps]
        return lambda number: float(trainer._step(1, packed[number])["loss"])

    def peer(self, dtype: torch.dtype, autocast: bool) -> Step:
        """transformers' step in one precision."""
        model = build_model(self.lmm, self.image_id).to(self.arguments.device, dtype)
        step = TrainingStep(model, RATE, CLIP, autocast, align=self.align)
        batches = [collate(encoded, 0).to(self.arguments.device) for encoded in self.steps]
        inputs = [training_inputs(batch, self.image_id) for batch in batches]
        for one in inputs:
            one["pixel_values"] = one["pixel_values"].to(dtype)
        return lambda number: step(inputs[number])

    def peak(self, name: str) -> int:
        """Bytes at most held while both steps run twice, on the device or in main memory."""
        step = CONTESTANTS[name](self)
        for number in (*range(BATCHES), *range(BATCHES)):
            step(number)
        if self.arguments.device != "cpu":
            return torch.cuda.max_memory_allocated()
        # Not getrusage: its mark is inherited from the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def record(self) -> dict[str, Any]:
        """All figures of this shape and stage."""
        sides = {name: make(self) for name, make in CONTESTANTS.items()}
        losses = {name: step(0) for name, step in sides.items()}
        if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
            raise AssertionError(f"the first losses are {losses}")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        names = list(sides)
        for number in range(self.arguments.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds[name].append(self.seconds(sides[name]))
        counts = [sum(one.num_supervised for one in step) for step in self.steps]
        tokens = [[len(one.input_ids) for one in step] for step in self.steps]
        padded = sum(max(step) * len(step) for step in tokens)
        peaks = {name: self.peak_elsewhere(name) for name in sides}
        return {
            "command": "python benchmarks/train.py " + " ".join(sys.argv[1:]),
            "machine": machine(),
            "conversations": BATCHES * self.arguments.batch,
            "tokens": sum(map(sum, tokens)),
            "padding_of_the_peer": 1 - sum(map(sum, tokens)) / padded,
            "supervised": sum(counts),
            "first_loss": losses,
            "sides": {
                name: {
                    "supervised_per_s": sum(counts) / statistics.median(times),
                    "seconds": times,
                    "pumice_is_faster_by": statistics.median(
                        other / own for own, other in zip(seconds["pumice"], times, strict=True)
                    ),
                    "peak_gib": peaks[name] / 2**30,
                    "peak_to_pumice": peaks[name] / peaks["pumice"],
                }
                for name, times in seconds.items()
            },
        }

    def seconds(self, step: Step) -> float:
        """How long both steps take."""
        start = self.clock()
        for number in range(BATCHES):
            step(number)
        if self.arguments.device != "cpu":
            torch.cuda.synchronize()
        return self.clock() - start

    def peak_elsewhere(self, name: str) -> int:
        """The peak of one side, in a process of its own."""
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


Step = Callable[[int], float]
CONTESTANTS: dict[str, Callable[[Bench], Step]] = {
    "pumice": lambda bench: bench.own(),
    "transformers_float32": lambda bench: bench.peer(torch.float32, autocast=False),
    "transformers_autocast": lambda bench: bench.peer(torch.float32, autocast=True),
    "transformers_bfloat16": lambda bench: bench.peer(torch.bfloat16, autocast=False),
}


def new_model(shape: Shape) -> LMM:
    """A LLaVA of this shape with random weights."""
    width, blocks, side, patch = shape.vision
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
        num_attention_heads=width // min(shape.head, 64), image_size=side, patch_size=patch,
    )  # fmt: skip
    width, blocks, inner, vocabulary = shape.language
    language = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=width // shape.head, num_key_value_heads=width // shape.head,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LMM.from_config(
        LMMConfig(
            vision=config_to_dict(vision), vision_layer=-2, vision_select="patch",
            connector="mlp2x_gelu", language=config_to_dict(language),
        )
    )  # fmt: skip


def conversation(lmm: LMM, rng: random.Random) -> Encoded:
    """One of drawn length; nine of ten show a picture near their beginning."""
    text = max(30, min(2000, int(rng.gauss(300, 250))))
    ids = [rng.randrange(3, lmm.language.vocab_size - 1) for _ in range(text)]
    image = rng.random() < 0.9
    labels = [IGNORE] * (text - int(0.6 * text)) + ids[text - int(0.6 * text) :]
    if image:
        marks = lmm.image_tokens
        ids[5:5] = [IMAGE_ID] * marks
        labels[5:5] = [IGNORE] * marks
    side = lmm.vision.image_size
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    pixels = torch.randn(int(image), 3, side, side, generator=generator)
    return Encoded(ids, labels, pixels, int(image), image_sizes=[(side, side)] * int(image))


def pack(step: list[Encoded], budget: int) -> list[Batch]:
    """The rows of a step as the loader makes them."""
    sizes = [Size(len(one.input_ids), one.num_images) for one in step]
    rows = pack_rows(sizes, Packing(max(budget, max(sizes).tokens)))
    return [collate_packed([step[place] for place in row], 0) for row in rows]


def trained_parts(align: bool) -> tuple[str, ...]:
    """Stage align trains the connector, stage tune the language model as well."""
    return ("connector",) if align else ("connector", "language")


def own_trainer(lmm: LMM, align: bool) -> Trainer:
    """The trainer of a run, whose step is measured as it is."""
    nowhere = Path()
    spec = StageSpec(
        name="train", vision=(nowhere,), vision_layer=-2, vision_select="patch",
        connector="mlp2x_gelu", language=nowhere, init=None, image_mode="pad",
        template="vicuna_v1", system="", final_template="vicuna_v1", final_system="",
        train=dict.fromkeys(trained_parts(align), RATE), data=(), steps=10**6, epochs=None,
        batch_size=1, warmup=0.0, schedule="constant", clip=CLIP,
    )  # fmt: skip
    # The steps are given by hand, so nothing is loaded.
    model = SharedModel(lmm)
    return Trainer(spec, model, cast("Any", None), nowhere, fingerprint="")


if __name__ == "__main__":
    main()
