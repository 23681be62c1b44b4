"""Recordings on a GPU, with what stands in for torch's: how its pools and its streams behave.

As torch's own sources say (CUDAGraph.cpp, CachingHostAllocator.h, cuda/graphs.py): a pool whose
last graph is gone cannot be taken again, and a recording that fails leaves its stream and its pool
open.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pumice.infer.cuda_graphs import CudaGraphs


class Driver:
    """What torch knows of one GPU."""

    def __init__(self) -> None:
        self.uses: dict[object, int] = {}
        self.open: list[object] = []
        self.stream: object = "default"

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def end(self, _device: int, pool: object) -> None:
        if pool not in self.open:
            raise RuntimeError("not currently recording to mempool_id")
        self.open.remove(pool)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()

    class Graph:
        pool: object = None

        def replay(self) -> None:
            pass

        def __del__(self) -> None:
            if self.pool is not None:
                driver.uses[self.pool] -= 1

    class Recording:
        def __init__(self, graph: Graph, pool: object, stream: object, **_more: str) -> None:
            self.graph, self.pool, self.stream = graph, pool, stream

        def __enter__(self) -> None:
            self.before, driver.stream = driver.stream, self.stream
            if driver.uses.get(self.pool) == 0:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            driver.uses[self.pool] = driver.uses.get(self.pool, 0) + 1
            driver.open.append(self.pool)

        def __exit__(self, kind: object, *_what: object) -> None:
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            driver.open.remove(self.pool)
            self.graph.pool = self.pool
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)
            driver.stream = self.before

    fakes: dict[str, Any] = {
        "CUDAGraph": Graph,
        "graph": Recording,
        "graph_pool_handle": object,
        "Stream": lambda _device: "side",
        "stream": driver.on,
        "device": lambda _device: driver.on(driver.stream),
        "current_device": lambda: 0,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", driver.end, raising=False)
    return driver


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_when_all_recordings_are_gone_more_can_be_made(driver: Driver) -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    for _ in range(3):
        replay = graphs.record(lambda: torch.ones(2))
        assert replay().tolist() == [1, 1]
        del replay
    assert driver.stream == "default" and not driver.open


def test_a_recording_that_fails_leaves_nothing_behind(driver: Driver) -> None:
    def step() -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = CudaGraphs(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphs.record(step)
    assert driver.stream == "default" and not driver.open
