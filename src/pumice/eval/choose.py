"""Which benchmarks a user means: names, "all", and the options of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from pumice.core.errors import PumiceError
from pumice.eval.benchmark import Benchmark
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.scores import Scores
from pumice.eval.submit import SERVERS

ALL = "all"
# What the field calls some of them beside their own name.
_OTHER_NAMES = {
    "seed": "seed_bench", "seedbench": "seed_bench", "sqa": "scienceqa", "mm_vet": "mmvet",
    "llava_bench": "llava_wild", "llavabench": "llava_wild", "llava_w": "llava_wild",
    "llava_bench_in_the_wild": "llava_wild",
}  # fmt: skip


def choose_benchmarks(names: Iterable[str], options: Sequence[str] = ()) -> list[Benchmark]:
    """The benchmarks of these names, each once; "all" names the whole shelf.

    `options` are "BENCH.NAME=VALUE", or "NAME=VALUE" when one benchmark is chosen. An unknown name
    or value is an error that lists the known ones.
    """
    wanted = [name.strip() for name in names if name.strip()]
    if ALL in wanted:
        wanted = list(BENCHMARKS.names())
    if not wanted:
        raise PumiceError(
            f"no benchmark was named; known: {', '.join(BENCHMARKS.names())}. Name one or more, "
            f"with commas between them, or {ALL}."
        )
    chosen = list(dict.fromkeys(_known_name(name) for name in wanted))
    settings = _settings(options, chosen)
    return [BENCHMARKS[name].with_options(settings[name]) for name in chosen]


def choose_benchmark(name: str, options: Sequence[str] = (), *, server: bool = False) -> Benchmark:
    """The one benchmark of this name, with its options ("NAME=VALUE").

    With `server`, of the split whose truths the evaluation server holds, unless chosen otherwise.
    """
    known = _known_name(name.strip())
    chosen = _settings(options, [known])[known]
    split = SERVERS[known].options if server else {}
    return BENCHMARKS[known].with_options({**split, **chosen})


def benchmark_of(scores: Scores) -> Benchmark:
    """The benchmark that gave these scores, with the options and the judge they were made with."""
    return BENCHMARKS[scores.benchmark].as_recorded(scores.protocol)


def _known_name(name: str) -> str:
    plain = name.lower().replace("-", "_")
    plain = _OTHER_NAMES.get(plain, plain)
    return plain if plain in BENCHMARKS else name


def _settings(options: Sequence[str], chosen: Sequence[str]) -> dict[str, dict[str, str]]:
    settings: dict[str, dict[str, str]] = defaultdict(dict)
    for option in options:
        key, equals, value = option.partition("=")
        bench, dot, name = key.strip().rpartition(".")
        if not equals or not name or not (dot or len(chosen) == 1):
            raise PumiceError(
                f"the option {option!r} cannot be read; write BENCH.NAME=VALUE, such as "
                f"vqav2.scorer=before-2021 (without BENCH when one benchmark is named)."
            )
        bench = _known_name(bench) if dot else chosen[0]
        if bench not in chosen:
            raise PumiceError(
                f"the option {option!r} is for {bench}, which is not asked for; asked for: "
                f"{', '.join(chosen)}. Name the benchmark too, or leave the option out."
            )
        if settings[bench].setdefault(name, value.strip()) != value.strip():
            raise PumiceError(
                f"the option {bench}.{name} was given twice, as {settings[bench][name]} and "
                f"{value.strip()}. Leave one out."
            )
    return settings
