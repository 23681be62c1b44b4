"""The shelf of benchmarks: one file each, and one line in the table below."""

from pumice.core.registry import Registry
from pumice.eval.benchmark import Benchmark
from pumice.eval.benchmarks.detail import Detail
from pumice.eval.benchmarks.gqa import GQA
from pumice.eval.benchmarks.llava_wild import LlavaWild
from pumice.eval.benchmarks.mmbench import MMBench, MMBenchCN
from pumice.eval.benchmarks.mme import MME
from pumice.eval.benchmarks.mmvet import MMVet
from pumice.eval.benchmarks.pope import Pope
from pumice.eval.benchmarks.refcoco import RefCoco
from pumice.eval.benchmarks.scienceqa import ScienceQA
from pumice.eval.benchmarks.seed_bench import SeedBench
from pumice.eval.benchmarks.textvqa import TextVQA
from pumice.eval.benchmarks.vizwiz import VizWiz
from pumice.eval.benchmarks.vqav2 import VQAv2
from pumice.eval.benchmarks.xgqa import XGQA

BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark",
    {
        "vqav2": VQAv2(),
        "gqa": GQA(),
        "xgqa": XGQA(),
        "vizwiz": VizWiz(),
        "scienceqa": ScienceQA(),
        "textvqa": TextVQA(),
        "pope": Pope(),
        "mme": MME(),
        "mmbench": MMBench(),
        "mmbench_cn": MMBenchCN(),
        "seed_bench": SeedBench(),
        "llava_wild": LlavaWild(),
        "mmvet": MMVet(),
        "refcoco": RefCoco(),
        "detail": Detail(),
    },
)
