"""The shelf of benchmarks: one file each, and one line in the table below."""

from pumice.core.registry import Registry
from pumice.eval.benchmark import Benchmark
from pumice.eval.benchmarks.detail import Detail
from pumice.eval.benchmarks.pope import Pope
from pumice.eval.benchmarks.refcoco import RefCoco
from pumice.eval.benchmarks.scienceqa import ScienceQA
from pumice.eval.benchmarks.vqav2 import VQAv2

BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark",
    {
        "vqav2": VQAv2(),
        "pope": Pope(),
        "scienceqa": ScienceQA(),
        "refcoco": RefCoco(),
        "detail": Detail(),
    },
)
