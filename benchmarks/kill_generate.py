"""`pumice data generate` is killed at random moments: nothing is lost, nothing is paid twice.

    python benchmarks/kill_generate.py --kills 20

The scripted teacher answers slowly, and fails at times as endpoints do. The command is run once
without a stop. Then again, in processes that get SIGKILL and are started anew: most while they ask,
some while they start, and the last fifth when every reply is kept and files are made of them. What
must hold: no file is ever there in part, the files are those of the run without a stop to the byte,
and the endpoint was paid once for every image. Writes benchmarks/results/kill_generate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import where, write

from pumice.world.datasets import make_world
from pumice.world.teacher import FAULTS, Teacher, teaching

ENDS = ("", ".rejected.jsonl")


def main() -> None:
    """Kill, compare, and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="only check")
    args = parser.parse_args()
    faults = dict.fromkeys(set(FAULTS) - {"timeout"}, 0.03)
    teacher = Teacher(faults=faults, latency=0.05, retry_after=0.02)
    with tempfile.TemporaryDirectory() as folder, teaching(teacher) as url:
        root = Path(folder)
        make_world(root / "world", images=args.images, eval_images=1)
        finish(root, url, "whole")
        # What both runs ask is the same, and must be paid for anew.
        teacher.forget()
        found = kill_until_done(root, url, teacher, args.kills, args.seed)
    if teacher.stats()["paid"] != args.images:
        raise SystemExit(f"{teacher.stats()['paid']} calls were paid for {args.images} images")
    found |= {"images": args.images, "paid": args.images, "files": "equal to the byte"}
    if not args.no_record:
        write("kill_generate.json", where("kill_generate.py") | found)
    else:
        sys.stdout.write(json.dumps(found) + "\n")


def started(root: Path, url: str, name: str) -> subprocess.Popen[bytes]:
    """A process that generates to NAME.jsonl."""
    notes = root / "world" / "coco" / "annotations"
    words = ["data", "generate", "conversation", "--captions", notes / "captions_train2014.json"]
    words += ["--endpoint", url, "--out", root / f"{name}.jsonl", "--concurrency", "2"]
    with (root / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pumice", "-q", *map(str, words)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=log,
            stderr=log,
        )


def finish(root: Path, url: str, name: str) -> None:
    """A run to its end."""
    if started(root, url, name).wait():
        raise SystemExit(f"the command failed: {(root / 'log').read_text()[-2000:]}")


def kill_until_done(
    root: Path, url: str, teacher: Teacher, kills: int, seed: int
) -> dict[str, Any]:
    """Kill that many processes, each at a random moment, and compare what is there each time."""
    chance = random.Random(seed)
    replies = root / "killed.jsonl.replies.jsonl"
    at_the_end = max(kills // 5, 1)
    paid = []
    for number in range(kills):
        if number == kills - at_the_end:
            finish(root, url, "killed")
            compare(root)
            for end in ENDS:
                (root / f"killed.jsonl{end}").unlink()
        process, before = started(root, url, "killed"), size(replies)
        asks = number < kills - at_the_end and number % 4 < 3
        while asks and size(replies) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5 if asks else 1.5))
        process.kill()
        process.wait()
        compare(root, whole=False)
        paid.append(teacher.stats()["paid"])
    finish(root, url, "killed")
    compare(root)
    return {"kills": kills, "kills_with_all_replies_kept": at_the_end, "paid_after_each": paid}


def size(path: Path) -> int:
    """Bytes of a file; 0 without it."""
    return path.stat().st_size if path.exists() else 0


def compare(root: Path, *, whole: bool = True) -> None:
    """Both runs' files; unless they must be whole they may be missing, but not be others."""
    for end in ENDS:
        right, found = (root / f"{name}.jsonl{end}" for name in ("whole", "killed"))
        if not whole and not found.exists():
            continue
        if not found.exists() or found.read_bytes() != right.read_bytes():
            raise SystemExit(f"{found.name} is not as without a stop")


if __name__ == "__main__":
    main()
