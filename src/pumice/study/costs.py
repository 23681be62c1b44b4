"""What a run costs before it starts, and the steps that give two runs equal tokens or FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pumice.core.errors import PumiceError
from pumice.recipe.schema import Recipe, Stage
from pumice.study.spec import Budget


@dataclass(frozen=True, slots=True)
class Cost:
    """What one training conversation takes, counted from shapes."""

    image_tokens: int
    """Positions that a picture has in the language model."""
    tokens: int
    """Positions of the conversation."""
    flops: Mapping[str, int]
    """FLOPs of a conversation, forward and backward, by stage."""
    parameters: int

    def run_flops(self, recipe: Recipe) -> float | None:
        """FLOPs of the whole training; None where a stage's length is in epochs."""
        total = 0.0
        for name, stage in recipe.stage_list():
            if stage.steps is None:
                return None
            total += float(self.flops[name]) * stage.steps * stage.batch_size
        return total


def steps_of_budget(
    budget: Budget, base: Recipe, base_cost: Cost, recipe: Recipe, cost: Cost
) -> dict[str, int]:
    """The steps of each stage the budget is about; nothing where the recipe's own hold."""
    if budget.equal == "steps":
        return {}
    there = dict(base.stage_list())
    found = {}
    for name, stage in recipe.stage_list():
        if budget.stage not in (name, "both") or name not in there:
            continue
        whole = _conversations(base.name, name, there[name]) * _price(budget, base_cost, name)
        each = _price(budget, cost, name) * stage.batch_size
        found[name] = max(1, round(whole / each))
    return found


def _price(budget: Budget, cost: Cost, stage: str) -> int:
    return cost.tokens if budget.equal == "tokens" else cost.flops[stage]


def _conversations(recipe: str, name: str, stage: Stage) -> int:
    if stage.steps is None:
        raise PumiceError(
            f"the budget shares out tokens or FLOPs, but stage {name!r} of {recipe!r} is given in "
            f"epochs. Set stages.{name}.steps (and stages.{name}.epochs to null) in `set`, or let "
            "the budget be equal steps."
        )
    return stage.steps * stage.batch_size
