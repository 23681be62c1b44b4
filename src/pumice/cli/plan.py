"""`pumice plan`: what a recipe's model is made of and what its parts cost, before anything runs."""

from __future__ import annotations

import re
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli.options import JsonOption, example
from pumice.cli.output import say, say_json, table
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.models.costs import Counts, ImageCost, Trained
    from pumice.models.lmm import LMM
    from pumice.recipe.schema import Recipe, Stage

_SIZES = ((336, 336), (640, 480), (1920, 1080))
_PARTS = ("vision", "connector", "gated layers", "language")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lines = (
        "pumice plan llava15-7b model.connector=resampler",
        "pumice plan llava15-13b --gpus 8xA100-80G",
    )
    app.command("plan", epilog=example(*lines))(plan)


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.")
    ] = None,
    image: Annotated[
        str, typer.Option("--image", metavar="WxH", help="Image of the training conversation.")
    ] = "640x480",
    text_tokens: Annotated[
        int, typer.Option("--text-tokens", min=1, help="Its text, question and answer, in tokens.")
    ] = 256,
    gpus: Annotated[
        str | None, typer.Option(metavar="NxGPU", help="Plan the stages on it, as 8xA100-80G.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of which kind, when --gpus is a number.")
    ] = None,
    utilisation: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Of peak FLOP/s for all that is computed."),
    ] = 0.5,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE=MEAN,SPREAD,TEXT_ONLY",
            help="Tokens of text of a stage's conversations, and the share without images.",
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE=N", help="Conversations of a stage's data."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a recipe's model costs, and with --gpus how it trains on a machine.

    Parameters and FLOPs of each part, image tokens, what a training conversation takes, and every
    connector of the shelf between the same backbones. On a machine: memory of each GPU, which
    batch fits, FLOPs and time of each stage. Nothing is built or downloaded beyond the backbones'
    configurations.
    """
    from pumice.recipe.load import load_recipe

    size = _size(image)
    loaded = load_recipe(recipe, overrides or [])
    lmm = blank_of(loaded)
    if gpus is None:
        record = _record(loaded, lmm, size, text_tokens)
        text = "" if as_json else _text(record)
    else:
        from pumice.cli.plan_machine import Asked, machine_record, machine_text

        asked = Asked(gpus, gpu, utilisation, tuple(lengths or ()), tuple(rows or ()))
        record = machine_record(loaded, lmm, size, asked)
        text = "" if as_json else machine_text(record)
    say_json(record) if as_json else say(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise PumiceError(
            f"--image is {text!r}; width and height in pixels are needed, such as 640x480."
        )
    return int(match[1]), int(match[2])


def blank_of(recipe: Recipe) -> LMM:
    """The recipe's model without memory for its weights."""
    from pumice.cli.stages import stage_specs
    from pumice.models.costs import blank_model
    from pumice.models.published_configs import config_folder
    from pumice.train.build import model_config

    # Where weights come from changes no shape.
    model = recipe.model.model_copy(update={"connector_from": None})
    shapes = recipe.model_copy(update={"model": model})
    with tempfile.TemporaryDirectory() as scratch:
        find = partial(config_folder, scratch=Path(scratch))
        return blank_model(model_config(stage_specs(shapes, Path(), Path(), find)[0]))


def _record(recipe: Recipe, lmm: LMM, size: tuple[int, int], text_tokens: int) -> dict[str, Any]:
    """Everything the command says, as plain values."""
    from pumice.models.costs import conversation_flops, image_costs, language_flops, vision_flops
    from pumice.recipe.loss_bands import end_of_healthy_runs

    *sizes, chosen = image_costs(lmm, (*_SIZES, size))
    counts = conversation_flops(lmm, chosen, text_tokens)
    parts = _parts(lmm)
    return {
        "recipe": recipe.name,
        "parts": parts,
        "parameters": sum(parts.values()),
        "view": {
            "side": lmm.vision.image_size,
            "features": lmm.vision.num_tokens,
            "tokens": lmm.connector.num_tokens,
            "vision_flops": vision_flops(lmm),
        },
        "images": [_image(cost) for cost in sizes],
        "language_flops_per_token": language_flops(lmm, 1),
        "conversation": {
            "image": _image(chosen),
            "text_tokens": text_tokens,
            "tokens": chosen.tokens + text_tokens,
            "forward_flops": {**counts._asdict(), "total": sum(counts)},
        },
        "stages": [
            _stage(name, stage, lmm, counts) | {"loss_at_end": end_of_healthy_runs(recipe, name)}
            for name, stage in recipe.stage_list()
        ],
        "connectors": _connectors(lmm, size),
    }


def _parts(lmm: LMM) -> dict[str, int]:
    from pumice.models.costs import connector_parameters, num_parameters

    counted = (
        num_parameters(lmm.vision),
        connector_parameters(lmm),
        num_parameters(lmm.cross_attention),
        num_parameters(lmm.language),
    )
    return dict(zip(_PARTS, counted, strict=True))


def _image(cost: ImageCost) -> dict[str, Any]:
    return {**cost._asdict(), "size": list(cost.size)}


def learning(stage: Stage, lmm: LMM) -> tuple[Trained, dict[str, int]]:
    """Which parts a stage trains, and how many weights of each."""
    from pumice.models.costs import adapter_size, num_parameters

    trained = {str(part): num_parameters(lmm.part(part)) for part in stage.train}
    if stage.lora is not None:
        trained["language"] = adapter_size(lmm, stage.lora.r, stage.lora.targets)
    return _what_learns(stage), trained


def _what_learns(stage: Stage) -> Trained:
    from pumice.models.costs import Trained

    parts = ("vision" in stage.train, "connector" in stage.train, "language" in stage.train)
    return Trained(*parts, adapters=stage.lora is not None)


def _stage(name: str, stage: Stage, lmm: LMM, counts: Counts) -> dict[str, Any]:
    trained = learning(stage, lmm)[1]
    return {
        "name": name,
        "trained": trained,
        "trained_parameters": sum(trained.values()),
        "conversation_flops": stage_flops(stage, counts),
    }


def stage_flops(stage: Stage, counts: Counts) -> int:
    """FLOPs of training on a conversation whose forward pass takes `counts`."""
    from pumice.models.costs import training_flops

    return training_flops(counts, _what_learns(stage))


def _connectors(lmm: LMM, size: tuple[int, int]) -> list[dict[str, Any]]:
    from pumice.models.costs import language_flops, shelf

    per_token = language_flops(lmm, 1)
    rows = []
    for row in shelf(lmm, size):
        entry: dict[str, Any] = {"name": row.name, "recipe": row.own}
        if row.refused:
            rows.append({**entry, "refused": row.refused})
            continue
        entry |= {"parameters": row.params, "gated_parameters": row.gated_params}
        entry |= {"views": row.views, "flops": row.flops, "tokens": row.tokens}
        rows.append({**entry, "language_flops": row.tokens * per_token})
    return rows


def _text(record: dict[str, Any]) -> str:
    blocks = (
        ("", _part_rows(record)),
        (_view_title(record["view"]), _image_rows(record["images"])),
        (_conversation_title(record), _conversation_rows(record)),
        (_shelf_title(record), _connector_rows(record["connectors"])),
    )
    parts = [(f"{title}\n" if title else "") + _columns(rows) for title, rows in blocks]
    refused = [f"{c['name']}: {c['refused']}" for c in record["connectors"] if "refused" in c]
    return "\n\n".join([*parts, *refused])


def _part_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    from pumice.recipe.loss_bands import told_end

    stages = record["stages"]
    rows = [(record["recipe"], "parameters", *(f"{stage['name']} trains" for stage in stages))]
    for part, count in record["parts"].items():
        if not count:
            continue
        owner = "connector" if part == "gated layers" else part
        learns = [_learns(stage["trained"], part, owner, count) for stage in stages]
        rows.append((part, f"{count:,}", *learns))
    totals = (f"{stage['trained_parameters']:,}" for stage in stages)
    ends = (told_end(stage["loss_at_end"]) for stage in stages)
    return [
        *rows,
        ("all", f"{record['parameters']:,}", *totals),
        ("loss healthy runs end at", "", *ends),
    ]


def _learns(trained: dict[str, int], part: str, owner: str, count: int) -> str:
    if owner not in trained:
        return "-"
    return f"{trained['language']:,}" if part == "language" else f"{count:,}"


def _view_title(view: dict[str, Any]) -> str:
    side = view["side"]
    return (
        f"Images: views of {side} x {side}, {view['features']} features and {view['tokens']} "
        f"image tokens each"
    )


def _image_rows(images: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]]
    rows = [("size", "views", "tokens to the LLM", "vision FLOPs", "connector FLOPs")]
    for image in images:
        tokens = f"{image['tokens']:,}"
        if image["latents"]:
            tokens += f" + {image['latents']} latents beside"
        flops = (_short(image["vision_flops"]), _short(image["connector_flops"]))
        rows.append((_by(image["size"]), f"{image['views']}", tokens, *flops))
    return rows


def _conversation_title(record: dict[str, Any]) -> str:
    talk = record["conversation"]
    return (
        f"One conversation: {_by(talk['image']['size'])} and {talk['text_tokens']} tokens of text, "
        f"{talk['tokens']:,} positions"
    )


def _conversation_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    forward = record["conversation"]["forward_flops"]
    rows = [("", "FLOPs")]
    rows += [(f"forward, {part}", _short(flops)) for part, flops in forward.items() if flops]
    rows += [(f"train, {s['name']}", _short(s["conversation_flops"])) for s in record["stages"]]
    each = record["language_flops_per_token"]
    return [*rows, ("language, one token alone", _short(each))]


def _shelf_title(record: dict[str, Any]) -> str:
    image, features = record["conversation"]["image"], record["view"]["features"]
    shown = f"one view of {features} features"
    if image["views"] > 1:
        # Row ends and padding that is not kept are the image's, not a view's.
        shown = f"{_by(image['size'])} in {image['views']} views of {features} features"
    return (
        f"Every connector between these backbones, {shown}, with default options but for the "
        f"recipe's own (*)"
    )


def _connector_rows(connectors: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]]
    rows = [("connector", "parameters", "FLOPs", "tokens to the LLM", "FLOPs there")]
    for entry in connectors:
        name = entry["name"] + (" *" if entry["recipe"] else "")
        if "refused" in entry:
            rows.append((name, *["-"] * 4))
            continue
        flops = (_short(entry["flops"]), f"{entry['tokens']:,}", _short(entry["language_flops"]))
        rows.append((name, f"{entry['parameters']:,}", *flops))
    return rows


def _columns(rows: list[tuple[str, ...]]) -> str:
    """The first column stands at the left, numbers at the right of theirs."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        (row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))
        for row in rows
    ]
    return table(aligned)


def _short(flops: int) -> str:
    """FLOPs with three digits and their unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999.5 would be written with four digits.
        if flops >= 0.9995 * size:
            digits = 2 if flops < 9.995 * size else 1 if flops < 99.95 * size else 0
            return f"{flops / size:.{digits}f} {unit}"
    return f"{flops}"


def _by(size: list[int]) -> str:
    return f"{size[0]} x {size[1]}"
