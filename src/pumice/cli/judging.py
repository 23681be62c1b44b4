"""The judge that a command's options name, opened for the benchmarks that need one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli.endpoint import is_url, open_endpoint
from pumice.cli.output import note
from pumice.cli.prices import read_prices
from pumice.cli.weights import weights_hash
from pumice.core.distributed import is_main
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.core.llm_client import LLMClient
    from pumice.eval.benchmark import Benchmark
    from pumice.eval.judge import Judge

REPLIES = "judge.replies.jsonl"
"""What a judge said, beside what it judged, so that nothing is paid for twice."""
RUBRIC = "rubric"
"""In the place of a judge: none."""
_KEY = "PUMICE_JUDGE_API_KEY"
_ENDPOINTS_OWN = (
    "judge_model", "judge_budget", "judge_price_in", "judge_price_out", "judge_concurrency",
    "judge_per_minute", "judge_timeout",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """Who judges free answers: for commands that score LLaVA-Bench and MM-Vet."""

    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            metavar="URL|DIR|rubric",
            help="Of llava_wild and mmvet: an endpoint, a local model, or no judge.",
        ),
    ] = RUBRIC
    judge_model: Annotated[str | None, typer.Option(help="The judge's name at its URL.")] = None
    judge_runs: Annotated[
        int | None, typer.Option(min=1, help="Verdicts an answer; as published when left out.")
    ] = None
    judge_budget: Annotated[
        float | None, typer.Option(metavar="USD", help="All judging into this place, at most.")
    ] = None
    judge_price_in: Annotated[float | None, typer.Option(help="Of a million prompt tokens.")] = None
    judge_price_out: Annotated[float | None, typer.Option(help="Of a million new tokens.")] = None
    judge_concurrency: Annotated[int, typer.Option(min=1, help="Calls at a time.")] = 8
    judge_per_minute: Annotated[float | None, typer.Option(help="Calls a minute, at most.")] = None
    judge_timeout: Annotated[float, typer.Option(help="Seconds for one verdict.")] = 120.0


JUDGE = JudgeOptions()


@contextmanager
def judged(
    benchmarks: Sequence[Benchmark], options: JudgeOptions, replies: Path
) -> Iterator[list[Benchmark]]:
    """The benchmarks, those that a judge scores with the one of the options, while the block runs.

    The judge's replies are kept in `replies`. Its key is in the environment, if it needs one.
    """
    from pumice.eval.judged_benchmark import JudgedBenchmark

    given = [f.name for f in fields(options) if getattr(options, f.name) != getattr(JUDGE, f.name)]
    needed = any(isinstance(benchmark, JudgedBenchmark) for benchmark in benchmarks)
    if given and not needed:
        raise PumiceError(
            f"{_flags(given)} is for benchmarks that a judge scores (llava_wild, mmvet), and none "
            f"is asked for. Leave it out."
        )
    odd = [name for name in given if name in _ENDPOINTS_OWN and not is_url(options.judge)]
    odd += ["judge_runs"] if "judge_runs" in given and options.judge == RUBRIC else []
    if odd:
        raise PumiceError(
            f"{_flags(odd)} does not go with --judge {options.judge}. Leave it out, or give the "
            f"judge as http://host/v1"
            + (" or as a model's directory." if options.judge == RUBRIC else ".")
        )
    with ExitStack() as stack:
        judge = None
        if needed and options.judge != RUBRIC:
            judge = stack.enter_context(_opened(options, replies))
        yield [
            benchmark.judged_by(judge) if isinstance(benchmark, JudgedBenchmark) else benchmark
            for benchmark in benchmarks
        ]


@contextmanager
def _opened(options: JudgeOptions, replies: Path) -> Iterator[Judge]:
    from pumice.eval.judge import Judge

    if is_url(options.judge):
        if options.judge_model is None:
            raise PumiceError(
                f"--judge-model not given: a score needs to say which model judged. Give its name "
                f"at {options.judge}, as gpt-4-0613."
            )
        if not is_main():
            yield Judge("endpoint", options.judge_model, options.judge_runs)
            return
        with _client(options, replies) as client:
            try:
                yield Judge("endpoint", options.judge_model, options.judge_runs, client)
            finally:
                # Also when the score is withheld, or the run was stopped: the money is gone.
                if client.prices is not None:
                    note(f"judging: {client.budget.spent:.4g} spent so far, over all runs")
        return
    from pumice.eval.local_judge import LocalChat
    from pumice.infer.model import load

    weights = weights_hash(options.judge)
    name = f"{Path(options.judge).name} {weights[:8]}"
    if not is_main():
        yield Judge("local model", name, options.judge_runs)
        return
    model = load(options.judge)
    with closing(LocalChat(model.generate, weights, replies)) as chat:
        yield Judge("local model", name, options.judge_runs, chat)


def _client(options: JudgeOptions, replies: Path) -> LLMClient:
    from pumice.core.llm_client import LLMClient

    endpoint = open_endpoint(
        options.judge,
        _KEY,
        concurrency=options.judge_concurrency,
        per_minute=options.judge_per_minute,
        timeout=options.judge_timeout,
    )
    prices = read_prices(options.judge_price_in, options.judge_price_out, "--judge-price")
    if options.judge_budget is not None and prices is None:
        raise PumiceError(
            "--judge-budget needs the judge's prices: give --judge-price-in and --judge-price-out, "
            "what a million prompt tokens and a million new tokens cost."
        )
    return LLMClient(endpoint, cache=replies, prices=prices, cost_cap=options.judge_budget)


def _flags(names: Sequence[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)
