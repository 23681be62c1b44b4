"""Exact resume: everything a stopped stage needs to go on as if it had not been stopped.

A state holds the trained weights, the optimizer, the step and the random number generators; the
data needs no cursor, since a batch is a function of seed and step. States are written beside each
other, with a checksum; of two, the older one is the fallback for a damaged newer one.
"""

from __future__ import annotations

import io
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.files import sha256_bytes, write_atomic

log = logging.getLogger(__name__)
KEPT = 2


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, fingerprint: str
) -> Path:
    """Write the state after `step` steps; older states beyond the last two are removed."""
    content = {
        "step": step,
        "fingerprint": fingerprint,
        "weights": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "python_rng": _plain(random.getstate()),
        "numpy_rng": _plain(np.random.get_state()),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    path = folder / f"step_{step:08d}.pt"
    write_atomic(path, data)
    write_atomic(path.with_suffix(".sha256"), sha256_bytes(data))
    for old in sorted(folder.glob("step_*.pt"))[:-KEPT]:
        old.unlink()
        old.with_suffix(".sha256").unlink(missing_ok=True)
    return path


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str
) -> int:
    """Put the newest sound state into model and optimizer; gives its step (0: there is none)."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        data = path.read_bytes()
        checksum = path.with_suffix(".sha256")
        if not checksum.is_file() or checksum.read_text() != sha256_bytes(data):
            log.warning("%s is damaged and is passed over; trying the state before it", path)
            continue
        content = torch.load(io.BytesIO(data), weights_only=True)
        if content["fingerprint"] != fingerprint:
            raise PumiceError(
                f"{path} belongs to another recipe or other data than this stage's. Resuming needs "
                "the same recipe; give another --out directory, or --resume never to start over."
            )
        _restore(content, model, optimizer)
        return int(content["step"])
    return 0


def _restore(content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in content["weights"].items():
            parameters[name].copy_(tensor)
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["torch_rng"])
    random.setstate(_tuples(content["python_rng"]))
    name, keys, *rest = content["numpy_rng"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))


def _plain(value: Any) -> Any:
    """The state of a generator as lists and numbers, which load without running any code."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
