"""Two vision backbones on one patch grid: their features side by side, channel-wise.

Shapes: N images or tiles, S side of the first backbone's pictures, P patches, Da and Db widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pumice.core.errors import PumiceError
from pumice.models.feature_cache import FeatureCache
from pumice.models.pretrained import config_to_dict, read_config
from pumice.models.vision import SIDE, Select, Triple, VisionBackbone, read_image_stats, vision_part

ImageStats = tuple[Triple, Triple]
"""Mean and std of the pictures a backbone reads."""
_KEYS = ("pair", "image_stats")


class VisionPair(nn.Module):
    """`float[N, 3, S, S] -> float[N, P, Da + Db]`, with what a `VisionBackbone` offers.

    The picture comes as the first backbone wants it. The second gets the same picture, resized
    (bilinear) to its side and normalised by its own mean and std. `layer` and `norm` hold for both.
    """

    def __init__(
        self,
        first: VisionBackbone,
        second: VisionBackbone,
        image_stats: tuple[ImageStats, ImageStats],
    ) -> None:
        super().__init__()
        if first.select != "patch" or second.select != "patch":
            raise PumiceError(
                f"vision_select is {first.select!r} for a pair of vision backbones; only patch is "
                f"allowed, for class tokens and registers of two families do not match. Use patch."
            )
        if first.num_patches != second.num_patches:
            raise PumiceError(
                f"the pair of vision backbones gives {first.num_patches} and {second.num_patches} "
                f"patches for one picture ({_told(first)}; {_told(second)}); both must give the "
                f"same grid. Choose backbones whose side divided by patch size is equal."
            )
        self.first = first
        self.second = second
        self.image_stats = image_stats
        self.layer = first.layer
        self.select = first.select
        self.norm = first.norm
        self.hidden_size = first.hidden_size + second.hidden_size
        self.image_size = first.image_size
        self.patch_size = first.patch_size
        self.num_patches = first.num_patches
        self.num_prefix_tokens = 0

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        layer: int,
        select: Select,
        norm: bool = False,
        attention: str | None = None,
        init: bool = True,
    ) -> VisionPair:
        """The pair whose `config_data` is `config`."""
        members, stats = _read_data(config)
        first, second = (
            VisionBackbone.build(member, layer, select, norm, attention, init) for member in members
        )
        assert isinstance(first, VisionBackbone) and isinstance(second, VisionBackbone)
        return cls(first, second, stats)

    @classmethod
    def from_folders(
        cls,
        paths: Sequence[Path | str],
        layer: int,
        select: Select,
        *,
        norm: bool = False,
        attention: str | None = None,
    ) -> VisionPair:
        """Two Hugging Face folders; pictures come as the first one's preprocessing makes them.

        The second reads them at the side that gives it the grid of the first: its own side where
        that fits, else it interpolates its positions, or is refused with both numbers.
        """
        if len(paths) != 2:
            raise PumiceError(
                f"{len(paths)} vision backbones are given ({', '.join(map(str, paths))}); one, or "
                f"two as a fused pair, are allowed."
            )
        first = VisionBackbone.from_folder(paths[0], layer, select, norm=norm, attention=attention)
        second = VisionBackbone.from_folder(
            paths[1],
            layer,
            select,
            norm=norm,
            attention=attention,
            image_size=_side_for_grid(paths[1], first.image_size // first.patch_size),
        )
        assert isinstance(first, VisionBackbone) and isinstance(second, VisionBackbone)
        stats = [read_image_stats(path)[1:] for path in paths]
        return cls(first, second, (stats[0], stats[1]))

    @property
    def config_data(self) -> dict[str, Any]:
        """What `build` reads: the data of both backbones, and mean and std of their pictures."""
        stats = [{"mean": list(mean), "std": list(std)} for mean, std in self.image_stats]
        members = [self.first.config_data, self.second.config_data]
        return {"pair": members, "image_stats": stats}

    @property
    def num_tokens(self) -> int:
        """P, the features that come out for one image."""
        return self.num_patches

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[N, 3, S, S] -> float[N, P, Da + Db]; frozen backbones keep no graph."""
        second = self.second(self._for_second(pixel_values))
        return torch.cat([self.first(pixel_values), second], dim=-1)

    def use_cache(self, cache: FeatureCache | None) -> None:
        """As `VisionBackbone.use_cache`; each backbone has its own entries."""
        self.first.use_cache(cache)
        self.second.use_cache(cache)

    def _for_second(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[N, 3, S, S] -> the same pictures as the second backbone reads them."""
        pixels = pixel_values.float()
        side = self.second.image_size
        if side != pixels.shape[-1] and len(pixels):
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        # Made here and not kept as buffers, which a model built on the meta device would lose.
        (mean, std), (own_mean, own_std) = (
            [pixels.new_tensor(values).view(3, 1, 1) for values in stats]
            for stats in self.image_stats
        )
        return ((pixels * std + mean - own_mean) / own_std).to(pixel_values.dtype)


def _side_for_grid(folder: Path | str, grid: int) -> int:
    """The side in pixels at which a folder's backbone gives `grid` x `grid` patches."""
    patch: int = vision_part(read_config(folder, part="vision backbone")).patch_size
    own = read_image_stats(folder)[0]
    return own if own // patch == grid else grid * patch


def _read_data(
    config: dict[str, Any],
) -> tuple[tuple[dict[str, Any], dict[str, Any]], tuple[ImageStats, ImageStats]]:
    try:
        if set(config) != set(_KEYS):
            raise ValueError(f"its keys are {', '.join(config)}")
        first, second = config["pair"]
        one, other = (
            (_triple(stats["mean"]), _triple(stats["std"])) for stats in config["image_stats"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PumiceError(
            f"the config of a pair of vision backbones cannot be read: {error}. It holds `pair`, "
            f"the configs of two backbones, and `image_stats`, mean and std (three numbers each) "
            f"of both. Take the config.json the checkpoint was saved with."
        ) from error
    return (dict(first), dict(second)), (one, other)


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _told(backbone: VisionBackbone) -> str:
    kind = backbone.config.model_type
    return f"{kind}: {backbone.image_size} pixels in patches of {backbone.patch_size}"


# What an LMM sees pictures with.
Vision = VisionBackbone | VisionPair


def vision_data(paths: Sequence[Path | str]) -> dict[str, Any]:
    """What `VisionBackbone.build` reads, from the configs of one or two folders; no weights."""
    first = _folder_data(paths[0], None)
    if len(paths) == 1:
        return first
    stats = [read_image_stats(path)[1:] for path in paths]
    side = first.get(SIDE, first["image_size"])
    second = _folder_data(paths[1], _side_for_grid(paths[1], side // first["patch_size"]))
    return {
        "pair": [first, second],
        "image_stats": [{"mean": list(mean), "std": list(std)} for mean, std in stats],
    }


def _folder_data(path: Path | str, side: int | None) -> dict[str, Any]:
    config = vision_part(read_config(path, part="vision backbone"))
    side = side or read_image_stats(path)[0]
    return config_to_dict(config) | ({} if side == config.image_size else {SIDE: side})
