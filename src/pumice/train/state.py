"""Exact resume: everything a stopped stage needs to go on as if it had not been stopped.

A state holds the trained weights, the optimizer, the step and the random number generators of each
process; the data needs no cursor, since a batch is a function of seed and step. It is a directory
of torch's distributed checkpoint format, which any number of processes can read. It is written
beside the training, under another name until it is whole, and with checksums; of two, the older
one is the fallback for a damaged newer one.
"""

from __future__ import annotations

import logging
import random
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from pumice.core.errors import PumiceError
from pumice.core.files import read_json, sha256_file, write_json
from pumice.core.processes import ALONE, Processes

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)
# One process alone is what was asked for; the warning comes from the thread that writes, where no
# filter can be set for a while.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
KEPT = 2
RECORD = "state.json"


class States:
    """The states of one stage, written and read by all its processes together."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        fingerprint: str,
        group: Processes = ALONE,
    ) -> None:
        self.folder, self.fingerprint, self.group = folder, fingerprint, group
        self.optimizer = optimizer
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._pending: tuple[int, Future[dict[str, str]]] | None = None
        # The writing exchanges plans while training exchanges gradients: it has its own channel.
        self._channel = dist.new_group(backend="gloo") if group.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pumice-state")

    def save(self, step: int) -> None:
        """Begins to write the state after `step` steps; first the one before it is finished."""
        self.finish()
        part = self._part(step)
        part.mkdir(parents=True, exist_ok=True)
        written = async_save(
            self._tensors(),
            storage_writer=FileSystemWriter(part),
            process_group=self._channel,
            no_dist=self._channel is None,
        )
        assert isinstance(written, Future)
        self._pending = step, self._thread.submit(self._hash_own, written, part, _generators())

    @property
    def settled(self) -> int:
        """1 when a state waits to be finished and this process has written its share, else 0."""
        return int(self._pending is not None and self._pending[1].done())

    def finish(self) -> None:
        """Gives a state that was begun its name, once all have written it; without one, nothing."""
        if self._pending is None:
            return
        step, hashing = self._pending
        self._pending = None
        trouble, hashes = "", {}
        try:
            hashes = hashing.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            trouble = f"process {self.group.rank}: {_cause(error)}"
        told = self.group.gather((trouble, hashes))
        if any(said for said, _ in told):
            raise PumiceError(
                f"the state after step {step} could not be written to {self.folder} "
                f"({'; '.join(said for said, _ in told if said)[:500]}). The states before it are "
                f"untouched. Check the disk, and give the same command again to go on."
            )
        self.group.from_main(
            lambda: self._name(step, {k: v for _, h in told for k, v in h.items()})
        )

    def load(self) -> int:
        """Puts the newest sound state into model and optimizer; gives its step (0: there is none).

        Any number of processes may have written it.
        """
        for path in self.group.from_main(self._found):
            record = self._sound(path)
            if record is None:
                log.warning("%s is damaged and is passed over; trying the state before it", path)
                continue
            if record["fingerprint"] != self.fingerprint:
                raise PumiceError(
                    f"{path} belongs to another recipe or other data than this stage's. Resuming "
                    "needs the same recipe; give another --out directory, or --resume never to "
                    "start over."
                )
            self._restore(path, record)
            return int(record["step"])
        return 0

    def discard(self) -> None:
        """Removes all states, by the end of a stage or before one that starts over."""
        if self._pending is not None:
            self._pending[1].exception()
            self._pending = None
        self.group.wait()
        if self.group.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.group.wait()

    def close(self) -> None:
        """No state is written any more."""
        self._thread.shutdown()

    def _part(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.part"

    def _hash_own(
        self, written: Future[Any], part: Path, generators: dict[str, Any]
    ) -> dict[str, str]:
        written.result()
        rank = self.group.rank
        torch.save(generators, part / _generator_file(rank))
        own = [*part.glob(f"__{rank}_*"), part / _generator_file(rank)]
        own += [part / ".metadata"] if self.group.is_main else []
        return {path.name: sha256_file(path) for path in own}

    def _name(self, step: int, hashes: Mapping[str, str]) -> None:
        part, path = self._part(step), self.folder / f"step_{step:08d}"
        write_json(
            part / RECORD,
            {"step": step, "fingerprint": self.fingerprint, "processes": self.group.size,
             "sha256": dict(sorted(hashes.items()))},
        )  # fmt: skip
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        for old in sorted(self.folder.glob("step_*"))[:-KEPT]:
            shutil.rmtree(old)

    def _found(self) -> list[Path]:
        for part in self.folder.glob(".step_*.part"):
            shutil.rmtree(part)
        return sorted(self.folder.glob("step_*"), reverse=True)

    def _sound(self, path: Path) -> dict[str, Any] | None:
        """What a state's record says; None when a file of it is not what was written."""
        record = self.group.from_main(lambda: _read_record(path))
        if record is None:
            return None
        files = list(record["sha256"].items())[self.group.rank :: self.group.size]
        bad = sum(not _is_whole(path / name, digest) for name, digest in files)
        return record if self.group.sum(bad) == [0] else None

    def _restore(self, path: Path, record: Mapping[str, Any]) -> None:
        load(
            self._tensors(),
            storage_reader=FileSystemReader(path),
            process_group=self._channel,
            no_dist=self._channel is None,
        )
        generators = path / _generator_file(self.group.rank)
        if generators.is_file():
            _set_generators(torch.load(generators, weights_only=True))
        if record["processes"] != self.group.size:
            log.info(
                "%s was written by %d processes and is read by %d: dropout, where there is any, "
                "draws other numbers from here on",
                path, record["processes"], self.group.size,
            )  # fmt: skip

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a state by their names, as they are: what is loaded goes into them."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            own = self.optimizer.state[parameter]
            if not own:
                # As AdamW makes them at its first step.
                own["step"] = torch.zeros((), device=parameter.device)
                own["exp_avg"] = torch.zeros_like(parameter)
                own["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in own.items()}
        return tensors


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record: Any = read_json(path / RECORD)
    except PumiceError:
        return None
    whole = isinstance(record, dict) and {"step", "fingerprint", "sha256", "processes"} <= set(
        record
    )
    return record if whole else None


def _cause(error: BaseException) -> str:
    """What went wrong, without the stack that torch's error carries for each process."""
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(dict.fromkeys(str(cause) for cause, _ in error.failures.values()))


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest


def _generator_file(rank: int) -> str:
    return f"generators.{rank}.pt"


def _generators() -> dict[str, Any]:
    """The state of every random number generator of this process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": _plain(random.getstate()),
        "numpy": _plain(np.random.get_state()),
    }


def _set_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(_tuples(states["python"]))
    name, keys, *rest = states["numpy"]
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
