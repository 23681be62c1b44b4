"""The `pumice` command: puts the commands together and turns errors into one clear block.

Nothing heavy is imported here, so that `pumice --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import pumice
from pumice.cli import (
    ask,
    chat,
    convert,
    data,
    doctor,
    evaluate,
    generate,
    launch,
    page,
    plan,
    recipes,
    run,
    score,
    serve,
    study,
    submit,
    tiles,
    world,
)
from pumice.cli.options import example
from pumice.cli.output import fail, say
from pumice.cli.usage import help_extra_arguments
from pumice.core.errors import PumiceError
from pumice.core.log import setup_logging

app = typer.Typer(
    name="pumice",
    help="Find, build and judge the best recipe for a large multimodal model.",
    epilog=example("pumice run pocket --out runs/pocket", "pumice COMMAND --help"),
    no_args_is_help=True,
    # Plain help text: rich would double the time `pumice --help` takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

for _module in (
    run,
    launch,
    recipes,
    plan,
    study,
    ask,
    chat,
    generate,
    evaluate,
    score,
    serve,
    page,
    submit,
    convert,
    data,
    tiles,
    world,
    doctor,
):
    _module.register(app)
help_extra_arguments(app)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"pumice {pumice.__version__}")
        raise typer.Exit


@app.callback()
def _start(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every step.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")
    ] = False,
) -> None:
    setup_logging(1 if verbose else -1 if quiet else 0)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 done with errors, 2 cannot be done, 130 stopped."""
    try:
        app(args=args, prog_name="pumice")
    except PumiceError as error:
        fail(str(error))
    except OSError as error:
        # A path of the user's that cannot be read or written; without a path it is our own fault.
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}. Check the path, its permissions and free space.")
    except KeyboardInterrupt:
        # typer turns Ctrl-C into exit 130 by itself; this is the one pressed while it ends.
        sys.exit(130)
    sys.exit(2)
