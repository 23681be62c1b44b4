"""`pumice data`: everything that is done to training data, one module for each command."""

from __future__ import annotations

import typer

from pumice.cli import data_convert, data_generate, data_mix, data_show, data_verify
from pumice.cli.options import example

_group = typer.Typer(
    help="Make, mix, check and look at training data.",
    epilog=example("pumice data verify train.json --images images"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _module in (data_convert, data_generate, data_mix, data_verify, data_show):
    _module.register(_group)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(_group, name="data")
