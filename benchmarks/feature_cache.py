"""What a feature cache saves: a picture's features computed, stored, and taken from disk.

    python benchmarks/feature_cache.py --threads 1 --rounds 5

CPU seconds of this process, so that a busy machine changes little; rounds take turns and the median
counts. Features must be equal to the bit, or there is no result. Two backbones: the shipped pocket
and one of the shape of CLIP-L/14-336 with random weights; then the pocket's align stage as a whole.
Writes benchmarks/results/feature_cache.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig

from pumice.core.shipped import resolve_backbone
from pumice.models.feature_cache import FeatureCache
from pumice.models.vision import VisionBackbone
from pumice.train.stages import DataSpec, StageSpec, run_stage
from pumice.world.datasets import make_world

RESULTS = Path(__file__).resolve().parent / "results" / "feature_cache.json"
POCKET_IMAGES, LARGE_IMAGES = 64, 2
WORLD_IMAGES, STEPS = 96, 24


def main() -> None:
    """Measure, and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        record = {
            "command": " ".join(["python", "benchmarks/feature_cache.py", *sys.argv[1:]]),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "threads": args.threads,
                "load": round(os.getloadavg()[0], 2),
                "torch": torch.__version__,
            },
            "clock": "cpu",
            "rounds": args.rounds,
            "encode": {
                "pocket": encoding(pocket(), root / "a", POCKET_IMAGES, args.rounds),
                "clip_large_336": encoding(large(), root / "b", LARGE_IMAGES, 1),
            },
            "align_stage": stage(root, args.rounds),
        }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(RESULTS.read_text())


def pocket() -> VisionBackbone:
    """The backbone of the pocket recipe."""
    backbone = VisionBackbone.from_folder(resolve_backbone("pocket-vision"), -1, "patch")
    assert isinstance(backbone, VisionBackbone)
    return backbone


def large() -> VisionBackbone:
    """The shape of LLaVA-1.5's."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return VisionBackbone(config, -2, "patch")


def encoding(
    vision: VisionBackbone, directory: Path, images: int, rounds: int
) -> dict[str, float | int]:
    """CPU milliseconds an image: computed, computed and stored, taken from the cache."""
    vision.requires_grad_(False).eval()
    pictures = torch.randn(images, 3, vision.image_size, vision.image_size)
    vision(pictures[:1])
    times: dict[str, list[float]] = {"computed": [], "stored": [], "cached": []}
    for number in range(rounds):
        vision.use_cache(None)
        wanted, seconds = timed(vision, pictures)
        times["computed"].append(seconds)
        vision.use_cache(FeatureCache(directory / str(number)))
        for name in ("stored", "cached"):
            features, seconds = timed(vision, pictures)
            times[name].append(seconds)
            if not torch.equal(features, wanted):
                raise SystemExit(f"{name} features differ from computed ones")
    size = sum(p.stat().st_size for p in (directory / "0").glob("*/*/*.safetensors"))
    middle = {name: statistics.median(found) / images * 1e3 for name, found in times.items()}
    return {
        "images": images,
        "bytes_per_image": size // images,
        **{f"{name}_ms": round(value, 3) for name, value in middle.items()},
        "speed_up": round(middle["computed"] / middle["cached"], 1),
    }


def timed(vision: VisionBackbone, pictures: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The features, in batches of 16, and their CPU seconds."""
    start = time.process_time()
    with torch.no_grad():
        features = torch.cat([vision(batch) for batch in pictures.split(16)])
    return features, time.process_time() - start


def stage(root: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds of a short align stage of the pocket, without a cache and with a filled one."""
    make_world(root / "world", images=WORLD_IMAGES, eval_images=1)
    data = DataSpec(path=root / "world/llava/pretrain.json", images=root / "world/images")
    spec = StageSpec(
        name="align",
        vision=(resolve_backbone("pocket-vision"),),
        vision_layer=-1,
        vision_select="patch",
        connector="mlp2x_gelu",
        language=resolve_backbone("pocket-language"),
        init=None,
        image_mode="pad",
        template="plain",
        system="",
        final_template="vicuna_v1",
        final_system="",
        train={"connector": 5e-3},
        data=(data,),
        steps=STEPS,
        epochs=None,
        batch_size=16,
        max_tokens=512,
    )
    cache = FeatureCache(root / "features")
    run_stage(spec, root / "fill", features=cache)
    times: dict[str, list[float]] = {"computed": [], "cached": []}
    weights = set()
    for number in range(rounds):
        for name, features in (("computed", None), ("cached", cache)):
            start = time.process_time()
            result = run_stage(spec, root / f"{name}{number}", features=features)
            times[name].append(time.process_time() - start)
            weights.add((result.checkpoint / "model.safetensors").read_bytes())
    if len(weights) != 1:
        raise SystemExit("the stage gives other weights with a cache than without")
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {
        "steps": STEPS,
        "batch_size": 16,
        **{f"{name}_s": round(value, 2) for name, value in middle.items()},
        "speed_up": round(middle["computed"] / middle["cached"], 2),
        "weights": "equal to the bit",
    }


if __name__ == "__main__":
    main()
