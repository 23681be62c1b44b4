"""The processes that torchrun started, as one group: sums, what the main one says, waiting.

All of it goes over gloo and through main memory, for one process at once and without torch. GPUs
exchange weights and gradients over NCCL in the same group, which `joined_processes` sets up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pumice.core.distributed import local_rank, local_world_size, rank, world_size
from pumice.core.errors import PumiceError

T = TypeVar("T")

# A process that has died is noticed at once. One that hangs is for who uses the group to notice,
# who knows what it is doing: a checkpoint of a large model may take longer than any fixed time.
_PATIENCE = timedelta(days=7)
_MEETING = timedelta(minutes=15)
# What gloo says when the other end of a connection is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among `size` that do the same work; one alone waits for nobody.

    Every method is called by all of them, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes the files of all."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each of the values, added up over all processes in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.float64)
        with self.others_there():
            dist.all_reduce(numbers)
        summed: list[float] = numbers.tolist()
        return summed

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives in the main process, in all; an error there is one everywhere."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        told: list[Any] = [None]
        error: PumiceError | None = None
        if self.is_main:
            # Any other exception ends this process, which the others notice.
            try:
                told = [(make(), None)]
            except PumiceError as caught:
                error, told = caught, [(None, str(caught))]

        with self.others_there():
            dist.broadcast_object_list(told, src=0)
        if error is not None:
            raise error
        value: T
        value, trouble = told[0]
        if trouble is not None:
            raise PumiceError(f"process 0 of {self.size} could not go on: {trouble}")
        return value

    def gather(self, value: T) -> list[T]:
        """The value of each process, in all of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self.others_there():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        self.sum(0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block is run by the main process and then by the others, who find what it made."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    @contextmanager
    def others_there(self) -> Iterator[None]:
        """Turns what the backend says of a process that is gone into an error for people."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(text in str(error) for text in _GONE):
                raise
            raise PumiceError(
                f"process {self.rank} of {self.size} cannot go on, because another one has ended. "
                f"Its own message says why; give the same command again to go on."
            ) from error


ALONE = Processes()


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes torchrun has started, connected while the block runs; or this one alone.

    Within such a block a second one uses the same connection.
    """
    if world_size() == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        yield Processes(rank(), world_size())
        return
    backend = "gloo"
    if torch.cuda.is_available():
        if local_world_size() > torch.cuda.device_count():
            raise PumiceError(
                f"{local_world_size()} processes were started on a machine with "
                f"{torch.cuda.device_count()} GPUs; one process a GPU at most. Start fewer with "
                f"--nproc-per-node."
            )
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    # Only to meet has a limit: a process that never came is noticed by nobody else.
    try:
        store, _, _ = next(rendezvous("env://", timeout=_MEETING))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise PumiceError(
            f"process {rank()} of {world_size()} has waited for the others for {_MEETING}, and not "
            f"all have come. Check that MASTER_ADDR and MASTER_PORT name a machine that all of "
            f"them reach, and their own messages."
        ) from error
    dist.init_process_group(
        backend, store=store, rank=rank(), world_size=world_size(), timeout=_PATIENCE
    )
    try:
        yield Processes(rank(), world_size())
    finally:
        dist.destroy_process_group()
