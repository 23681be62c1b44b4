"""Tiles encoded together against one at a time: image tokens per second, pocket-sized parts.

    python benchmarks/tiles.py --threads 1

Writes benchmarks/results/tiles.json. CPU seconds are counted, so that other work on the machine
does not decide; the two ways run in turn, and their features must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pumice.core.shipped import resolve_backbone
from pumice.models.lmm import LMM
from pumice.models.tiling import TilingSpec, merge_views, plan_image

RESULTS = Path(__file__).resolve().parent / "results" / "tiles.json"
# As the stages train where bfloat16 is native, and as the CPU answers.
TYPES = {"bfloat16 autocast": torch.bfloat16, "float32": torch.float32}
# The largest difference of two features that were computed together and alone.
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
# Upright photographs, square drawings and a banner; the sizes decide only the grids.
SIZES = ((640, 480), (480, 640), (192, 192), (640, 229), (300, 200), (1920, 1080))


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=12, help="images encoded together")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {
        f"tiles of {side} px, {name}": compare(
            pocket(side), arguments.images, arguments.rounds, kind
        )
        for side in (96, 48)
        for name, kind in TYPES.items()
    }
    record = {
        "command": f"python benchmarks/tiles.py --threads {arguments.threads}",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "torch": torch.__version__,
        },
        "protocol": "hd tiles and global view through vision backbone and connector, merged; "
        "CPU seconds, the best of the rounds, both ways in every round",
        "sizes": [f"{width} x {height}" for width, height in SIZES],
        "tiles": found,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def pocket(side: int) -> LMM:
    """The pocket backbones with hd tiles of `side`; the weights do not matter to the time."""
    vision, language = resolve_backbone("pocket-vision"), resolve_backbone("pocket-language")
    built = LMM.from_backbones(vision, language, "mlp2x_gelu", -1, "patch")
    config = replace(built.config, tiling=TilingSpec("hd", side).to_dict())
    return LMM.from_config(replace(config, vision={**config.vision, "image_size": side})).eval()


@torch.inference_mode()
def compare(lmm: LMM, images: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Both ways over the same views, multiplied in `dtype`."""
    assert lmm.tiling is not None
    sizes = [SIZES[number % len(SIZES)] for number in range(images)]
    tokens = lmm.image_tokens
    plans = [plan_image(size, lmm.tiling, lmm.view_side, tokens) for size in sizes]
    side = lmm.vision.image_size
    pixels = torch.randn(sum(plan.views for plan in plans), 3, side, side)

    mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    @mixed
    def together() -> list[torch.Tensor]:
        return list(lmm.encode_images(pixels, sizes))

    @mixed
    def one_by_one() -> list[torch.Tensor]:
        row_end = lmm.row_end
        assert row_end is not None
        views = [lmm.connector(lmm.vision(pixels[i : i + 1])) for i in range(len(pixels))]
        parts = torch.cat(views).split([plan.views for plan in plans])
        return [merge_views(part, plan, row_end) for part, plan in zip(parts, plans, strict=True)]

    ways = {"together": together, "one_by_one": one_by_one}
    for ours, theirs in zip(together(), one_by_one(), strict=True):
        assert (ours.float() - theirs.float()).abs().max() < TOLERANCE[dtype]
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            spent[name].append(seconds(way))
    total = sum(plan.tokens.total for plan in plans)
    ratios = [b / a for a, b in zip(spent["together"], spent["one_by_one"], strict=True)]
    # The best: what else runs on the machine only adds.
    best = {name: min(times) for name, times in spent.items()}
    return {
        "images": images,
        "views": len(pixels),
        "image_tokens": total,
        "tokens_per_second": {name: round(total / best[name]) for name in ways},
        "ratio": round(best["one_by_one"] / best["together"], 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def seconds(way: Callable[[], object]) -> float:
    """CPU seconds of one run."""
    start = time.process_time()
    way()
    return time.process_time() - start


if __name__ == "__main__":
    main()
