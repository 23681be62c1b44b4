"""The training loop: batches in, weights moved, metrics and states written.

One loss rule: the sum of the cross entropy over the supervised tokens of a step, divided by their
number, however many micro-batches and processes it is computed in.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from pumice.core.errors import PumiceError
from pumice.core.files import write_json
from pumice.core.interrupts import ctrl_c_ends
from pumice.core.memory import keep_freed_memory, peak_memory_bytes
from pumice.core.progress import Progress, progress
from pumice.train.optim import build_optimizer, learning_rate_factor, set_learning_rates
from pumice.train.parallel import SharedModel, whole_tensor
from pumice.train.run_log import Following, RunLog
from pumice.train.state import States
from pumice.train.validation import warning
from pumice.train.watchdog import Watchdog

if TYPE_CHECKING:
    from pumice.data.loader import Loader
    from pumice.processing.collate import Batch
    from pumice.train.stages import StageSpec
    from pumice.train.validation import Validator

log = logging.getLogger(__name__)
# So many steps say what a loss usually is.
_USUAL = 50
_NOT_FINITE = "both must be finite."
_SPIKE = (
    "the loss is more than {times:g} times {usual:.3g}, the mean of the {steps} steps before. The "
    "same command goes on from the last state and comes to this step again: `spike` may change."
)


class Trainer:
    """Runs the steps of one stage, in each of the processes that share it."""

    def __init__(
        self,
        spec: StageSpec,
        model: SharedModel,
        loader: Loader,
        out: Path,
        *,
        fingerprint: str,
        validator: Validator | None = None,
        following: Following | None = None,
    ) -> None:
        self.spec, self.lmm, self.loader, self.out = spec, model.lmm, loader, out
        self.group = model.group
        # What a step and the pictures for it take is taken again by the next.
        keep_freed_memory()
        self.device = self.lmm.device
        self.total = spec.steps or math.ceil((spec.epochs or 1) * loader.steps_per_epoch)
        self.trained = [p for p in self.lmm.parameters() if p.requires_grad]
        parts = {name: self.lmm.part(name) for name in spec.train}
        self.optimizer = build_optimizer(parts, spec.train, spec.weight_decay)
        folder = out / f"{spec.name}.states"
        self.states = States(folder, self.lmm, self.optimizer, fingerprint, self.group)
        self.autocast = model.half
        self.validator = validator
        self.following = following or Following()
        self.record: dict[str, Any] = {}
        """For training.json: the last look at the held-out rows, where the loss left its band."""
        self.supervised = 0
        self.losses: list[float] = []
        self.seconds_before = 0.0
        """What those steps took that a run which was stopped has done."""
        self._stop = False

    def run(self, *, resume: bool) -> dict[str, Any]:
        """All steps that are left; gives the figures of `StageResult`."""
        begun = time.monotonic()
        if not resume:
            self.states.discard()
        start = self.states.load()
        if start:
            log.info("stage %s goes on after step %d", self.spec.name, start)
        previous = _on_signals(self._ask_to_stop)
        try:
            with (
                self.group.others_there(),
                self._run_log(start) as rows,
                progress(self.total - start, self.spec.name) as bar,
            ):
                self._steps(start, rows, bar)
                self.record |= {} if rows is None else rows.summary()
        finally:
            self.states.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        last = self.losses[-_USUAL:]
        return {
            "steps": self.total,
            "seconds": self.seconds_before + time.monotonic() - begun,
            "final_loss": sum(last) / len(last) if last else math.nan,
            "supervised_tokens": self.supervised,
            "resumed_from": start,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _run_log(self, start: int) -> AbstractContextManager[RunLog | None]:
        """What the main process writes; a stage that goes on counts on, in all processes."""
        made: list[RunLog] = []

        def begin() -> tuple[list[float], int, float]:
            made.append(RunLog(self.out, self.spec, start, self.following))
            rows = made[0].earlier
            losses = [row["loss"] for row in rows]
            supervised = sum(row["supervised"] for row in rows)
            return losses, supervised, sum(row["seconds"] for row in rows)

        self.losses, self.supervised, self.seconds_before = self.group.from_main(begin)
        return closing(made[0]) if made else nullcontext()

    def discard_states(self) -> None:
        """After the checkpoint is safe, the states have done their work."""
        self.states.discard()

    def _steps(self, start: int, rows: RunLog | None, bar: Progress) -> None:
        steps = iter(self.loader.iterate(start, self.total - start))
        record = self.out / f"{self.spec.name}.stuck.rank-{self.group.rank}.json"
        with Watchdog(
            self.spec.watchdog_minutes, self.spec.name, self.group.rank, record
        ) as watchdog:
            clock = time.monotonic()
            for step in range(start, self.total):
                watchdog.at(step, "reading data", self._rows_of(step))
                batches = next(steps)
                waited = time.monotonic() - clock
                watchdog.at(step, "computing, or waiting for another process", _ids_of(batches))
                try:
                    row = self._step(step, batches)
                except torch.OutOfMemoryError as error:
                    raise self._out_of_memory(step, batches) from error
                if self.validator is not None and self.validator.due(step + 1, self.total):
                    watchdog.at(step, "validating", self.validator.names)
                    row["validation"] = self._validate(self.validator, step + 1)
                now = time.monotonic()
                row |= {"seconds": round(now - clock, 4), "data_seconds": round(waited, 4)}
                clock = now
                if rows is not None:
                    rows.write(row)
                bar.update(1, loss=row["loss"])
                self._keep(step + 1)

    def _validate(self, validator: Validator, done: int) -> dict[str, Any]:
        figures = validator(self.lmm, done, self.total, self.spec.warmup, self.autocast)
        self.record["validation"] = {"step": done, **figures}
        if figures["image_not_used"] and self.group.is_main:
            log.warning(warning(self.spec.name, figures))
        return figures

    def _keep(self, done: int) -> None:
        """Saves what must be saved after so many steps, and stops where a process was asked to."""
        # All decide alike, whatever happened to each of them in the meantime.
        stop, settled = self.group.sum(self._stop, self.states.settled)
        if settled == self.group.size:
            self.states.finish()
        if stop or (done % self.spec.save_every == 0 and done < self.total):
            self.states.save(done)
        if stop:
            self.states.finish()
            told = (
                f"stopped after step {done} of stage {self.spec.name}; its state is saved in "
                f"{self.states.folder}: give the same command again to go on"
            )
            raise SystemExit(told if self.group.is_main else 1)

    def _step(self, step: int, batches: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step over its micro-batches; gives the row for metrics.jsonl."""
        factor = learning_rate_factor(step, self.total, self.spec.warmup, self.spec.schedule)
        rates = set_learning_rates(self.optimizer, factor)
        (count,) = self.group.sum(sum(batch.num_supervised for batch in batches))
        own = sum(self._backward(batch.to(self.device), count) for batch in batches)
        read = sum(int(batch.lengths.sum()) for batch in batches)
        value, tokens = self.group.sum(own, read)
        size = self._clip()
        if not (math.isfinite(value) and math.isfinite(size)):
            raise self._bad_step(step, batches, value, size, "not_finite", _NOT_FINITE)
        usual = sum(self.losses[-_USUAL:]) / _USUAL
        if self.spec.spike and len(self.losses) >= _USUAL and value > self.spec.spike * usual:
            words = _SPIKE.format(times=self.spec.spike, usual=usual, steps=_USUAL)
            raise self._bad_step(step, batches, value, size, "spike", words)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.supervised += int(count)
        self.losses.append(value)
        return {
            "stage": self.spec.name, "step": step + 1, "loss": value, "grad_norm": size,
            "lr": rates, "tokens": int(tokens), "supervised": int(count),
        }  # fmt: skip

    def _backward(self, batch: Batch, count: float) -> float:
        """Adds a micro-batch's part of the gradient of a step of `count` supervised tokens."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss_sum, _ = self.lmm.loss(batch)
        loss = loss_sum / count
        # Text alone does not depend on a connector, if nothing else learns.
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _clip(self) -> float:
        """Clips the gradients, of all processes together; gives their norm before that."""
        for parameter in self.trained:
            if parameter.grad is None:
                # What a step does not depend on has the gradient zero, in however many pieces the
                # step was computed; the optimizer would pass None over.
                parameter.grad = torch.zeros_like(parameter)
        clip = math.inf if self.spec.clip is None else self.spec.clip
        return float(whole_tensor(torch.nn.utils.clip_grad_norm_(self.trained, clip)))

    def _bad_step(
        self, step: int, batches: Sequence[Batch], loss: float, norm: float, kind: str, words: str
    ) -> PumiceError:
        """No weight has moved by this step; its samples are kept, and all processes stop."""
        path = self.out / f"{self.spec.name}.{kind}.json"
        names = [name for own in self.group.gather(_ids_of(batches)()) for name in own]
        if self.group.is_main:
            write_json(path, {"step": step + 1, "loss": str(loss), "gradient_norm": str(norm),
                              "samples": names})  # fmt: skip
        return PumiceError(
            f"stage {self.spec.name!r} stopped at step {step + 1}: loss {loss}, gradient norm "
            f"{norm}; {words} The samples of this step are listed in {path}; look at them, or "
            f"lower the learning rate."
        )

    def _out_of_memory(self, step: int, batches: Sequence[Batch]) -> PumiceError:
        names = _ids_of(batches)()
        shapes = ", ".join(
            f"{batch.input_ids.shape[0]} x {batch.input_ids.shape[1]} tokens with "
            f"{len(batch.pixel_values)} views"
            for batch in batches[:4]
        )
        return PumiceError(
            f"stage {self.spec.name!r} ran out of memory at step {step + 1}, whose "
            f"{len(batches)} pieces are {shapes} (samples {', '.join(names[:8])}). Set "
            f"checkpointing to blocks, or a smaller micro_batch_size or packing.tokens (pumice "
            f"plan says what fits), and give the same command again: checkpointing may change in "
            f"a run that goes on from its last saved state."
        )

    def _rows_of(self, step: int) -> Callable[[], list[str]]:
        """Names the rows of a step that are still being read, as errors about a row do."""
        parts = self.loader.mixture.parts
        return lambda: [
            parts[source].source.place(row) for source, row in self.loader.rows_at(step)
        ]

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # Whoever presses it again does not want to wait.
            signal.signal(number, signal.default_int_handler)
            log.warning("the step is ended and its state saved; Ctrl-C again stops without that")
        self._stop = True


def _ids_of(batches: Sequence[Batch]) -> Callable[[], list[str]]:
    return lambda: [name for batch in batches for name in batch.sample_ids]


def _on_signals(handler: Any) -> dict[signal.Signals, Any]:
    """Handle SIGTERM and Ctrl-C for a while; gives the handlers before that.

    Only in the main thread, and Ctrl-C only where it would end the program: a shell lets jobs in
    the background ignore it, and an application may have a use of its own for it.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    asking = [signal.SIGTERM]
    if ctrl_c_ends():
        asking.append(signal.SIGINT)
    former = {number: signal.signal(number, handler) for number in asking}
    # None is a handler that Python did not set, and cannot set again.
    return {number: one for number, one in former.items() if one is not None}
