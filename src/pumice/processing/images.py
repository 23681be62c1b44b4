"""From an upright RGB picture to the square of numbers a vision backbone reads.

Shapes: S = side of that square in pixels. The three ways equal the reference (LLaVA's
`expand2square`, the centre crop of Hugging Face's CLIP) to the last bit; only pictures whose
crop would take gigabytes go another way, see `LARGEST`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from pumice.core.errors import PumiceError
from pumice.core.images import Transparency
from pumice.core.registry import check_choice, check_settings
from pumice.models.constants import CLIP_MEAN as CLIP_MEAN
from pumice.models.constants import CLIP_STD as CLIP_STD
from pumice.models.constants import Triple as Triple
from pumice.models.tiling import TilingSpec
from pumice.processing.shrink import pays, shrink_padded

Mode = Literal["pad", "crop", "resize"]
Resample = Literal["bicubic", "bilinear", "lanczos"]

# No intermediate picture has more pixels: a crop of 20,000 x 10 would first be enlarged to 0.7 GB.
LARGEST = 4096 * 4096

_FILTERS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageSpec:
    """How pictures become tensors. `pad_color` None is the mean colour, as in LLaVA-1.5.

    With `tiling` a picture is cut into tiles, and `mode` makes the view of the whole beside them.
    `transparency` is what becomes of see-through pixels when the picture is opened.
    """

    mode: Mode
    size: int
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    pad_color: tuple[int, int, int] | None = None
    resample: Resample = "bicubic"
    tiling: TilingSpec | None = None
    transparency: Transparency = "white"

    def __post_init__(self) -> None:
        check_choice("image mode", self.mode, get_args(Mode))
        check_choice("image resample", self.resample, get_args(Resample))
        check_choice("image transparency", self.transparency, get_args(Transparency))
        if not isinstance(self.size, int) or self.size < 1:
            raise PumiceError(
                f"image size is {self.size!r}; a whole number of pixels from 1 is allowed. Use the "
                f"vision backbone's image_size."
            )
        for name in ("mean", "std", "pad_color"):
            _check_triple(name, getattr(self, name))
        if min(self.std) <= 0:
            raise PumiceError(
                f"image std is {self.std}; every value must be above 0. Copy image_std from the "
                f"vision backbone's preprocessor_config.json."
            )

    @property
    def canvas_color(self) -> tuple[int, int, int]:
        """The colour round a padded picture."""
        if self.pad_color is not None:
            return self.pad_color
        red, green, blue = self.mean
        return int(red * 255), int(green * 255), int(blue * 255)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads them back."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.tiling is not None:
            values["tiling"] = self.tiling.to_dict()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageSpec:
        """Strict: an unknown or missing key is an error."""
        check_settings("image", values, list(cls.__dataclass_fields__), ("mode", "size"))
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        if settings.get("tiling") is not None:
            settings["tiling"] = TilingSpec.from_dict(settings["tiling"])
        return cls(**settings)


def preprocess(
    image: PIL.Image.Image, spec: ImageSpec, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RGB picture -> float[3, S, S], normalised float32; `out`, contiguous, if it is given."""
    if image.mode != "RGB":
        raise PumiceError(
            f"a picture of mode {image.mode} was given; RGB is needed. Open it with "
            f"pumice.core.images.open_image, which converts every kind rightly."
        )
    if out is None:
        out = torch.empty(3, spec.size, spec.size)
    values = out.numpy()
    if spec.mode == "pad" and pays(image, spec.size, LARGEST, spec.resample):
        _fill_shrunk(image, spec, values)
        return out
    fit = {"pad": _pad, "crop": _crop, "resize": _resize}[spec.mode]
    # Pillow's own way to lay the colours of a row one after the other: one pass instead of three.
    lines = np.frombuffer(fit(image, spec).tobytes("raw", "RGB;L"), np.uint8)
    levels = lines.reshape(spec.size, 3, spec.size)
    _normalised(levels.swapaxes(0, 1), spec, out=values)
    return out


def _fill_shrunk(image: PIL.Image.Image, spec: ImageSpec, values: NDArray[np.float32]) -> None:
    """A padded picture that becomes smaller, the quick way -> float32[3, S, S]."""
    levels, top, left = shrink_padded(image, spec.size, spec.canvas_color, spec.resample)
    bottom, right = top + levels.shape[0], left + levels.shape[2]
    color = _normalised(np.array(spec.canvas_color)[:, None, None], spec)
    values[:, :top] = values[:, bottom:] = color
    values[:, top:bottom, :left] = values[:, top:bottom, right:] = color
    _normalised(levels.swapaxes(0, 1), spec, out=values[:, top:bottom, left:right])


def _normalised(
    levels: NDArray[Any], spec: ImageSpec, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Levels of 0 to 255, [3, rows, columns] -> float32 of the same shape, written to `out`."""
    # Hugging Face divides by 255 in float64; of the 256 levels the quotients are equal.
    # With a number of their type numpy needs no buffer for float32.
    values: NDArray[np.float32] = np.divide(
        levels, np.float32(255), out=out, dtype=np.float32, casting="unsafe"
    )
    values -= np.array(spec.mean, np.float32)[:, None, None]
    values /= np.array(spec.std, np.float32)[:, None, None]
    return values


def _resize(image: PIL.Image.Image, spec: ImageSpec) -> PIL.Image.Image:
    return image.resize((spec.size, spec.size), _FILTERS[spec.resample])


def _pad(image: PIL.Image.Image, spec: ImageSpec) -> PIL.Image.Image:
    """The picture in the middle of a square of its longer side, then that square made S wide.

    Pillow shrinks rows first and columns then, each by itself. So a few rows of the square at a
    time are enough: the same pixels, without a square of gigabytes.
    """
    if image.width == image.height:
        return _resize(image, spec)
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    column = PIL.Image.new("RGB", (spec.size, side), spec.canvas_color)
    rows = max(1, LARGEST // side)
    for start in range(0, image.height, rows):
        stop = min(start + rows, image.height)
        strip = image if rows >= image.height else image.crop((0, start, image.width, stop))
        if image.width < side:
            inside, strip = strip, PIL.Image.new("RGB", (side, stop - start), spec.canvas_color)
            strip.paste(inside, (left, 0))
        narrow = strip.resize((spec.size, stop - start), _FILTERS[spec.resample])
        column.paste(narrow, (0, top + start))
    return _resize(column, spec)


def _crop(image: PIL.Image.Image, spec: ImageSpec) -> PIL.Image.Image:
    """The shorter side made S long, then the middle square."""
    shorter, longer = sorted(image.size)
    longer = int(spec.size * longer / shorter)
    size = (spec.size, longer) if image.width <= image.height else (longer, spec.size)
    left, top = (size[0] - spec.size) // 2, (size[1] - spec.size) // 2
    if spec.size * longer <= LARGEST:
        enlarged = image.resize(size, _FILTERS[spec.resample])
        return enlarged.crop((left, top, left + spec.size, top + spec.size))
    # Only the part that is kept is resized: the same picture up to the rounding of its edges.
    across, down = image.width / size[0], image.height / size[1]
    box = (left * across, top * down, (left + spec.size) * across, (top + spec.size) * down)
    # No filter reaches farther. Of very tall pictures Pillow would turn the order of rows and
    # columns round.
    margin = 4 * math.ceil(max(across, down, 1))
    near = (
        max(0, math.floor(box[0]) - margin),
        max(0, math.floor(box[1]) - margin),
        min(image.width, math.ceil(box[2]) + margin),
        min(image.height, math.ceil(box[3]) + margin),
    )
    shifted = (box[0] - near[0], box[1] - near[1], box[2] - near[0], box[3] - near[1])
    kept = image.crop(near)
    return kept.resize((spec.size, spec.size), _FILTERS[spec.resample], box=shifted)


def _check_triple(name: str, value: object) -> None:
    if value is None and name == "pad_color":
        return
    if isinstance(value, tuple) and len(value) == 3:
        if all(isinstance(part, int | float) for part in value):
            return
    raise PumiceError(
        f"image {name} is {value!r}; three numbers (red, green, blue) are needed. Copy them from "
        f"the vision backbone's preprocessor_config.json."
    )
