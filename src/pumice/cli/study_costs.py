"""What a study's run costs, counted from the shapes of its recipe's model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pumice.cli.plan import blank_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from pumice.recipe.schema import Recipe
    from pumice.study.costs import Cost
    from pumice.study.spec import Budget


def cost_counter(budget: Budget) -> Callable[[Recipe], Cost]:
    """Counts a recipe's cost for conversations of the size that the budget names."""
    known: dict[str, Cost] = {}

    def cost_of(recipe: Recipe) -> Cost:
        # All that shapes depend on; a model is built once for each.
        key = recipe.model_dump_json(include={"model": True, "stages": True})
        if key not in known:
            known[key] = _cost(recipe, (budget.image[0], budget.image[1]), budget.text_tokens)
        return known[key]

    return cost_of


def _cost(recipe: Recipe, size: tuple[int, int], text_tokens: int) -> Cost:
    from pumice.cli.plan import stage_flops
    from pumice.models.costs import conversation_flops, image_costs, num_parameters
    from pumice.study.costs import Cost

    lmm = blank_of(recipe)
    (image,) = image_costs(lmm, [size])
    counts = conversation_flops(lmm, image, text_tokens)
    return Cost(
        image_tokens=image.tokens,
        tokens=image.tokens + text_tokens,
        flops={name: stage_flops(stage, counts) for name, stage in recipe.stage_list()},
        parameters=num_parameters(lmm),
    )
