"""The loader beside transformers' LlavaProcessor, in threads and processes, and its memory.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 python benchmarks/loader.py --rounds 5 [--photos DIR]

* **images**: CPU milliseconds an image from the file to a padded batch of ids and pixels (decoded,
  padded to a square, resized to 336, normalised, tokenised), one thread, rounds in turn. The pixels
  must be equal to 1e-5. `floor` is what nobody can leave out who wants these pixels from Pillow:
  decoding, and Pillow's own bicubic filter. Our steps are timed alone as well: `decode`, `pixels`
  (padded, filtered, normalised), `text` (template and tokens), `batch` (one tensor of all). Several
  processes one after the other, because libjpeg's time depends on where its memory comes to lie.
* **workers**: the same work handed to threads and to processes, CPU and wall.
* **rows**: files of 10 thousand to a million rows: finding their places, opening them again, and
  the memory of a process that reads batches from them (rows only, without torch).

Writes benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from measured import where, write
from transformers import PreTrainedTokenizerFast
from transformers_llava import build_processor

from pumice.core.images import open_image
from pumice.core.memory import keep_freed_memory
from pumice.core.shipped import resolve_backbone
from pumice.core.types import Sample, assistant, user
from pumice.processing.collate import collate
from pumice.processing.images import ImageSpec, preprocess
from pumice.processing.processor import Processor

SIDE, PATCH, BATCH = 336, 14, 16
QUESTION = "Describe this image in detail."
ANSWER = "A person on a board rides down a slope while others watch from behind the fence. " * 4
PARTS = ("images", "workers", "rows")
ROWS = (10_000, 100_000, 1_000_000)
FILTER = PIL.Image.Resampling.BICUBIC


def main() -> None:
    """Measure, and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5, help="of each process")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--photos", type=Path, help="a directory of JPEG photographs")
    parser.add_argument("--tokenizer", type=Path, default=None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    record = where("loader.py")
    record |= {"clock": "cpu", "rounds": args.rounds, "processes": args.processes}
    record["transformers"] = transformers.__version__
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = args.tokenizer or resolve_backbone("pocket-language")
        sets = {"640x480": made_pictures(root / "made")}
        if args.photos:
            sets["photos"] = sorted(args.photos.glob("*.jpg"))[: BATCH * 5]
        if "images" in args.parts:
            record["images"] = {
                name: images(tokenizer, files, args.rounds, args.processes)
                for name, files in sets.items()
            }
        if "workers" in args.parts:
            record["workers"] = workers(tokenizer, sets["640x480"])
        if "rows" in args.parts:
            record["rows"] = [rows(count, root) for count in ROWS]
    write("loader.json", record)


def processor_of(tokenizer: Path) -> Processor:
    """LLaVA-1.5's image preparation: padded to 336, 576 image tokens."""
    read = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    return Processor(read, ImageSpec("pad", SIDE), "vicuna_v1", None, (SIDE // PATCH) ** 2)


def made_pictures(folder: Path, count: int = BATCH * 4) -> list[Path]:
    """JPEG files of 640 x 480 with broad shapes and grain: about as large as photographs."""
    folder.mkdir()
    files = []
    for number in range(count):
        generator = np.random.default_rng(number)
        patches = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        broad = np.asarray(PIL.Image.fromarray(patches).resize((640, 480), FILTER))
        grain = generator.integers(-10, 11, (480, 640, 1))
        picture = PIL.Image.fromarray((broad + grain).clip(0, 255).astype(np.uint8))
        files.append(folder / f"{number}.jpg")
        picture.save(files[-1], quality=88)
    return files


def images(tokenizer: Path, files: list[Path], rounds: int, processes: int) -> dict[str, Any]:
    """CPU milliseconds an image, ours and theirs, and where ours go."""
    files = files[: len(files) // BATCH * BATCH]
    found: dict[str, list[float]] = {}
    ratios = []
    for _ in range(processes):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            times, gap = pool.submit(times_of_a_process, tokenizer, files, rounds).result()
        ratios.append(ratio(times["LlavaProcessor"], times["pumice"]))
        for name, ms in times.items():
            found.setdefault(name, []).extend(ms)
    return {
        "images": len(files),
        "kilobytes_per_image": sum(file.stat().st_size for file in files) // len(files) // 1000,
        **{f"{name}_ms": round(statistics.median(ms), 2) for name, ms in found.items()},
        "images_per_second_and_core": round(1e3 / statistics.median(found["pumice"])),
        "ratio": ratio(found["LlavaProcessor"], found["pumice"]),
        "ratio_of_each_process": ratios,
        "largest_possible_ratio": ratio(found["LlavaProcessor"], found["floor"]),
        "largest_pixel_difference": gap,
    }


def ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over rounds."""
    return round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 2)


def times_of_a_process(
    tokenizer: Path, files: list[Path], rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Milliseconds an image of every round, and how far the pixels of both sides are apart."""
    torch.set_num_threads(1)
    # As training does; transformers' side has it too.
    keep_freed_memory()
    processor = processor_of(tokenizer)
    with tempfile.TemporaryDirectory() as checkpoint:
        processor.save(checkpoint)
        reference = build_processor(processor, Path(checkpoint), PATCH)
    if reference.tokenizer.pad_token is None:
        reference.tokenizer.pad_token = reference.tokenizer.eos_token
    text = f"{processor.template.system} USER: {reference.image_token}\n{QUESTION} ASSISTANT: "
    text += ANSWER + "</s>"
    batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]

    def ours() -> Iterator[torch.Tensor]:
        for batch in batches:
            yield batch_of(processor, batch).pixel_values

    def theirs() -> Iterator[torch.Tensor]:
        for batch in batches:
            images = [PIL.Image.open(file).convert("RGB") for file in batch]
            texts = [text] * len(batch)
            yield reference(images=images, text=texts, return_tensors="pt", padding=True)[
                "pixel_values"
            ]

    gap = max(float((a - b).abs().max()) for a, b in zip(ours(), theirs(), strict=True))
    if gap > 1e-5:
        raise SystemExit(f"the pixels differ by {gap}")
    ways: dict[str, Callable[[], object]] = {
        # A batch is given up before the next one is made, as in training.
        "pumice": lambda: deque(ours(), maxlen=0),
        "LlavaProcessor": lambda: deque(theirs(), maxlen=0),
        "floor": lambda: [floor(file) for file in files],
        **steps(processor, files),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(timed(way) / len(files) * 1e3)
    return found, gap


def steps(processor: Processor, files: list[Path]) -> dict[str, Callable[[], object]]:
    """What a batch is made by, each step on what the one before it made."""
    pictures = [open_image(file) for file in files]
    samples = samples_of(files)
    starts = range(0, len(files), BATCH)
    encoded = [processor.encode_batch(samples[start : start + BATCH]) for start in starts]
    return {
        "decode": lambda: [open_image(file).size for file in files],
        "pixels": lambda: [preprocess(picture, processor.image_spec).shape for picture in pictures],
        "text": lambda: [processor.encode(sample, pixels=False) for sample in samples],
        "batch": lambda: [collate(batch, processor.pad_id).lengths for batch in encoded],
    }


def samples_of(files: list[Path]) -> list[Sample]:
    """One question on each file."""
    return [Sample(file.name, (user(QUESTION, file), assistant(ANSWER))) for file in files]


def batch_of(processor: Processor, files: list[Path]) -> Any:
    """A training batch of one question on each file."""
    return collate(processor.encode_batch(samples_of(files)), processor.pad_id)


def floor(file: Path) -> PIL.Image.Image:
    """Decoding, and the two passes of Pillow's filter over what holds the picture."""
    with PIL.Image.open(file) as picture:
        picture.load()
        side = max(picture.size)
        narrow = picture.resize((SIDE * picture.width // side, picture.height), FILTER)
    return narrow.resize((narrow.width, SIDE * narrow.height // side), FILTER)


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


_PROCESSOR: Processor | None = None


def start_process(tokenizer: Path) -> None:
    """What every worker process holds."""
    global _PROCESSOR
    torch.set_num_threads(1)
    keep_freed_memory()
    _PROCESSOR = processor_of(tokenizer)


def work_of_a_process(files: list[Path]) -> Any:
    """A batch made in another process and sent here."""
    assert _PROCESSOR is not None
    return batch_of(_PROCESSOR, files)


def workers(tokenizer: Path, files: list[Path]) -> dict[str, Any]:
    """The same batches from two threads and from two processes."""
    batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)] * 3
    count = len(batches) * BATCH
    found: dict[str, Any] = {}
    start_process(tokenizer)
    pools: dict[str, Any] = {
        "threads": ThreadPoolExecutor(2),
        "processes": ProcessPoolExecutor(
            2, multiprocessing.get_context("spawn"), start_process, (tokenizer,)
        ),
    }
    for name, pool in pools.items():
        list(pool.map(work_of_a_process, batches[:2]))
        before, wall = cpu_seconds(pool), time.perf_counter()
        for batch in pool.map(work_of_a_process, batches):
            assert batch.pixel_values.shape[0] == BATCH
        found[name] = {
            "wall_ms": round((time.perf_counter() - wall) / count * 1e3, 2),
            "cpu_ms": round((cpu_seconds(pool) - before) / count * 1e3, 2),
        }
        pool.shutdown()
    return found


def cpu_seconds(pool: Any) -> float:
    """Of this process and of the pool's."""
    total = time.process_time()
    tick = os.sysconf("SC_CLK_TCK")
    for pid in getattr(pool, "_processes", None) or {}:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


READ = """
import json, sys, time
from pumice.core.memory import peak_memory_bytes
start = time.perf_counter()
from pumice.data.loader import Loader
from pumice.data.mixture import Mixture, Part
from pumice.data.sources import LlavaJson
imported = time.perf_counter()
source = LlavaJson(sys.argv[1], "images")
opened = time.perf_counter()

class Plain:
    image_tokens, pad_id = 576, 0
    def encode_batch(self, samples, max_tokens=None): return [sample.id for sample in samples]

loader = Loader(Mixture([Part(source)], 0), Plain(), 128, 0, workers=int(sys.argv[2]),
                collate=lambda rows, pad: rows)
seen = sum(len(batch) for batch in loader.iterate(0, 60))
print(json.dumps({
    "open_s": round(opened - imported, 3),
    "first_60_batches_s": round(time.perf_counter() - opened, 3),
    "peak_megabytes": peak_memory_bytes() // 2**20,
}))
"""


def rows(count: int, root: Path) -> dict[str, Any]:
    """A JSONL file of `count` rows, read by processes of their own."""
    path = root / f"{count}.jsonl"
    with path.open("w") as file:
        for number in range(count):
            turns = [("human", f"<image>\n{QUESTION}"), ("gpt", ANSWER)]
            row = {"id": f"{number:09d}", "image": f"train/{number:012d}.jpg"}
            said = [{"from": who, "value": value} for who, value in turns]
            file.write(json.dumps(row | {"conversations": said}) + "\n")
    env = os.environ | {"PUMICE_CACHE": str(root / "cache")}

    def read(threads: int) -> dict[str, Any]:
        command = [sys.executable, "-c", READ, str(path), str(threads)]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    first = read(0)
    record = {
        "rows": count,
        "megabytes": path.stat().st_size // 10**6,
        "finding_places_s": first["open_s"],
        "again": read(0),
        "again_with_8_threads": read(8),
    }
    path.unlink()
    return record


if __name__ == "__main__":
    main()
