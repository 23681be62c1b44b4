"""Cuts an upright RGB picture into the views of its plan.

Shapes: V views (the global view first, then the tiles row by row), S = side of a view in pixels.
"""

from __future__ import annotations

from dataclasses import replace

import PIL.Image
import torch

from pumice.core.errors import PumiceError
from pumice.models.tiling import ImagePlan
from pumice.processing.images import ImageSpec, preprocess

# LLaVA-NeXT pads with black before normalising, LLaVA-1.5-HD as LLaVA-1.5 does.
_NEXT_CANVAS = (0, 0, 0)


def cut_views(image: PIL.Image.Image, plan: ImagePlan, spec: ImageSpec) -> torch.Tensor:
    """RGB picture -> float[V, 3, S, S], normalised float32; S is spec.size and the plan's tile."""
    if image.size != plan.size or spec.size != plan.tile:
        raise PumiceError(
            f"a picture of {image.width} x {image.height} was given with views of {spec.size} "
            f"pixels, but the plan is for {plan.size[0]} x {plan.size[1]} and tiles of "
            f"{plan.tile}. Plan the upright picture, with the side of the vision backbone's "
            f"picture as the tile."
        )
    views = [preprocess(image, global_spec(plan, spec))] if plan.global_view else []
    picture = canvas(image, plan, spec)
    for col, row in plan.places:
        box = (col * plan.tile, row * plan.tile, (col + 1) * plan.tile, (row + 1) * plan.tile)
        # Exactly S x S: any mode leaves it as it is.
        views.append(preprocess(picture.crop(box), spec))
    return torch.stack(views)


def canvas(image: PIL.Image.Image, plan: ImagePlan, spec: ImageSpec) -> PIL.Image.Image:
    """The picture fitted into the middle of its grid of tiles."""
    color = _NEXT_CANVAS if plan.scheme == "next" else spec.canvas_color
    picture = PIL.Image.new("RGB", plan.target, color)
    resample = PIL.Image.Resampling[spec.resample.upper()]
    picture.paste(image.resize(plan.resized, resample), plan.offset)
    return picture


def global_spec(plan: ImagePlan, spec: ImageSpec) -> ImageSpec:
    """How the whole picture becomes one view: padded to a square (`hd`) or squeezed (`next`)."""
    return replace(spec, mode="resize" if plan.scheme == "next" else "pad")
