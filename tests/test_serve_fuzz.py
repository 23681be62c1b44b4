"""The server under requests that nobody would send: a short form of benchmarks/fuzz_serve.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pumice.infer.model import load
from pumice.serve.limits import Limits
from serving import Running

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("fuzz_serve", BENCHMARKS / "fuzz_serve.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "fuzz_serve", module)
        spec.loader.exec_module(module)
        return module


def test_no_request_is_a_fault_of_the_server(fuzz: ModuleType) -> None:
    running = Running(load("pocket", max_batch=4), Limits(max_new_tokens=4, drain_seconds=1.0))
    try:
        found = fuzz.fuzz_requests(running.url, 60)
        images = fuzz.fuzz_images(running.url, 150)
        fuzz.check_alive(running.url)
    finally:
        running.stop()
    # Both kinds must have come, or the fuzz has seen only one side of the checks.
    assert {"200", "400"} <= set(found["POST /v1/chat/completions"]) & set(images)
