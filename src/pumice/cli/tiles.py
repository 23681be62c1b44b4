"""`pumice tiles`: what tiling does to one image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from pumice.cli.options import JsonOption, example
from pumice.cli.output import note, say, say_json, table
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.models.tiling import ImagePlan, TilingSpec
    from pumice.recipe.schema import Recipe

_PATCH = 14
_TILES = {"hd": 224, "next": 336}
# Side of the picture and of a patch of published backbones: a drawing needs no download.
_PUBLISHED = {
    "openai/clip-vit-large-patch14": (224, 14),
    "openai/clip-vit-large-patch14-336": (336, 14),
}


class _Setting(NamedTuple):
    """What a picture's plan depends on beside its size."""

    spec: TilingSpec
    side: int | None
    tokens_per_view: int


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    line = "pumice tiles photo.jpg --out tiles.png"
    app.command("tiles", epilog=example(line, "pumice tiles photo.jpg --scheme next --json"))(tiles)


def tiles(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME", help="Tile as this recipe does.")
    ] = None,
    scheme: Annotated[
        Literal["hd", "next"] | None,
        typer.Option("--scheme", help="hd (LLaVA-1.5-HD, when left out) or next (LLaVA-NeXT)."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option("--tile", min=_PATCH, help="Pixels of a tile, patches of 14.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PNG", help="Draw it into this file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what tiling does to an image.

    Its grid of tiles, the padding left out, the row ends, the global view and the image tokens;
    as LLaVA-1.5-HD does it when no recipe is named.
    """
    from pumice.core.images import image_size, open_image
    from pumice.models.tiling import plan_image

    setting = _by_options(scheme, tile) if recipe is None else _by_recipe(recipe, scheme, tile)
    if out is None:
        plan = plan_image(image_size(image), *setting)
    else:
        picture = open_image(image)
        plan = plan_image(picture.size, *setting)
        _draw(picture, plan, out)
    if as_json:
        say_json(plan.to_dict())
    else:
        say(_text(plan))
    if out is not None:
        note(f"drawn into {out}")


def _by_options(scheme: Literal["hd", "next"] | None, tile: int | None) -> _Setting:
    from pumice.models.tiling import TilingSpec

    scheme = scheme or "hd"
    tile = tile or _TILES[scheme]
    side = tile // _PATCH
    return _Setting(TilingSpec(scheme, tile), side, side * side)


def _by_recipe(name: str, scheme: str | None, tile: int | None) -> _Setting:
    """As a recipe has it; nothing is downloaded or built at full size."""
    from pumice.models.tiling import TilingSpec
    from pumice.recipe.load import load_recipe

    if scheme is not None or tile is not None:
        raise PumiceError(
            f"--scheme and --tile were given beside --recipe {name}, which decides both. Leave "
            f"them out, or leave out --recipe."
        )
    recipe = load_recipe(name)
    model = recipe.model
    if model.image not in ("hd", "next"):
        raise PumiceError(
            f"recipe {recipe.name!r} makes one view of every picture (image: {model.image}); "
            f"there are no tiles to show. Name a recipe whose image is hd or next."
        )
    size, patches = _view(recipe)
    spec = TilingSpec.from_dict({"scheme": model.image, "tile": size, **model.tiling})
    return _Setting(spec, *_connector_tokens(recipe, patches))


def _view(recipe: Recipe) -> tuple[int, int]:
    """Side in pixels and number of patches of one view of a recipe's first vision backbone."""
    from pumice.core.files import read_json
    from pumice.core.shipped import resolve_backbone

    names = recipe.model.vision
    name = names if isinstance(names, str) else names[0]
    if name in _PUBLISHED and not Path(name).is_dir():
        size, patch = _PUBLISHED[name]
    else:
        config: dict[str, Any] = read_json(resolve_backbone(name) / "config.json")
        config = config.get("vision_config", config)
        size, patch = config["image_size"], config["patch_size"]
    return size, (size // patch) ** 2


def _connector_tokens(recipe: Recipe, patches: int) -> tuple[int | None, int]:
    """Side and number of the tokens the recipe's connector makes of one view."""
    import torch

    from pumice.models.connectors import build_connector

    model = recipe.model
    patches += model.vision_select == "cls_patch"
    # Widths change neither; on the meta device nothing is allocated.
    with torch.device("meta"):
        connector = build_connector(
            model.connector, 1024, 4096, patches, model.connector_options, vocab_size=32000
        )
    return connector.side, connector.num_tokens


def _draw(picture: Any, plan: ImagePlan, out: Path) -> None:
    import io

    from pumice.core.files import write_atomic
    from pumice.processing.images import ImageSpec
    from pumice.processing.tile_drawing import draw_plan

    buffer = io.BytesIO()
    draw_plan(picture, plan, ImageSpec("pad", plan.tile)).save(buffer, "PNG")
    write_atomic(out, buffer.getvalue())


def _text(plan: ImagePlan) -> str:
    counts = plan.tokens
    where = f"{_by(plan.resized)} at {plan.offset[0]}, {plan.offset[1]}"
    views = f"{len(plan.places)} tiles" + (" and the global view" if plan.global_view else "")
    rows = (
        ("picture", _by(plan.size)),
        ("scheme", f"{plan.scheme}, tiles of {plan.tile}"),
        ("target", f"{_by(plan.target)} = {_by(plan.grid)} tiles; the picture {where}"),
        ("views", f"{plan.views}: {views}"),
        ("tokens", f"{counts.total}"),
        ("", f"{counts.global_view} global view"),
        ("", f"{counts.tiles} tiles, {counts.removed} left out"),
        ("", f"{counts.row_end} row ends"),
    )
    return table(rows)


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"
