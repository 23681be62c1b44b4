"""Steps recorded as CUDA graphs: a few hundred small kernels are started as one.

By its bytes a step of a 7B model in bfloat16 takes some 3 ms on an H200, and to start its kernels
from Python, one after the other, takes longer than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pumice.infer.slots import Replay


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

    def record(self, step: Callable[[], torch.Tensor]) -> Replay:
        """A step that has run once -> the same, which reads its inputs where they lie now.

        Raises RuntimeError for what cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads prepare images meanwhile, and may use the GPU.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            logits = step()
        return _Recorded(graph, logits, step)
