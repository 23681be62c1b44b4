"""Steps recorded as CUDA graphs: a few hundred small kernels are started as one.

By its bytes a step of a 7B model in bfloat16 takes some 3 ms on an H200, and to start its kernels
from Python, one after the other, takes longer than that.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch

from pumice.infer.slots import Replay

_Left = TypeVar("_Left")
# One recording at a time in a process: torch waits for the GPU before each, which another forbids.
_RECORDING = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph, where it leaves its logits, and the step, which holds what the graph reads."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    step: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        # The next step, of whatever shape, may use the same memory.
        return self.logits.clone()


class CudaGraphs:
    """Records steps on one GPU; what they use between beginning and end lies in one pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._kept: torch.cuda.CUDAGraph | None = None

    def record(self, step: Callable[[], torch.Tensor]) -> Replay:
        """A step that has run once -> the same, which reads its inputs where they lie now.

        Raises RuntimeError for what cannot be recorded.
        """
        if self._kept is None:
            # A pool whose last recording is gone may not be used again, and each time the slots
            # grow all recordings go. This one stays: of nothing, of which torch warns.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._kept = self._graph(lambda: None)[0]
        graph, logits = self._graph(step)
        return _Recorded(graph, logits, step)

    def _graph(self, step: Callable[[], _Left]) -> tuple[torch.cuda.CUDAGraph, _Left]:
        """What is recorded of a step, and what it gave back."""
        graph = torch.cuda.CUDAGraph()
        # Other threads prepare images meanwhile, and may use the GPU.
        recording = torch.cuda.graph(
            graph, self._pool, self._stream, capture_error_mode="thread_local"
        )
        # The stream twice: torch.cuda.graph leaves it only where nothing fails.
        with _RECORDING, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            try:
                with recording:
                    left = step()
            except RuntimeError as error:
                self._abandon()
                # What failed first says more than that a recording could not be ended.
                first = error.__context__
                raise first if isinstance(first, RuntimeError) else error from None
        return graph, left

    def _abandon(self) -> None:
        """What torch leaves undone when a recording fails: memory would be its for ever."""
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
