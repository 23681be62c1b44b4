"""transformers' image preparation (preprocessor_config.json, processor_config.json) and ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.models.tiling import TilingSpec
from pumice.processing.images import CLIP_MEAN, CLIP_STD, ImageSpec, Resample

# PIL's numbers, as these files hold them.
_FILTERS: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
_NUMBERS = {name: number for number, name in _FILTERS.items()}


def read_image_settings(directory: Path) -> dict[str, Any]:
    """What a folder says of its image preparation; {} where it says nothing."""
    whole, alone = directory / "processor_config.json", directory / "preprocessor_config.json"
    nested = read_json(whole).get("image_processor") if whole.is_file() else None
    if isinstance(nested, dict):
        return nested
    data = read_json(alone) if alone.is_file() else {}
    return data if isinstance(data, dict) else {}


def image_spec(directory: Path, side: int, tiling: TilingSpec | None = None) -> ImageSpec:
    """The image preparation of a transformers folder for views of `side` pixels."""
    data = read_image_settings(directory)
    if not data:
        raise PumiceError(
            f"{directory} does not say how images are prepared: it has no preprocessor_config.json "
            f"and no image_processor in processor_config.json. Copy the file of the published "
            f"checkpoint there."
        )
    found = _side(data)
    if found != side and tiling is None:
        raise PumiceError(
            f"the image preparation of {directory} makes pictures of {found} pixels, and its "
            f"vision backbone reads {side}. Take both files from one checkpoint."
        )
    refused = [
        name for name in ("do_rescale", "do_normalize", "do_resize") if data.get(name) is False
    ]
    if refused:
        raise PumiceError(
            f"the image preparation of {directory} leaves out {', '.join(refused)}; pictures that "
            f"are resized, rescaled and normalised are allowed. Set it to true if that is wrong."
        )
    mean, std = data.get("image_mean") or CLIP_MEAN, data.get("image_std") or CLIP_STD
    number = data.get("resample", 3)
    if number not in _FILTERS:
        raise PumiceError(
            f"the image preparation of {directory} has resample {number!r}; allowed: "
            f"{', '.join(f'{n} ({name})' for n, name in _FILTERS.items())}."
        )
    mode = "pad" if data.get("do_pad") and tiling is None else "crop"
    if _is_stretched(data) and mode == "crop":
        mode = "resize"
    return ImageSpec(
        mode,  # type: ignore[arg-type]
        side,
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
        resample=_FILTERS[number],
        tiling=tiling,
        transparency="ignored",
    )


def image_settings(spec: ImageSpec) -> dict[str, Any]:
    """An image preparation as transformers writes it; what it has no class for is refused."""
    side = {"height": spec.size, "width": spec.size}
    data: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": _NUMBERS[spec.resample],
        "rescale_factor": 1 / 255,
    }
    crop = {"crop_size": side, "do_center_crop": True, "size": {"shortest_edge": spec.size}}
    if spec.tiling is not None:
        pinpoints = spec.tiling.pinpoints()
        kind = {"image_processor_type": "LlavaNextImageProcessor"}
        return data | crop | kind | {"do_pad": True, "image_grid_pinpoints": pinpoints}
    if spec.mode == "resize":
        return data | {"image_processor_type": "SiglipImageProcessor", "size": side}
    if spec.mode == "crop":
        return data | crop | {"image_processor_type": "CLIPImageProcessor"}
    if not pads_with_mean(spec):
        raise PumiceError(
            f"transformers pads pictures with their mean colour {_mean_color(spec)}, and this "
            f"model was made with pad_color {spec.pad_color}; it cannot be written as hf. Use "
            f"--to pumice."
        )
    return data | crop | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}


def pads_with_mean(spec: ImageSpec) -> bool:
    """Whether a picture that is padded is padded with the mean colour."""
    return spec.mode != "pad" or spec.canvas_color == _mean_color(spec)


def _side(data: Mapping[str, Any]) -> int | None:
    crop = data.get("crop_size") if data.get("do_center_crop", True) else None
    for size in (crop, data.get("size")):
        if isinstance(size, int):
            return size
        if isinstance(size, dict):
            height, width = size.get("height"), size.get("width")
            if isinstance(height, int) and height == width:
                return height
            if isinstance(size.get("shortest_edge"), int):
                return int(size["shortest_edge"])
    return None


def _is_stretched(data: Mapping[str, Any]) -> bool:
    """Whether a picture is squeezed to the square: its size says height and width, not one edge."""
    size = data.get("size")
    return isinstance(size, dict) and "height" in size


def _mean_color(spec: ImageSpec) -> tuple[int, int, int]:
    red, green, blue = spec.mean
    return int(red * 255), int(green * 255), int(blue * 255)
