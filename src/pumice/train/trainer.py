"""The training loop: batches in, weights moved, metrics and states written.

One loss rule: the sum of the cross entropy over the supervised tokens of a step, divided by their
number, however many micro-batches it is computed in.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from pumice.core.errors import PumiceError
from pumice.core.files import JsonlWriter, write_json
from pumice.core.progress import Progress, progress
from pumice.train.metrics import keep_until, peak_memory_bytes
from pumice.train.optim import build_optimizer, learning_rate_factor, set_learning_rates
from pumice.train.state import load_state, save_state

if TYPE_CHECKING:
    from pumice.data.loader import Loader
    from pumice.models.lmm import LMM
    from pumice.processing.collate import Batch
    from pumice.train.stages import StageSpec

log = logging.getLogger(__name__)


def mixed_precision_pays() -> bool:
    """True where bfloat16 is native: the GPU, or a CPU with AVX512-BF16. Elsewhere it is slower."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


class Trainer:
    """Runs the steps of one stage."""

    def __init__(
        self, spec: StageSpec, lmm: LMM, loader: Loader, out: Path, *, fingerprint: str
    ) -> None:
        self.spec, self.lmm, self.loader, self.out = spec, lmm, loader, out
        self.fingerprint = fingerprint
        self.device = lmm.device
        self.states = out / f"{spec.name}.states"
        self.total = spec.steps or math.ceil((spec.epochs or 1) * loader.steps_per_epoch)
        self.trained = [p for p in lmm.parameters() if p.requires_grad]
        parts = {name: lmm.part(name) for name in spec.train}
        self.optimizer = build_optimizer(parts, spec.train, spec.weight_decay)
        self.autocast = mixed_precision_pays()
        self.supervised = 0
        self.losses: list[float] = []
        self._stop = False

    def run(self, *, resume: bool) -> dict[str, Any]:
        """All steps that are left; gives the figures of `StageResult`."""
        if not resume:
            shutil.rmtree(self.states, ignore_errors=True)
        start = load_state(self.states, self.lmm, self.optimizer, self.fingerprint)
        if start:
            log.info("stage %s goes on after step %d", self.spec.name, start)
        metrics = self.out / "metrics.jsonl"
        keep_until(metrics, self.spec.name, start)
        previous = _on_sigterm(self._ask_to_stop)
        try:
            with (
                JsonlWriter(metrics) as writer,
                progress(self.total - start, self.spec.name) as bar,
            ):
                self._steps(start, writer, bar)
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        last = self.losses[-50:]
        return {
            "steps": self.total,
            "final_loss": sum(last) / len(last) if last else math.nan,
            "supervised_tokens": self.supervised,
            "resumed_from": start,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def discard_states(self) -> None:
        """After the checkpoint is safe, the states have done their work."""
        shutil.rmtree(self.states, ignore_errors=True)

    def _steps(self, start: int, writer: JsonlWriter, bar: Progress) -> None:
        steps = self.loader.iterate(start, self.total - start)
        clock = time.monotonic()
        for step, batches in enumerate(steps, start=start):
            waited = time.monotonic() - clock
            row = self._step(step, batches)
            now = time.monotonic()
            row |= {"seconds": round(now - clock, 4), "data_seconds": round(waited, 4)}
            clock = now
            writer.write(row)
            bar.update(1, loss=row["loss"])
            done = step + 1
            if self._stop or (done % self.spec.save_every == 0 and done < self.total):
                save_state(self.states, self.lmm, self.optimizer, done, self.fingerprint)
            if self._stop:
                raise SystemExit(
                    f"stopped after step {done} of stage {self.spec.name}; its state is saved in "
                    f"{self.states}: give the same command again to go on"
                )

    def _step(self, step: int, batches: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step over its micro-batches; gives the row for metrics.jsonl."""
        factor = learning_rate_factor(step, self.total, self.spec.warmup, self.spec.schedule)
        rates = set_learning_rates(self.optimizer, factor)
        count = sum(batch.num_supervised for batch in batches)
        value = sum(self._backward(batch.to(self.device), count) for batch in batches)
        clip = math.inf if self.spec.clip is None else self.spec.clip
        norm = torch.nn.utils.clip_grad_norm_(self.trained, clip)
        size = float(norm)
        if not (math.isfinite(value) and math.isfinite(size)):
            raise self._not_finite(step, batches, value, size)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.supervised += count
        self.losses.append(value)
        return {
            "stage": self.spec.name, "step": step + 1, "loss": value, "grad_norm": size,
            "lr": rates, "tokens": sum(int(batch.lengths.sum()) for batch in batches),
            "supervised": count,
        }  # fmt: skip

    def _backward(self, batch: Batch, count: int) -> float:
        """Adds a micro-batch's part of the gradient of a step of `count` supervised tokens."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss_sum, _ = self.lmm.loss(batch)
        loss = loss_sum / count
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _not_finite(
        self, step: int, batches: Sequence[Batch], loss: float, norm: float
    ) -> PumiceError:
        path = self.out / f"{self.spec.name}.not_finite.json"
        names = [name for batch in batches for name in batch.sample_ids]
        write_json(path, {"step": step + 1, "loss": str(loss), "gradient_norm": str(norm),
                          "samples": names})  # fmt: skip
        return PumiceError(
            f"stage {self.spec.name!r} stopped at step {step + 1}: loss {loss}, gradient norm "
            f"{norm}; both must be finite. The samples of this step are listed in {path}; look at "
            "them, or lower the learning rate."
        )

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True


def _on_sigterm(handler: Any) -> Any:
    """Handle SIGTERM for a while; gives the handler before it (None outside the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler)
