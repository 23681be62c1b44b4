"""From the runs of a study to what they show: means, paired differences, verdicts, claims."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.registry import check_choice, suggest
from pumice.eval.benchmarks import BENCHMARKS
from pumice.study.cells import Arm, Cell, arms_of, reference_arm
from pumice.study.results import ArmResult, Reader
from pumice.study.spec import Claim, StudyFile
from pumice.study.statistics import Estimate, differences, estimates, verdict
from pumice.study.store import Store

STATUSES = SHOWN, NOT_SHOWN, OPPOSITE, NO_RESULT = "shown", "not shown", "the opposite", "no result"


@dataclass(frozen=True, slots=True)
class Metric:
    """A benchmark and one of its metrics."""

    benchmark: str
    name: str

    @property
    def title(self) -> str:
        """For people: "VQAv2 accuracy"."""
        return f"{BENCHMARKS[self.benchmark].title} {self.name.replace('_', ' ')}"

    def __str__(self) -> str:
        """As a study file writes it."""
        return f"{self.benchmark}.{self.name}"


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of a claim: the difference that decides, and the word for it."""

    claim: Claim
    difference: Estimate | None
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that a study's finished runs show."""

    study: StudyFile
    reference: Arm
    metrics: tuple[Metric, ...]
    arms: tuple[ArmResult, ...]
    means: Mapping[str, Mapping[str, Estimate]]
    """By arm and metric."""
    differences: Mapping[str, Mapping[str, Estimate]]
    """From the reference, by arm and metric."""
    claims: tuple[Judged, ...]

    @property
    def failed(self) -> bool:
        """Whether a run has failed or is missing."""
        return any(result.errors for result in self.arms)

    def verdict(self, arm: Arm, metric: Metric) -> str:
        """An arm beside the reference, in plain words."""
        if arm == self.reference:
            return "reference"
        return verdict(self.differences[arm.name].get(str(metric)), metric.name)

    def clear(self) -> tuple[int, int]:
        """How many differences leave out zero, and how many were looked at."""
        looked = [
            found
            for by_metric in self.differences.values()
            for found in by_metric.values()
            if found.interval is not None
        ]
        return sum(found.sign != 0 for found in looked), len(looked)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; no path of this machine is among them."""
        study = self.study.model_dump(include={"name", "about", "source", "base", "budget"})
        axes = {
            name: {"levels": list(axis.levels()), "positions": axis.numbers(), "unit": axis.unit}
            for name, axis in self.study.axes.items()
        }
        return {
            **study,
            "axes": axes,
            "seeds": self.study.seeds,
            "reference": self.reference.name,
            "metrics": [str(metric) for metric in self.metrics],
            "arms": [self._arm(result) for result in self.arms],
            "claims": [_claim(judged) for judged in self.claims],
            "not_testable": self.study.not_testable,
            "made_with": {
                "pumice": version("pumice"),
                "torch": version("torch"),
                "python": platform.python_version(),
                "processor": platform.machine(),
            },
        }

    def _arm(self, result: ArmResult) -> dict[str, Any]:
        name = result.arm.name
        found = {}
        for metric in self.metrics:
            key = str(metric)
            own, gap = self.means[name].get(key), self.differences[name].get(key)
            found[key] = {
                "mean": own and own.value,
                "interval": own and own.interval,
                "seeds": own and own.seeds,
                "difference": gap and gap.value,
                "difference_interval": gap and gap.interval,
                "verdict": self.verdict(result.arm, metric),
            }
        lengths = {
            bench: dict(sorted(result.lengths[bench].items()))
            for bench in self.study.lengths
            if bench in result.lengths
        }
        return {
            "name": name,
            "levels": dict(result.arm.levels),
            "metrics": found,
            "cost": asdict(result.cost),
            "lengths": lengths,
            "errors": {str(seed): error for seed, error in result.errors.items()},
        }


def analyse(study: StudyFile, cells: Sequence[Cell], store: Store) -> Findings:
    """Reads the finished runs of a study and compares them."""
    arms = arms_of(study)
    reference = reference_arm(study, arms)
    reader = Reader(store)
    results = {
        arm.name: reader.arm(arm, [cell for cell in cells if cell.arm == arm]) for arm in arms
    }
    metrics = metrics_of(study, cells)
    means = {name: _means(result, metrics) for name, result in results.items()}
    base = results[reference.name]
    return Findings(
        study=study,
        reference=reference,
        metrics=metrics,
        arms=tuple(results.values()),
        means=means,
        differences={
            name: {} if result is base else between(base, result, metrics)
            for name, result in results.items()
        },
        claims=tuple(_judge(claim, study, results) for claim in study.claims),
    )


def between(base: ArmResult, other: ArmResult, metrics: Sequence[Metric]) -> dict[str, Estimate]:
    """The paired differences of two arms by metric, where both have a result."""
    found: dict[str, Estimate] = {}
    for name in dict.fromkeys(metric.benchmark for metric in metrics):
        if name not in base.measured or name not in other.measured:
            continue
        gaps = differences(base.benchmarks[name], base.measured[name], other.measured[name])
        found |= {f"{name}.{key}": gap for key, gap in gaps.items()}
    return {str(metric): found[str(metric)] for metric in metrics if str(metric) in found}


def _means(result: ArmResult, metrics: Sequence[Metric]) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for name, measured in result.measured.items():
        own = estimates(result.benchmarks[name], measured)
        found |= {f"{name}.{key}": estimate for key, estimate in own.items()}
    return {str(metric): found[str(metric)] for metric in metrics if str(metric) in found}


def metrics_of(study: StudyFile, cells: Sequence[Cell]) -> tuple[Metric, ...]:
    """The metrics of the study and of its claims, each once; refused where nobody is asked."""
    chosen = cells[0].recipe.eval
    asked = chosen.benchmarks if chosen is not None else []
    named = study.metrics or [f"{name}.{BENCHMARKS[name].headline}" for name in asked]
    named = list(dict.fromkeys([*named, *(claim.metric for claim in study.claims)]))
    metrics = []
    for text in named:
        benchmark, _, name = text.partition(".")
        if benchmark not in asked or not name:
            raise PumiceError(
                f"the metric {text!r} of study {study.name!r} is not BENCHMARK.METRIC of what its "
                f"runs are asked: {', '.join(asked)}.{suggest(benchmark, asked)}"
            )
        check_choice(f"the metric of {benchmark}", name, BENCHMARKS[benchmark].metric_names())
        metrics.append(Metric(benchmark, name))
    return tuple(metrics)


def _judge(claim: Claim, study: StudyFile, results: Mapping[str, ArmResult]) -> Judged:
    benchmark, _, name = claim.metric.partition(".")
    less, more = (
        next(r for r in results.values() if dict(r.arm.levels) == study.levels_of(claim, level))
        for level in (claim.less, claim.more)
    )
    gap = between(less, more, [Metric(benchmark, name)]).get(claim.metric)
    if gap is None or gap.interval is None:
        return Judged(claim, None, NO_RESULT)
    low, high = gap.interval
    status = SHOWN if low > claim.above else OPPOSITE if high < claim.above else NOT_SHOWN
    return Judged(claim, gap, status)


def _claim(judged: Judged) -> dict[str, Any]:
    gap = judged.difference
    return {
        **judged.claim.model_dump(),
        "status": judged.status,
        "difference": gap and gap.value,
        "interval": gap and gap.interval,
    }
