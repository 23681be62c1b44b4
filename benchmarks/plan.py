"""What `pumice plan` predicts of a step's memory beside what a process measures.

    python benchmarks/plan.py

Each case is one training step of pumice (forward, backward, AdamW) in a process of its own, on the
CPU: the peak of its resident memory, less what it held before the model was built. The prediction
is weights, optimizer states and the simulated step. glibc is told to give every freed block back:
what its heap otherwise keeps between blocks is no need of the step, and came to 4 to 54 % more at
the mid size. Writes results/plan.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import torch
from measured import status, where, write
from train_model import SHAPES, Encoded, Shape, new_model, pack
from train_sides import own_trainer

from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.costs import Trained
from pumice.models.packed_attention import NAME, attend_to_documents
from pumice.models.recompute import checkpoint_blocks
from pumice.models.simulate import Setting, Work, step_memory
from pumice.processing.collate import collate
from pumice.train import trainer as training
from pumice.train.adapters import set_trained
from pumice.train.parallel import mixed_precision_pays

# Shape, rows, tokens of each, packed, checkpointing.
CASES = (
    ("pocket", 16, 400, False, "none"),
    ("pocket", 16, 400, True, "none"),
    ("mid", 4, 700, False, "none"),
    ("mid", 4, 700, False, "blocks"),
    ("mid", 4, 700, True, "none"),
    ("mid", 8, 700, True, "blocks"),
)
_WEIGHT, _STATES = 4, 8
_LEARNT = 0.4
_GIVEN_BACK = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def main() -> None:
    """Predict and measure every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=int, help="run one case, print its bytes, and end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # What training keeps for its next step lies in the way of what the step needs.
    training.keep_freed_memory = lambda: None
    if arguments.measure is not None:
        sys.stdout.write(f"{measured(*CASES[arguments.measure])}\n")
        return
    rows = []
    for number, case in enumerate(CASES):
        command = [sys.executable, __file__, "--measure", str(number)]
        environment = os.environ | dict.fromkeys(_GIVEN_BACK, "65536")
        told = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout
        found, expected = int(told), predicted(*case)
        names = ("shape", "rows", "tokens", "packed", "checkpointing")
        rows.append(
            dict(zip(names, case, strict=True))
            | {
                "predicted_mib": round(expected / 2**20, 1),
                "measured_mib": round(found / 2**20, 1),
                "measured_to_predicted": round(found / expected, 3),
            }
        )
    ratios = [row["measured_to_predicted"] for row in rows]
    band = {"least": min(ratios), "most": max(ratios)}
    write("plan.json", {**where("plan.py"), "band": band, "cases": rows})


def predicted(name: str, rows: int, tokens: int, packed: bool, policy: str) -> int:
    """Bytes of weights, optimizer states and the step."""
    lmm = new_model(SHAPES[name])
    learnt = round(_LEARNT * tokens) * rows
    documents = (tokens,) * rows if packed else None
    shape = (1, rows * tokens) if packed else (rows, tokens)
    work = Work(*shape, rows, rows * lmm.image_tokens, learnt, documents)
    setting = Setting(
        Trained(vision=False, connector=True, language=True), mixed_precision_pays(),
        NAME if packed else "eager", checkpointing=policy,
    )  # fmt: skip
    vision = sum(parameter.numel() for parameter in lmm.vision.parameters())
    everything = sum(parameter.numel() for parameter in lmm.parameters())
    return (
        _WEIGHT * everything
        + _STATES * (everything - vision)
        + step_memory(lmm.config, work, setting).peak
    )


def measured(name: str, rows: int, tokens: int, packed: bool, policy: str) -> int:
    """Bytes by which the peak of this process grew over two steps."""
    warm_up(packed)
    before = status("VmRSS")
    lmm = new_model(SHAPES[name])
    for part in ("vision", "connector", "language"):
        set_trained(lmm, part, part != "vision")
    if packed:
        attend_to_documents(lmm.language)
    checkpoint_blocks(lmm, policy)
    trainer = own_trainer(lmm, "tune")
    talks = [conversation(lmm, tokens, seed) for seed in range(rows)]
    batches = pack(talks, rows * tokens) if packed else [collate(talks, 0)]
    for _ in range(2):
        trainer._step(1, batches)
    return status("VmHWM") - before


def warm_up(packed: bool) -> None:
    """One step of a model of no size, so that code and kernels are there already."""
    lmm = new_model(Shape((64, 2, 28, 14), (64, 1, 64, 100)))
    if packed:
        attend_to_documents(lmm.language)
    set_trained(lmm, "vision", False)
    talks = [conversation(lmm, 20, 0)]
    own_trainer(lmm, "tune")._step(1, pack(talks, 20) if packed else [collate(talks, 0)])


def conversation(lmm: Any, tokens: int, seed: int) -> Encoded:
    """One of so many tokens, with a picture at its beginning; the end is learnt."""
    torch.manual_seed(seed)
    words = torch.randint(3, lmm.language.vocab_size - 1, (tokens - lmm.image_tokens,)).tolist()
    learnt, side = round(_LEARNT * tokens), lmm.vision.image_size
    labels = [IGNORE] * (tokens - learnt) + words[-learnt:]
    pixels = torch.randn(1, 3, side, side)
    ids = [IMAGE_ID] * lmm.image_tokens + words
    return Encoded(ids, labels, pixels, 1, image_sizes=[(side, side)])


if __name__ == "__main__":
    main()
