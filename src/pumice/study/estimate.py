"""How long a study will take, before it starts: its FLOPs by a rate that was measured somewhere.

The rate comes from the runs that the store has finished, else from the hours that the base recipe's
source publishes, else from the record of the pocket studies.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pumice.core.files import read_json, read_jsonl
from pumice.recipe.schema import Recipe, Stage
from pumice.study.cells import Cell, in_running_order
from pumice.study.costs import Cost
from pumice.study.store import Store

# Twelve runs of data-efficiency, one thread of two cores that other work shared; on a core of its
# own a run takes about half as long (benchmarks/results/studies). The start is the median of the
# nine that took their first stage over: the whole run less its steps and its questions (4.8 to 5.3
# seconds, and once 22.5).
_POCKET_FLOPS = 3.0e10
_POCKET_QUESTION = 0.003
_POCKET_START = 5.2
# What a benchmark without a limit is counted as.
_QUESTIONS = 3000


class Rate(Protocol):
    """What a machine does."""

    question: float
    """Seconds to ask one question."""
    start: float
    """Seconds before a run trains, and between training and asking."""
    origin: str
    """Where it was measured, in words."""

    def stage_seconds(self, name: str, stage: Stage, cost: Cost) -> float | None:
        """Seconds of a training stage; None where its length cannot be compared."""


@dataclass(slots=True)
class FlopRate:
    """So many FLOPs of training a second."""

    flops: float
    question: float
    start: float
    origin: str

    def stage_seconds(self, name: str, stage: Stage, cost: Cost) -> float | None:
        """By the number of conversations, if the stage is given in steps."""
        if stage.steps is None:
            return None
        return cost.flops[name] * stage.steps * stage.batch_size / self.flops


@dataclass(slots=True)
class PublishedHours:
    """The hours a recipe's source reports, for the recipe as it is."""

    recipe: Recipe
    cost: Cost
    hours: dict[str, float]
    origin: str
    question: float = 0.0
    start: float = 0.0

    def stage_seconds(self, name: str, stage: Stage, cost: Cost) -> float | None:
        """In proportion to the FLOPs, if both lengths are in steps or both in epochs."""
        own = dict(self.recipe.stage_list()).get(name)
        if own is None or name not in self.hours or (own.steps is None) != (stage.steps is None):
            return None
        ratio = cost.flops[name] * _length(stage) / (self.cost.flops[name] * _length(own))
        return 3600 * self.hours[name] * ratio


def measured_rate(store: Store, cells: Sequence[Cell], base: Cell) -> Rate:
    """The rate of this store's finished runs; without any, a recorded one that says so.

    `base` is a run of the reference.
    """
    flops = seconds = 0.0
    questions: list[float] = []
    for cell in {cell.key: cell for cell in cells}.values():
        total = cell.cost.run_flops(cell.recipe)
        if store.state(cell.key) == "done" and total is not None:
            flops, seconds = flops + total, seconds + trained_seconds(store, cell.key)
            questions.append(_question_seconds(store, cell.key))
    if questions:
        origin = f"{len(questions)} finished runs of this store"
        return FlopRate(flops / seconds, statistics.median(questions), _POCKET_START, origin)
    published = base.recipe.published
    if published is not None and published.hours:
        hours = {str(name): number for name, number in published.hours.items()}
        hardware = published.hardware
        origin = f"the hours its source reports ({hardware}) for all its data, without evaluation"
        return PublishedHours(base.recipe, base.cost, hours, origin)
    origin = "the record of the pocket studies: one thread of two cores that others share"
    return FlopRate(_POCKET_FLOPS, _POCKET_QUESTION, _POCKET_START, origin)


def estimated_seconds(cells: Sequence[Cell], store: Store, rate: Rate) -> float | None:
    """Of all runs that are missing, one after the other; None where nothing can be said.

    A first stage that several runs share is counted once.
    """
    total, begun = 0.0, set()
    for cell in in_running_order(cells):
        if store.state(cell.key) == "done":
            begun.add(cell.begins)
            continue
        for number, (name, stage) in enumerate(cell.recipe.stage_list()):
            if number == 0 and cell.begins in begun:
                continue
            seconds = rate.stage_seconds(name, stage, cell.cost)
            if seconds is None:
                return None
            total += seconds
        begun.add(cell.begins)
        if (chosen := cell.recipe.eval) is not None:
            # Every question is asked twice: the control shows other images.
            asked = 2 * (chosen.limit or _QUESTIONS) * len(chosen.benchmarks)
            total += rate.start + rate.question * asked
    return total


def trained_seconds(store: Store, key: str) -> float:
    """Seconds of all training steps of a run, those of a stage it shares included."""
    rows = read_jsonl(store.run(key) / "metrics.jsonl", allow_cut_tail=True)
    return sum(float(row["seconds"]) for _, row in rows)


def _question_seconds(store: Store, key: str) -> float:
    found = read_json(store.run(key) / "scores.json")
    asked = sum(2 * int(entry["n"]) for entry in found["benchmarks"].values())
    return float(found["seconds"]) / max(asked, 1)


def _length(stage: Stage) -> float:
    return stage.steps * stage.batch_size if stage.steps is not None else float(stage.epochs or 1)
