"""What a run measures about itself: metrics.jsonl, and the hash of each part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pumice.core.files import read_jsonl, write_atomic

METRICS = "metrics.jsonl"


def keep_until(path: Path, stage: str, step: int) -> None:
    """Drop the rows of `stage` from `step` on: a resumed run writes them again."""
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    rows = list(read_jsonl(path, allow_cut_tail=True))
    kept = [lines[n - 1] for n, row in rows if row["stage"] != stage or row["step"] <= step]
    write_atomic(path, "".join(kept))


def stage_rows(path: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage in a metrics.jsonl, none where there is no such file."""
    if not path.is_file():
        return []
    return [row for _, row in read_jsonl(path, allow_cut_tail=True) if row["stage"] == stage]


def part_hash(part: nn.Module) -> str:
    """A hash of all weights of a part, to show which parts a stage moved."""
    return tensors_hash(part.named_parameters())


@torch.no_grad()
def tensors_hash(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()
