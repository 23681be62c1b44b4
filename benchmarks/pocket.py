"""The pocket recipe, several seeds: scores, controls, answer lengths, time and memory.

    python benchmarks/pocket.py --out runs/bench --seeds 0 1 2

Writes benchmarks/results/pocket.json. Finished runs in --out are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pumice
from pumice.eval.benchmarks import BENCHMARKS
from pumice.processing.response_formats import SHORT

RESULTS = Path(__file__).resolve().parent / "results" / "pocket.json"
QUESTIONS_WITHOUT_FORMAT = 300


def main() -> None:
    """Run every seed that is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--note", default="", help="what a reader of the results must know")
    arguments = parser.parse_args()
    runs = {
        str(seed): one_seed(arguments.recipe, seed, arguments.out, arguments.overrides)
        for seed in arguments.seeds
    }
    record = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "command": " ".join(
            ["python benchmarks/pocket.py --out runs/bench --seeds", *map(str, arguments.seeds)]
            + (["--set", *arguments.overrides] if arguments.overrides else [])
        ),
        "machine": machine(),
        "note": arguments.note,
        "protocol": "held-out scenes, greedy, n as stated; shuffled = each question with the image "
        "of another scene; length in words",
        "mean": average(list(runs.values())),
        "seeds": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def one_seed(recipe: str, seed: int, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and judge one seed (unless it is there) and collect its figures."""
    folder = out / f"seed{seed}"
    timing = folder / "timing.json"
    if not timing.is_file():
        start = time.monotonic()
        command = ["run", recipe, f"seed={seed}", f"data={out / 'data'}", *overrides]
        subprocess.run([sys.executable, "-m", "pumice", *command, "--out", str(folder)], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cost = {
            "wall_seconds": round(time.monotonic() - start, 1),
            "peak_memory_gib": round(used.ru_maxrss / 2**20, 2),
        }
        timing.write_text(json.dumps(cost))
    scores = json.loads((folder / "scores.json").read_text())["benchmarks"]
    return {
        **json.loads(timing.read_text()),
        "pope": {
            name: {key: row[key] for key in ("f1", "accuracy", "yes_ratio", "n")}
            for name, row in scores["pope"]["by_category"].items()
        },
        "vqa": vqa_figures(scores["vqav2"], out / "data"),
        **{
            name: {"metrics": scores[name]["metrics"], "n": scores[name]["n"],
                   "base_rate": scores[name]["base_rate"],
                   "shuffled": scores[name]["shuffled"]["metrics"]}
            for name in ("scienceqa", "refcoco", "detail")
        },
        "answer_words": {
            "with_format_prompt": scores["vqav2"]["metrics"]["answer_words"],
            "without": words_without_format(folder / "tune", out / "data"),
        },
    }  # fmt: skip


def vqa_figures(scores: dict[str, Any], data: Path) -> dict[str, Any]:
    """Accuracy per kind of question beside its base rate and the shuffled images."""
    base = base_rates(data)
    kinds = {
        kind: {
            "accuracy": row["accuracy"],
            "base_rate": base[kind],
            "shuffled": scores["shuffled"]["by_category"][kind]["accuracy"],
            "n": row["n"],
        }
        for kind, row in sorted(scores["by_category"].items())
        if "=" not in kind
    }
    return {
        "accuracy": scores["metrics"]["accuracy"],
        "mean_over_kinds": scores["metrics"]["mean_over_question_types"],
        "interval": scores["interval"]["accuracy"],
        "base_rate": scores["base_rate"],
        "shuffled": scores["shuffled"]["metrics"]["accuracy"],
        "kinds": kinds,
        "n": scores["n"],
    }


def base_rates(data: Path) -> dict[str, float]:
    """Share of the most frequent answer per kind of question, in percent."""
    answers: dict[str, Counter[str]] = {}
    for item in BENCHMARKS["vqav2"].load(data):
        answers.setdefault(item.category, Counter())[item.truth[0]] += 1
    return {
        kind: round(100 * counts.most_common(1)[0][1] / counts.total(), 2)
        for kind, counts in answers.items()
    }


def words_without_format(checkpoint: Path, data: Path) -> float:
    """Mean length of the answers when the response-format prompt is left out."""
    model = pumice.load(checkpoint)
    items = BENCHMARKS["vqav2"].load(data)[::10][:QUESTIONS_WITHOUT_FORMAT]
    requests = [
        pumice.Request((pumice.user(item.prompt.removesuffix("\n" + SHORT), item.image),))
        for item in items
    ]
    lengths = [len(result.text.split()) for result in model.generate(requests)]
    return round(statistics.mean(lengths), 2)


def average(runs: list[Any]) -> Any:
    """Mean of every number over the seeds, in the shape of one seed's figures."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: average([run[key] for run in runs]) for key in first}
    if isinstance(first, list):
        return [average(list(column)) for column in zip(*runs, strict=True)]
    return round(statistics.mean(runs), 3) if isinstance(first, int | float) else first


if __name__ == "__main__":
    main()
