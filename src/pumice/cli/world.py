"""`pumice world`: the synthetic world's files in public formats, and the pocket backbones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli.options import example
from pumice.cli.output import say
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.recipe.schema import World

_group = typer.Typer(
    help="Make the synthetic world, or its backbones.",
    epilog=example("pumice world make --out runs/world --images 2000"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
_RECORD = "world.json"
_UNFINISHED = "world.unfinished"

OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(_group, name="world")


@_group.command("make", epilog=example("pumice world make --out runs/world --images 2000"))
def make(
    out: OutOption,
    images: Annotated[int, typer.Option("--images", min=1, help="Training images.")] = 6000,
    eval_images: Annotated[
        int, typer.Option("--eval-images", min=1, help="Held-out images of the benchmarks.")
    ] = 500,
    seed: Annotated[int, typer.Option("--seed", help="Another seed is another world.")] = 0,
    wide: Annotated[
        bool, typer.Option("--wide", help="Twice as wide pictures; things keep their pixels.")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="A training file for each source of a mixture too.")
    ] = False,
    variants: Annotated[
        bool, typer.Option("--variants", help="Files that say less, or teach single skills, too.")
    ] = False,
    resolution: Annotated[
        int | None,
        typer.Option("--resolution", min=1, help="Detail of so many pixels a side; all without."),
    ] = None,
) -> None:
    """Write training data and benchmark files.

    Each benchmark's files have their official names and formats. Equal arguments, equal bytes.
    """
    from pumice.recipe.schema import World

    world = World(
        images=images,
        eval_images=eval_images,
        seed=seed,
        wide=wide,
        sources=sources,
        variants=variants,
        resolution=resolution,
    )
    ensure_world(out, world)
    say(str(out))


@_group.command("backbones", epilog=example("pumice world backbones --out runs/backbones"))
def backbones(
    out: OutOption,
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and data.")] = 0,
    steps_vision: Annotated[
        int | None, typer.Option("--steps-vision", min=1, help="Steps; as shipped when left out.")
    ] = None,
    steps_language: Annotated[
        int | None, typer.Option("--steps-language", min=1, help="Steps; as shipped when left out.")
    ] = None,
) -> None:
    """Pre-train the two pocket backbones.

    DIR gets the Hugging Face folders pocket-vision and pocket-language.
    """
    from pumice.world.backbones import make_backbones

    make_backbones(out, seed=seed, steps_vision=steps_vision, steps_language=steps_language)
    say(str(out))


@_group.command("teacher", epilog=example("pumice world teacher --port 8001"))
def teacher(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of answers and faults.")] = 0,
    fault: Annotated[
        list[str] | None,
        typer.Option("--fault", metavar="NAME=SHARE", help="Such as rate_limit=0.1; repeatable."),
    ] = None,
    latency: Annotated[float, typer.Option("--latency", min=0.0, help="Seconds an answer.")] = 0.0,
) -> None:
    """Serve a scripted LLM at an OpenAI-compatible address.

    It answers the data engine and the judges offline, and prints its address. Ctrl-C ends it.
    """
    import threading

    from pumice.world.teacher import Teacher, parse_faults, teaching

    scripted = Teacher(seed=seed, faults=parse_faults(fault or []), latency=latency)
    with teaching(scripted, port) as url:
        say(url)
        threading.Event().wait()


def ensure_world(out: Path, world: World) -> None:
    """Make a world in `out` unless exactly this one is there; nothing else is written over."""
    from pumice.core.files import read_json

    asked = world.model_dump()
    if (out / _RECORD).is_file():
        record = read_json(out / _RECORD)
        # A world of an older version does not name what it could not be.
        there = {
            name: record.get(name, None if field.is_required() else field.default)
            for name, field in type(world).model_fields.items()
        }
        if there != asked:
            raise PumiceError(
                f"{out} holds another synthetic world: {_words(there)}; asked for: "
                f"{_words(asked)}. Give another directory, or remove this one."
            )
        return
    # The mark tells a stopped run, which is made again, from a directory with someone's own data.
    mark = out / _UNFINISHED
    if out.exists() and not mark.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PumiceError(
            f"{out} is not empty and holds no synthetic world, so nothing is written there. Give "
            "another directory; to train on the files in it, set world=null in the recipe."
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    _make(out, asked)
    mark.unlink()


def _make(out: Path, asked: dict[str, Any]) -> None:
    from pumice.core.progress import progress
    from pumice.world.datasets import make_world

    with progress(asked["images"] + asked["eval_images"], "making the world") as bar:
        shown = 0

        def report(done: int, total: int) -> None:
            nonlocal shown
            bar.update(done - shown)
            shown = done

        make_world(out, **asked, progress=report)


def _words(world: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in world.items())
