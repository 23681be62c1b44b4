"""A training on tar shards is killed (SIGKILL) at random moments: nothing is lost, nothing twice.

    OMP_NUM_THREADS=1 python benchmarks/kill_training.py --kills 20

A short stage of the pocket over WebDataset shards and a parquet file, with states saved every few
steps, by one process and by two that share the model (FSDP2). It is run once without a stop. Then
again, in processes that are killed at random moments and started anew until it is through; of two
one is killed in the middle, and the other must end by itself. Every process writes down the samples
of each step it computes. What must hold: of a step that was computed more than once the samples are
the same, the steps that count (the last of each number) have the samples of the run without a stop
in its order, metrics.jsonl has every step once with the same loss, and the weights are equal to
the bit. Writes benchmarks/results/kill_training.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import socket
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from measured import where, write

from pumice.core.distributed import rank
from pumice.core.processes import joined_processes
from pumice.core.shipped import resolve_backbone
from pumice.train import trainer
from pumice.train.stages import DataSpec, StageSpec, run_stage
from pumice.world.datasets import make_world

PER_SHARD, SAVE_EVERY, BATCH = 9, 4, 4
# Seconds in which a process notices that another one is gone.
PATIENCE = 60


def main() -> None:
    """Kill, compare, and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-record", action="store_true", help="only check")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        spec = stage(root, args.steps)
        for count in args.processes:
            whole, killed = root / f"whole-{count}", root / f"killed-{count}"
            finish(spec, whole, count)
            kills = kill_until_done(spec, killed, count, args.kills, args.seed)
            if kills < args.kills:
                raise SystemExit(f"only {kills} of {args.kills} kills hit: give more --steps")
            found[str(count)] = {"kills": kills, **compared(whole, killed, args.steps)}
    if not args.no_record:
        write("kill_training.json", where("kill_training.py") | {"processes": found})
    else:
        sys.stdout.write(json.dumps(found) + "\n")


def stage(root: Path, steps: int) -> StageSpec:
    """The stage, and the shards and the parquet file it reads."""
    make_world(root / "world", images=60, eval_images=1)
    rows = json.loads((root / "world/llava/pretrain.json").read_text())
    images = root / "world/images"
    (root / "shards").mkdir()
    for shard, first in enumerate(range(0, 45, PER_SHARD)):
        with tarfile.open(root / f"shards/{shard:03d}.tar", "w") as tar:
            for row in rows[first : first + PER_SHARD]:
                add(tar, f"{row['id']}.jpg", (images / row["image"]).read_bytes())
                add(tar, f"{row['id']}.json", json.dumps(row).encode())
    inside = [r | {"image": {"bytes": (images / r["image"]).read_bytes()}} for r in rows[45:]]
    table = pyarrow.Table.from_pylist(inside)
    pyarrow.parquet.write_table(table, root / "rows.parquet", row_group_size=4)
    return StageSpec(
        name="align",
        vision=(resolve_backbone("pocket-vision"),),
        vision_layer=-1,
        vision_select="patch",
        connector="linear",
        language=resolve_backbone("pocket-language"),
        init=None,
        image_mode="pad",
        template="plain",
        system="",
        final_template="vicuna_v1",
        final_system="",
        train={"connector": 5e-3},
        data=(
            DataSpec(path=root / "shards", images=None),
            DataSpec(path=root / "rows.parquet", images=None),
        ),
        steps=steps,
        epochs=None,
        batch_size=BATCH,
        max_tokens=512,
        workers=2,
        save_every=SAVE_EVERY,
    )


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member of a shard."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def run_writing_samples(spec: StageSpec, out: Path) -> None:
    """The stage, with the samples of every step appended to samples.K.jsonl once it is computed."""
    out.mkdir(exist_ok=True)
    file = (out / f"samples.{rank()}.jsonl").open("ab", buffering=0)
    computed = trainer.Trainer._step

    def step(self: Any, number: int, batches: Any) -> dict[str, Any]:
        row = computed(self, number, batches)
        ids = [name for batch in batches for name in batch.sample_ids]
        file.write(json.dumps({"step": number, "ids": ids}).encode() + b"\n")
        return row

    trainer.Trainer._step = step  # type: ignore[method-assign]
    with joined_processes() as group:
        run_stage(spec, out, group=group)


def started(spec: StageSpec, out: Path, count: int) -> list[int]:
    """Processes that run the stage together. Forked, so that they need not import torch again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [forked(spec, out, count, number, port) for number in range(count)]


def forked(spec: StageSpec, out: Path, count: int, number: int, port: int) -> int:
    """One of these processes; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stderr = (out.parent / "log").open("a")
        run_writing_samples(spec, out)
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(spec: StageSpec, out: Path, count: int) -> None:
    """The stage to its end, in processes of its own."""
    if any(os.waitpid(pid, 0)[1] for pid in started(spec, out, count)):
        raise SystemExit(f"the stage failed: {(out.parent / 'log').read_text()[-2000:]}")


def kill_until_done(spec: StageSpec, out: Path, count: int, kills: int, seed: int) -> int:
    """Kill that many processes, each at a random moment; gives how many were hit."""
    chance = random.Random(seed)
    for number in range(kills):
        pids = started(spec, out, count)
        begun = computed_steps(out)
        # Some while the model is built, the others some steps on: computing, saving, writing.
        wanted = 0 if number % 5 == 4 else chance.randint(1, 2 * SAVE_EVERY)
        while computed_steps(out) - begun < wanted:
            if os.waitpid(pids[0], os.WNOHANG)[0]:
                return number
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        # Before they have met, one cannot know that another is gone; torchrun does.
        for pid in [chance.choice(pids)] if wanted else pids:
            os.kill(pid, signal.SIGKILL)
        wait_for_all(pids)
    finish(spec, out, count)
    return kills


def wait_for_all(pids: list[int]) -> None:
    """The others end when one was killed, or this is the hang that must not be."""
    left, deadline = set(pids), time.monotonic() + PATIENCE
    while left:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"a process hung for {PATIENCE} s when another was killed")
        time.sleep(0.01)


def computed_steps(out: Path) -> int:
    """How many steps the main process has computed, with those before it was started again."""
    path = out / "samples.0.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compared(whole: Path, killed: Path, steps: int) -> dict[str, Any]:
    """Both runs beside each other; raises SystemExit at the first difference."""
    shares = sorted(file.name for file in whole.glob("samples.*.jsonl"))
    last: dict[int, list[str]] = {step: [] for step in range(steps)}
    times: Counter[int] = Counter()
    for share in shares:
        right = {row["step"]: row["ids"] for row in lines(whole / share)}
        computed = lines(killed / share)
        wrong = [row["step"] for row in computed if row["ids"] != right[row["step"]]]
        if wrong or sorted(right) != list(range(steps)):
            raise SystemExit(f"other samples in the steps {wrong}")
        kept = {row["step"]: row["ids"] for row in computed}
        if [kept.get(step) for step in range(steps)] != [right[step] for step in range(steps)]:
            raise SystemExit("the samples come in another order")
        for step, ids in kept.items():
            last[step] += ids
        times |= Counter(row["step"] for row in computed)
    for name in ("step", "loss"):
        one, other = ([r[name] for r in lines(f / "metrics.jsonl")] for f in (whole, killed))
        if one != other:
            raise SystemExit(f"metrics.jsonl has another {name}: {one} and {other}")
    weights = [(f / "align" / "model.safetensors").read_bytes() for f in (whole, killed)]
    if weights[0] != weights[1]:
        raise SystemExit("the weights differ")
    per_epoch = Counter(name for step in range(steps) for name in last[step])
    return {
        "steps": steps,
        "steps_computed_with_all_restarts": times.total(),
        "steps_computed_twice_or_more": sum(count > 1 for count in times.values()),
        "samples": len(per_epoch),
        "times_a_sample_was_seen": [min(per_epoch.values()), max(per_epoch.values())],
        "samples_of_every_step": "equal",
        "losses": "equal",
        "weights": "equal to the bit",
    }


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
