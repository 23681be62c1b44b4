"""What the finished runs of a study answered: sums by seed and picture, lengths, costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from pumice.core.errors import DataError
from pumice.core.files import read_json, read_jsonl
from pumice.eval.benchmark import Benchmark, Item, Row
from pumice.eval.choose import benchmark_of
from pumice.eval.compare import items_of_run, rows_of_run
from pumice.eval.metrics import tallies
from pumice.eval.runner import SCORES
from pumice.eval.scores import Scores, fingerprint
from pumice.study.cells import Arm, Cell
from pumice.study.estimate import trained_seconds
from pumice.study.statistics import Measured, stacked
from pumice.study.store import Store

# Longer answers are counted together.
LONGEST = 40


@dataclass(frozen=True, slots=True)
class ArmCost:
    """What an arm's runs took: means over its seeds, measured where not said otherwise."""

    image_tokens: int
    """Of one picture, counted from shapes."""
    parameters: int
    flops: float | None
    """Of the training, counted from shapes; None where stages are in epochs."""
    steps: dict[str, int | None]
    tokens: float | None = None
    """Positions trained on, images among them."""
    seconds: float | None = None
    """Of the training, a shared stage counted in full."""
    memory: float | None = None
    """Bytes at the peak of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """Everything that an arm's finished runs left."""

    arm: Arm
    cost: ArmCost
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    """As the runs were asked, by name: with their options, and the judge if there was one."""
    measured: dict[str, Measured] = field(default_factory=dict)
    """By benchmark."""
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """How many answers have how many words, by benchmark."""
    errors: dict[int, str] = field(default_factory=dict)
    """Why a seed's run failed or is not there."""


class Reader:
    """Reads the runs of a store; a benchmark's items are read once for all of them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._benchmarks: dict[str, Benchmark] = {}
        self._items: dict[tuple[str, str, str], list[Item]] = {}
        self._asked: dict[str, str] = {}

    def arm(self, arm: Arm, cells: Sequence[Cell]) -> ArmResult:
        """An arm's result from its runs, one for each seed."""
        done = [cell for cell in cells if self.store.state(cell.key) == "done"]
        errors = {
            cell.seed: self.store.error(cell.key)
            if self.store.state(cell.key) == "failed"
            else "not run"
            for cell in cells
            if cell not in done
        }
        result = ArmResult(arm=arm, cost=self._cost(cells[0], done), errors=errors)
        chosen = cells[0].recipe.eval
        for name in chosen.benchmarks if chosen is not None and done else ():
            folders = {cell.seed: self.store.run(cell.key) / "eval" / name for cell in done}
            rows = {seed: self._rows(folder) for seed, folder in folders.items()}
            benchmark = result.benchmarks[name] = self._benchmarks[name]
            result.measured[name] = stacked(
                {seed: tallies(benchmark, found) for seed, found in rows.items()}
            )
            result.lengths[name] = Counter(
                min(len(row.prediction.text.split()), LONGEST)
                for found in rows.values()
                for row in found
            )
        return result

    def _rows(self, folder: Path) -> list[Row]:
        """The answered rows of a run's benchmark, in the order that all runs have."""
        scores = Scores.from_dict(read_json(folder / SCORES))
        benchmark = benchmark_of(scores)
        self._benchmarks.setdefault(scores.benchmark, benchmark)
        # The same questions may be about pictures of another size, in another directory.
        protocol = str(scores.protocol["fingerprint"])
        key = (scores.benchmark, str(scores.origin.get("data")), protocol)
        if key not in self._items:
            self._items[key] = items_of_run(benchmark, folder, scores)
        items = self._items[key]
        asked = _what_is_asked(scores, items)
        if self._asked.setdefault(scores.benchmark, asked) != asked:
            raise DataError(
                f"{folder} was asked other questions of {scores.benchmark} than the runs before "
                "it, so their answers cannot be compared. Let no axis change `eval`, unless it is "
                "the option `prompt` of a benchmark, or the world that questions are about; "
                "eval.data can name one directory for all arms."
            )
        rows = rows_of_run(folder, benchmark, items, scores)
        return [rows[item.id] for item in items]

    def _cost(self, cell: Cell, done: Sequence[Cell]) -> ArmCost:
        steps = {name: stage.steps for name, stage in cell.recipe.stage_list()}
        shapes = (cell.cost.image_tokens, cell.cost.parameters, cell.cost.run_flops(cell.recipe))
        if not done:
            return ArmCost(*shapes, steps)
        keys = [run.key for run in done]
        return ArmCost(
            *shapes,
            steps,
            tokens=mean(self._tokens(key) for key in keys),
            seconds=mean(trained_seconds(self.store, key) for key in keys),
            memory=mean(self._memory(key, list(steps)) for key in keys),
        )

    def _tokens(self, key: str) -> int:
        rows = read_jsonl(self.store.run(key) / "metrics.jsonl", allow_cut_tail=True)
        return sum(int(row["tokens"]) for _, row in rows)

    def _memory(self, key: str, stages: Sequence[str]) -> int:
        records = (read_json(self.store.run(key) / name / "training.json") for name in stages)
        return max(int(record["result"]["peak_memory_bytes"]) for record in records)


def _what_is_asked(scores: Scores, items: Sequence[Item]) -> str:
    """Equal where answers can be compared: the same questions and scorer, in whatever prompt."""
    worded = ("fingerprint", "items_hash", "prompt", "protocol", "options")
    rules = {name: value for name, value in scores.protocol.items() if name not in worded}
    options = {
        name: value
        for name, value in scores.protocol.get("options", {}).items()
        if name != "prompt"
    }
    return fingerprint(
        [rules, options, [(item.id, item.truth, item.image and item.image.name) for item in items]]
    )
