"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from pumice.core.errors import PumiceError

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The share of the peak rate at `step` of `total`: linear warm-up, then the schedule to zero.

    The warm-up takes ceil(warmup * total) steps as in LLaVA's runs (Hugging Face's rule, by which
    the first step has rate zero), but never all of them.
    """
    warm = min(math.ceil(warmup * total), total - 1)
    if step < warm:
        return step / max(1, warm)
    done = (step - warm) / max(1, total - warm)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1 - done
    if schedule == "constant":
        return 1.0
    raise PumiceError(
        f"schedule {schedule!r} is unknown; known: {', '.join(SCHEDULES)}. Correct the recipe."
    )


def build_optimizer(
    parts: dict[str, nn.Module], rates: dict[str, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with one learning rate per part; biases and norms are not decayed, as in LLaVA."""
    groups = []
    for part, rate in rates.items():
        named = [(n, p) for n, p in parts[part].named_parameters() if p.requires_grad]
        decayed = [parameter for name, parameter in named if _is_decayed(name, parameter)]
        plain = [parameter for name, parameter in named if not _is_decayed(name, parameter)]
        for parameters, decay in ((decayed, weight_decay), (plain, 0.0)):
            if parameters:
                groups.append(
                    {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay,
                     "part": part}
                )  # fmt: skip
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Put every group at `factor` of its peak rate; gives the rate per part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def _is_decayed(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith("bias")
