"""How a run is started: a process here, or a job of a Slurm cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pumice.core.errors import PumiceError
from pumice.study.runner import Job, Stopped

_TAIL = 2000
_SECONDS_TO_SAVE = 30.0


def command(job: Job) -> list[str]:
    """The `pumice run` of a job."""
    words = [sys.executable, "-m", "pumice", "run", str(job.recipe), "--out", str(job.out)]
    words += ["--store", str(job.stages)]
    if job.features is not None:
        words += ["--feature-cache", str(job.features), "--feature-cache-gb", f"{job.features_gb}"]
    return words


@dataclass(slots=True)
class LocalProcesses:
    """Processes on this machine, `threads` threads each."""

    threads: int
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _stopped: bool = False
    _changing: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, job: Job) -> str | None:
        """Runs a job to its end; its words go to the job's log."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        # Several runs that each take every core hold each other up.
        environment = {"OMP_NUM_THREADS": str(self.threads), **os.environ}
        with job.log.open("ab") as file:
            begin = file.tell()
            with self._changing:
                if self._stopped:
                    raise Stopped
                process = subprocess.Popen(
                    command(job),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    # Ctrl-C reaches this process alone, which stops the runs in order.
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        if self._stopped:
            raise Stopped
        return None if code == 0 else _reason(job.log, begin, code)

    def stop(self) -> None:
        """Ends what runs; each run saves its state first."""
        with self._changing:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()
        end = time.monotonic() + _SECONDS_TO_SAVE
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass(frozen=True, slots=True)
class SlurmJobs:
    """A job of a Slurm cluster for each run, through submitit; the store is on a shared disk."""

    folder: Path
    settings: dict[str, Any]
    cluster: str = "slurm"

    def __call__(self, job: Job) -> str | None:
        """Submits a run and waits for its end."""
        submitit = _submitit()
        executor = submitit.AutoExecutor(folder=str(self.folder / "%j"), cluster=self.cluster)
        executor.update_parameters(name=f"pumice-{job.key}", **self.settings)
        task = submitit.helpers.CommandFunction(command(job), verbose=False)
        submitted = executor.submit(task)
        try:
            submitted.result()
        except (
            submitit.core.utils.FailedJobError,
            submitit.core.utils.UncompletedJobError,
        ) as error:
            return f"job {submitted.job_id}: {str(error).strip()[-_TAIL:]}"
        return None

    def stop(self) -> None:
        """Leaves the jobs to the cluster: the study, run again, waits for them and goes on."""


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise PumiceError(
            "--launcher slurm needs the library submitit, which is not installed. Install it with "
            "`pip install 'pumice[slurm]'`, or leave --launcher out to run here."
        ) from error
    return submitit


def _reason(log: Path, begin: int, code: int) -> str:
    """What a run said last: its error, or the end of its log."""
    with log.open("rb") as file:
        file.seek(begin)
        said = "\n" + file.read().decode("utf-8", errors="replace").strip()
    # A refusal is the last "error: ..." block; anything else ends with a line that says it.
    refused = said.rpartition("\nerror: ")[2] if "\nerror: " in said else ""
    words = " ".join((refused or said.rpartition("\n")[2]).split())[:_TAIL]
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{words} ({ended})" if words else ended
