"""FLOPs of the steps of `train.py`, what its accelerator can do at most, and what fits on it.

FLOPs are those of matrix products, 2 for a multiplication and addition, of the positions there are:
no padding, nothing computed twice. Vision forward; connector and language model forward, as much
again for the gradient of a part's inputs where something below it learns, and as much again for
that of its weights where they learn. Attention counts its whole square inside a conversation, the
output head only supervised positions. Adapters count as linear layers of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from step_cost import gemm_gflops
from train_model import (
    LONGEST,
    MEAN,
    SPREAD,
    TEXT_ONLY,
    Shape,
    model_config,
)
from train_sides import LORA

from pumice.models.costs import (
    Counts,
    Trained,
    adapter_size,
    blank_model,
    connector_parameters,
    image_costs,
    language_flops,
    num_parameters,
    training_flops,
)
from pumice.processing.encoded import Encoded
from pumice.train.machines import ACCELERATORS, Accelerator, Machine
from pumice.train.plan import Lengths, Planner, StageSetting

# From the cheapest on; the first that fits is taken.
POLICIES = ("none", "every_4", "every_3", "every_2", "blocks")


@dataclass(frozen=True)
class Choice:
    """What of a stage fits on an accelerator, by the plan."""

    checkpointing: str
    bytes: int
    """Of memory, as if each row were full."""
    fits: bool


class Cost:
    """FLOPs and memory of one shape and stage; no weight is made."""

    def __init__(self, shape: Shape, stage: str) -> None:
        self.stage = stage
        self.lmm = blank_model(model_config(shape))
        side = self.lmm.vision.image_size
        (self.image,) = image_costs(self.lmm, [(side, side)])
        self.adapters = adapter_size(self.lmm, LORA.r, None) if stage == "lora" else 0
        self.learns = Trained(
            vision=False, connector=True, language=stage != "align", adapters=stage == "lora"
        )

    def flops(self, step: list[Encoded]) -> int:
        """Of all conversations of a step, forward and backward."""
        return sum(map(self._flops, step))

    def _flops(self, one: Encoded) -> int:
        positions, shown = len(one.input_ids), one.num_images
        unheard = 2 * self.lmm.language.hidden_size * self.lmm.language.vocab_size
        language = language_flops(self.lmm, positions)
        language -= unheard * (positions - one.num_supervised)
        counts = Counts(
            self.image.vision_flops * shown, self.image.connector_flops * shown, 0, language
        )
        return training_flops(counts, self.learns) + 3 * 2 * self.adapters * positions

    def choose(self, accelerator: Accelerator, batch: int, budget: int) -> Choice:
        """The cheapest checkpointing that fits, or that of the least memory where none does."""
        planner, machine = Planner(self.lmm, self.image), Machine(1, accelerator)
        lengths = Lengths(MEAN, SPREAD, TEXT_ONLY)
        for policy in POLICIES:
            setting = self._setting(policy, batch, budget)
            plan = planner.stage(setting, machine, lengths, 0.5)
            if plan.fits:
                break
        return Choice(policy, plan.memory.total, plan.fits)

    def _setting(self, policy: str, batch: int, budget: int) -> StageSetting:
        trained = connector_parameters(self.lmm) + self.adapters
        if self.stage == "tune":
            trained += num_parameters(self.lmm.language)
        return StageSetting(
            name=self.stage, learns=self.learns, trained=trained, batch_size=batch,
            micro_batch_size=None, row_tokens=budget,
            max_tokens=min(budget, LONGEST + self.image.tokens), group_by_length=False,
            group_by_modality=False, checkpointing=policy,
            lora=LORA if self.stage == "lora" else None,
        )  # fmt: skip


def this_accelerator(device: str, clock: Callable[[], float]) -> Accelerator:
    """The GPU's published figures, or those of a CPU as a matrix product measures them."""
    if device != "cpu":
        return _published(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1])
    peak = 1e9 * max(gemm_gflops(dtype, clock) for dtype in (torch.float32, torch.bfloat16))
    threads = torch.get_num_threads()
    title = f"{threads} CPU thread(s), by a product of side 1024"
    return Accelerator(title, peak, _free_memory(), bandwidth=2e10 * threads, link=1e10)


def _published(name: str, memory: int) -> Accelerator:
    """By the words of the driver's name; the longest title that is in it."""
    plain = name.lower().replace("-", " ")
    every = [ACCELERATORS[key] for key in ACCELERATORS]
    known = [
        each
        for each in every
        if all(word in plain for word in each.title.lower().replace("-", " ").split())
    ]
    if not known:
        raise SystemExit(
            f"no published figures of {name!r} are known here, so MFU cannot be given; known: "
            f"{', '.join(each.title for each in every)}. Add a line to "
            f"src/pumice/train/machines.py."
        )
    best = max(known, key=lambda each: len(each.title))
    return Accelerator(best.title, best.flops, memory, best.bandwidth, best.link)


def _free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
