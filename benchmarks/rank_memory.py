"""Main memory of each process while a stage is built: one reads the weights, or every one does.

    OMP_NUM_THREADS=1 python benchmarks/rank_memory.py --processes 2

A checkpoint with random weights is written, and the given number of processes (gloo, CPU) build a
stage that trains all of the language model, up to the first step. Once as pumice does it: the main
process reads, and deals out a block at a time. And once with each process reading the whole model.
Writes benchmarks/results/rank_memory.json: what a process has held at most, and when the model is
shared out, beyond what it held before it began to build.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from measured import status, where, write

from pumice.core.distributed import rank
from pumice.core.processes import Processes, joined_processes
from pumice.core.shipped import resolve_backbone
from pumice.models.checkpoint import save_checkpoint
from pumice.models.lmm import LMM
from pumice.train import build, parallel, stages
from pumice.train.stages import DataSpec, StageSpec, run_stage
from pumice.world.datasets import make_world

MIB = 2**20
FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    """Both ways, and the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--part-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--all-read", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part_of is not None:
        part(args.part_of, all_read=args.all_read)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = checkpoint(root, args.width, args.layers)
        make_world(root / "world", images=16, eval_images=1)
        found = {
            name: together(root, args.processes, *more)
            for name, more in (("main_reads", ()), ("all_read", ("--all-read",)))
        }
    record = where("rank_memory.py") | {"model_mib": round(size / MIB), **found}
    write("rank_memory.json", record)


def checkpoint(root: Path, width: int, layers: int) -> int:
    """A language model of that size and a small vision backbone; gives the bytes of the weights."""
    from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

    made = resolve_backbone("pocket-language")
    words = len(json.loads((made / "tokenizer.json").read_text())["model"]["vocab"])
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    language = LlamaForCausalLM(
        LlamaConfig(vocab_size=max(words, 32000), num_attention_heads=8, **shape)
    )
    language.save_pretrained(root / "language")
    for name in FILES:
        (root / "language" / name).write_bytes((made / name).read_bytes())
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    vision = AutoModel.from_config(
        CLIPVisionConfig(image_size=32, patch_size=8, num_attention_heads=2, **small)
    )
    vision.save_pretrained(root / "vision")
    spec = stage(root)
    lmm = build.build_model(spec)[0]
    save_checkpoint(root / "first", lmm, build.build_processor(spec, lmm).save, {})
    return sum(4 * p.numel() for p in lmm.parameters())


def stage(root: Path, **changes: Any) -> StageSpec:
    """A stage over these files."""
    spec = StageSpec(
        name="tune", vision=(root / "vision",), vision_layer=-2, vision_select="patch",
        connector="mlp2x_gelu", language=root / "language", init=None, image_mode="pad",
        template="vicuna_v1", system="", final_template="vicuna_v1", final_system="",
        train={"connector": 1e-4, "language": 1e-4}, steps=1, epochs=None, batch_size=4,
        data=(DataSpec(path=root / "world/llava/instruct.json", images=root / "world/images"),),
    )  # fmt: skip
    return dataclasses.replace(spec, **changes)


def together(root: Path, processes: int, *more: str) -> list[dict[str, float]]:
    """What each of the processes held, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--part-of", str(root), *more]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)}
        )
        for number in range(processes)
    ]
    codes = [process.wait() for process in started]
    assert not any(codes), codes
    return [json.loads((root / f"held.{number}").read_text()) for number in range(processes)]


def part(root: Path, *, all_read: bool) -> None:
    """One of the processes."""
    begin, make = parallel.SharedModel.__init__, build.build_model
    first: list[int] = []

    def shared(self: parallel.SharedModel, lmm: LMM, *more: Any, **named: Any) -> None:
        begin(self, lmm, *more, **named)
        found = {
            "most_mib": round((status("VmHWM") - first[0]) / MIB),
            "shared_out_mib": round((status("VmRSS") - first[0]) / MIB),
        }
        (root / f"held.{rank()}").write_text(json.dumps(found))
        raise SystemExit(0)

    def read(spec: StageSpec, group: Processes) -> tuple[LMM, bool]:
        first.append(status("VmRSS"))
        return make(spec) if all_read else make(spec, group)

    reading = mock.patch.object(stages, "build_model", read)
    counting = mock.patch.object(parallel.SharedModel, "__init__", shared)
    with reading, counting, joined_processes() as group:
        run_stage(stage(root, init=root / "first"), root / f"out-{all_read}", group=group)


if __name__ == "__main__":
    main()
