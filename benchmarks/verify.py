"""`pumice data verify` on 10,000 rows and as many images of 336 px, with 100 planted defects.

    OMP_NUM_THREADS=1 python benchmarks/verify.py

The defects are those of tests/planted.py: every kind, broken rows, images and copies of all sorts.
All of them must be found with row and reason, and nothing else; otherwise there is no result. Then
the same with lengths counted, and how the perceptual lookup grows with the number of pictures.
Writes benchmarks/results/verify.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measured import where, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import planted as planting
from pumice.core.shipped import resolve_model
from pumice.data.findings import KINDS
from pumice.data.open_source import open_source
from pumice.data.picture_hash import PictureHash, same_pictures
from pumice.data.verify import VerifySpec, verify
from pumice.processing.processor import Processor

DEFECTS, SIDE, LOOKUPS = 100, 336, (50_000, 100_000, 200_000)


def main() -> None:
    """Plant, verify, compare, and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        planted = planting.plant(Path(folder) / "data", args.rows, DEFECTS, side=SIDE)
        result = verified(planted, args.workers)
    record = where("verify.py") | {"workers": args.workers, **result}
    record["lookup_of_pictures"] = {str(count): lookup(count) for count in LOOKUPS}
    write("verify.json", record)


def verified(planted: planting.Planted, workers: int) -> dict[str, Any]:
    """The measure, once every planted defect is found and nothing else."""
    source = open_source(planted.file, planted.images)
    processor = Processor.load(resolve_model("pocket"))
    spec = VerifySpec(
        evaluation=(planted.evaluation,),
        count_tokens=partial(processor.encode, max_tokens=512, pixels=False),
        max_tokens=512,
        workers=workers,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    report = verify(source, spec)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = {(finding.row, finding.kind) for finding in report.findings}
    if found != planted.expected:
        missed, false = planted.expected - found, found - planted.expected
        raise SystemExit(f"missed {sorted(missed)}, false alarms {sorted(false)}")
    return {
        "rows": report.rows,
        "images": report.images,
        "planted": len(planted.expected),
        "kinds": len({kind for _, kind in planted.expected}),
        "kinds_known": len(KINDS),
        "found": len(found & planted.expected),
        "false_alarms": len(found - planted.expected),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "images_per_second": round(report.images / wall),
    }


def lookup(count: int) -> float:
    """CPU seconds to find the one pair among so many pictures of random hashes."""
    generator = np.random.default_rng(count)
    bits = generator.integers(0, 2**63, (count, 2), dtype=np.uint64)
    bits[-1] = bits[0]
    start = time.process_time()
    pairs = same_pictures(
        PictureHash(bits, np.zeros((count, 8, 8, 3), np.uint8), np.zeros((count, 24, 24), np.uint8))
    )
    if pairs.tolist() != [[0, count - 1]]:
        raise SystemExit(f"found the pairs {pairs.tolist()}")
    return round(time.process_time() - start, 2)


if __name__ == "__main__":
    main()
