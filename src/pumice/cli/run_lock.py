"""One run at a time in a directory: two would write their states and losses over each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pumice.core.errors import PumiceError
from pumice.core.processes import Processes


@contextmanager
def alone_in(out: Path, group: Processes, *, waits: bool) -> Iterator[None]:
    """While it lasts no other run works in `out`; one that does is waited for, or an error.

    The processes of `group` are one run. The system frees the lock when a run is killed; where its
    files have no locks, filelock says so and takes one of its own.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / "run.lock")

    def take() -> None:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=-1 if waits else 0)
        except Timeout as error:
            raise PumiceError(
                f"another run is at work in {out}. Wait until it has ended, stop it, or give "
                f"another --out."
            ) from error

    group.from_main(take)
    try:
        yield
    finally:
        lock.release()
