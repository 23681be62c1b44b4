"""A training step of pumice beside a transformers loop on identical weights.

    python benchmarks/train.py --shape mid --rounds 3
    python benchmarks/train.py --shape llava15-7b --device cuda --batch 32 --budget 16384
    python benchmarks/train.py --shape llava15-7b --scale 0.05 --rounds 1

Models and conversations are those of `train_model.py`, the sides those of `train_sides.py`. Each
side is a process of its own. On a CPU all run in turn, round by round, and a ratio is the median
over rounds; on a GPU each has it to itself. First losses must agree. Memory is the most that a
process held while steps ran, and (`step`) the same without what it held before there was a model:
interpreter, libraries and kernels, which are the same for all. MFU is by the FLOPs of
`train_cost.py`. Adds its record to benchmarks/results/train.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import train_cost
from measured import status
from speed import machine, rounded
from train_cost import Choice, Cost, this_accelerator
from train_model import SHAPES, Shape, conversation, new_model
from train_sides import SIDES, STAGES, Step, Task

from pumice.core.files import read_json, write_json
from pumice.core.memory import give_back_memory
from pumice.train.machines import Accelerator

RESULTS = Path(__file__).resolve().parent / "results" / "train.json"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Half of the bits of a bfloat16 loss; the two sides round at different places.
LOSS_TOLERANCE = 3e-2
# What LLaVA-1.5 gives each GPU.
BATCH = 16
# What other shape of the same stage is foretold from the MFU of this one.
PROJECTED = {"llava15-7b": "llava15-13b"}
_SMALLEST = Shape((64, 2, 28, 14), (64, 1, 64, 100))


def main() -> None:
    """Measure one shape and one stage, and add the record to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--scale", type=float, default=1.0, help="widths, depths: a trial run")
    parser.add_argument("--stage", choices=STAGES, default="tune")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=BATCH, help="conversations of a step")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--checkpointing", help="by default none on a CPU, on a GPU what fits")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="pumice is always among them")
    parser.add_argument("--steps", type=int, default=2, help="different ones in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help="measure it alone, print its figures, end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    if arguments.side:
        bench.work(arguments.side)
        return
    record = rounded(bench.record())
    known = read_json(arguments.out) if arguments.out.is_file() else {}
    write_json(arguments.out, {**known, bench.name: record})
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


class Bench:
    """The conversations of some steps, and the sides that train on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.on_gpu = arguments.device != "cpu"
        self.clock = CLOCKS["wall" if self.on_gpu or arguments.threads > 1 else "cpu"]
        shape = SHAPES[arguments.shape].scaled(arguments.scale)
        self.cost = Cost(shape, arguments.stage)
        rng = random.Random(0)
        steps = [
            [conversation(self.cost.lmm, rng) for _ in range(arguments.batch)]
            for _ in range(arguments.steps)
        ]
        policy = arguments.checkpointing or (self.choice.checkpointing if self.on_gpu else "none")
        self.task = Task(shape, arguments.stage, arguments.device, arguments.budget, policy, steps)

    @cached_property
    def accelerator(self) -> Accelerator:
        """What it is measured on."""
        return this_accelerator(self.arguments.device, self.clock)

    @cached_property
    def choice(self) -> Choice:
        """What of this stage fits there, by the plan."""
        return self.cost.choose(self.accelerator, self.arguments.batch, self.arguments.budget)

    @property
    def name(self) -> str:
        """Of the record."""
        a = self.arguments
        scale = "" if a.scale == 1 else f" x {a.scale:g}"
        batch = "" if a.batch == BATCH else f" batch {a.batch}"
        return f"{a.shape}{scale} {a.stage} {a.device}{batch}"

    @property
    def sides(self) -> list[str]:
        """Those that are measured."""
        # Inductor compiles for minutes on a CPU.
        usual = [name for name in SIDES if self.on_gpu or name != "pumice_compiled"]
        asked = self.arguments.sides or usual
        return [name for name in SIDES if name in asked or name == "pumice"]

    def work(self, name: str) -> None:
        """One side in a process of its own: what it holds, then a round for each line."""
        smallest = Task(_SMALLEST, self.task.stage, self.task.device, 64, "none", self._short())
        SIDES[name](smallest)(0)
        before = self._collected()
        try:
            step = SIDES[name](self.task)
            self._collected()
            tell({"first_loss": step(0), "before": before})
            for _ in sys.stdin:
                tell({"seconds": self.seconds(step), "peak": self._peak()})
                if not self.on_gpu:
                    # All sides are there at the same time, and one works.
                    give_back_memory()
        except torch.OutOfMemoryError as error:
            tell({"failed": str(error).splitlines()[0]})

    def _short(self) -> list[list[Any]]:
        """One short conversation: with it all code and kernels are there before any is measured."""
        lmm, rng = new_model(_SMALLEST), random.Random(1)
        return [
            [min((conversation(lmm, rng) for _ in range(20)), key=lambda one: len(one.input_ids))]
        ]

    def _collected(self) -> int:
        """Bytes held when nothing is there that is not needed; the peak counts from here."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_gpu else status("VmHWM")

    def measured(self) -> dict[str, dict[str, Any]]:
        """Each side's figures."""
        if self.on_gpu:
            return {n: one for name in self.sides for n, one in self._together([name]).items()}
        return self._together(self.sides)

    def _together(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Processes that wait for each other, one for each side, round by round."""
        command = [sys.executable, __file__, *sys.argv[1:], "--side"]
        workers, found = {}, {}
        for name in names:
            # One after the other: first steps at the same time may need more memory than there is.
            workers[name] = Worker([*command, name])
            found[name] = workers[name].answer() | {"seconds": []}
        for number in range(self.arguments.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if "failed" not in found[name]:
                    told = workers[name].answer("round")
                    found[name]["seconds"].append(told.pop("seconds", None))
                    found[name] |= told
        for worker in workers.values():
            worker.end()
        return found

    def seconds(self, step: Step) -> float:
        """How long all steps take."""
        start = self.clock()
        for number in range(self.arguments.steps):
            step(number)
        if self.on_gpu:
            torch.cuda.synchronize()
        return self.clock() - start

    def record(self) -> dict[str, Any]:
        """All figures of this shape and stage."""
        found = self.measured()
        losses = {name: one["first_loss"] for name, one in found.items() if "failed" not in one}
        if losses and max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
            raise AssertionError(f"the first losses are {losses}")
        steps = self.task.steps
        tokens = [[len(one.input_ids) for one in step] for step in steps]
        padded = sum(max(step) * len(step) for step in tokens)
        flops = sum(map(self.cost.flops, steps))
        own = found["pumice"]
        return {
            "command": " ".join(["python benchmarks/train.py", *_without(sys.argv[1:], "--out")]),
            "machine": machine(),
            "accelerator": self.accelerator.title,
            "accelerator_tflops": self.accelerator.flops / 1e12,
            "checkpointing": self.task.checkpointing,
            "plan": {
                "checkpointing": self.choice.checkpointing,
                "gib": self.choice.bytes / 2**30,
                "fits": self.choice.fits,
            },
            "conversations": sum(map(len, steps)),
            "tokens": sum(map(sum, tokens)),
            "padding_of_the_peer": 1 - sum(map(sum, tokens)) / padded,
            "supervised": sum(one.num_supervised for step in steps for one in step),
            "model_tflop": flops / 1e12,
            "flop_formula": " ".join(train_cost.__doc__.split("\n\n")[1].split()),
            "first_loss": losses,
            "sides": {name: self._figures(one, own, flops) for name, one in found.items()},
            **self._projected(own, flops),
        }

    def _figures(self, one: dict[str, Any], own: dict[str, Any], flops: int) -> dict[str, Any]:
        """One side's, beside pumice's own."""
        if "failed" in one or "failed" in own:
            return one
        times = one["seconds"]
        middle = statistics.median(times)
        steps = self.task.steps
        pairs = zip(own["seconds"], times, strict=True)
        return {
            "supervised_per_s": sum(c.num_supervised for s in steps for c in s) / middle,
            "conversations_per_s": sum(map(len, steps)) / middle,
            "mfu": flops / middle / self.accelerator.flops,
            "seconds": times,
            "pumice_is_faster_by": statistics.median(other / mine for mine, other in pairs),
            "peak_gib": one["peak"] / 2**30,
            "before_gib": one["before"] / 2**30,
            "peak_to_pumice": one["peak"] / own["peak"],
            "step_to_pumice": (one["peak"] - one["before"]) / (own["peak"] - own["before"]),
        }

    def _projected(self, own: dict[str, Any], flops: int) -> dict[str, Any]:
        """A larger shape at the same share of the peak, and what memory it is planned to take."""
        a = self.arguments
        if a.shape not in PROJECTED or "failed" in own:
            return {}
        other = PROJECTED[a.shape]
        cost = Cost(SHAPES[other].scaled(a.scale), a.stage)
        times = sum(map(cost.flops, self.task.steps)) / flops
        middle = statistics.median(own["seconds"]) * times
        choice = cost.choose(self.accelerator, a.batch, a.budget)
        return {
            "projected": {
                "shape": other,
                "from": "the MFU measured here; memory by the plan, for one accelerator",
                "conversations_per_s": sum(map(len, self.task.steps)) / middle,
                "checkpointing": choice.checkpointing,
                "gib": choice.bytes / 2**30,
                "fits": choice.fits,
            }
        }


class Worker:
    """A process that answers in lines of JSON."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self, asked: str = "") -> dict[str, Any]:
        """Its next line, after it was asked; an end before that is a failure as well."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if asked:
            self.process.stdin.write(asked + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            return {"failed": f"the process ended with {self.process.wait()}"}
        told: dict[str, Any] = json.loads(line)
        return told

    def end(self) -> None:
        """Nothing more is asked."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _without(words: list[str], option: str) -> list[str]:
    """A command line's words but for an option and its value: a record holds no path."""
    if option not in words:
        return words
    place = words.index(option)
    return words[:place] + words[place + 2 :]


def tell(figures: dict[str, Any]) -> None:
    """A line for the process that asked."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
