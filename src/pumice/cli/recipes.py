"""`pumice recipes`: the shipped recipes, and one of them with every default written out."""

from __future__ import annotations

from typing import Annotated

import typer

from pumice.cli.options import JsonOption, example
from pumice.cli.output import say, say_json, table

_group = typer.Typer(
    help="List the shipped recipes, or show one.",
    epilog=example("pumice recipes", "pumice recipes show pocket"),
    invoke_without_command=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(_group, name="recipes")


@_group.callback()
def _default(context: typer.Context, as_json: JsonOption = False) -> None:
    if context.invoked_subcommand is None:
        list_recipes(as_json)
    elif as_json:
        raise typer.BadParameter("write --json after the subcommand", param_hint="--json")


@_group.command("list", epilog=example("pumice recipes list --json"))
def list_recipes(as_json: JsonOption = False) -> None:
    """List the shipped recipes, one line each."""
    from pumice.recipe.load import load_recipe, recipe_names

    about = {name: load_recipe(name).about for name in recipe_names()}
    if as_json:
        say_json({"recipes": [{"name": name, "about": text} for name, text in about.items()]})
    else:
        say(table(about.items()))


@_group.command("show", epilog=example("pumice recipes show pocket stages.tune.steps=700"))
def show(
    recipe: Annotated[str, typer.Argument(metavar="NAME", help="A shipped name or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a recipe as it would run.

    Every default is written out and the changes are applied.
    """
    from pumice.recipe.load import load_recipe, resolved_yaml

    loaded = load_recipe(recipe, overrides or [])
    if as_json:
        say_json(loaded.model_dump())
    else:
        say(resolved_yaml(loaded).rstrip())
