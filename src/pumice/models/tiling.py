"""How one picture becomes several views, and their features one sequence: pure geometry.

`hd` is LLaVA-1.5-HD (arXiv 2310.03744, appendix A.1): the picture is fitted into the grid of tiles
that keeps most of its detail, each tile is encoded by itself, the features are put together again
to one map, those of pure padding are left out, each row of the map ends in a learnt row-end
token, and the whole picture in one small view stands before it. `next` is LLaVA-NeXT as
transformers implements it, to the token.

Shapes: V views of a picture (the global view first, then the tiles row by row), Q tokens of a view,
D model width, T image tokens of a picture, s = side of the map of tokens (or patches) of one view.
Pairs are (x, y), as in (width, height) and (columns, rows), unless they say rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from pumice.core.errors import PumiceError
from pumice.core.registry import check_choice, check_settings

Scheme = Literal["hd", "next"]
Keep = Literal["cover", "floor"]
Pair = tuple[int, int]

HD_TILES = 6
# As transformers lists them; the order decides between equally good ones.
NEXT_GRIDS: tuple[Pair, ...] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))


@dataclass(frozen=True)
class TilingSpec:
    """How pictures are cut. What is left out is filled in, so a saved spec says everything."""

    scheme: Scheme
    tile: int
    """Side of a tile in pixels: the side of the vision backbone's picture."""
    max_tiles: int | None = None
    """All grids of at most so many tiles; for `hd` without `grids`, where it is 6."""
    grids: tuple[Pair, ...] | None = None
    """The (columns, rows) to choose from; between equally good ones the first is taken."""
    global_view: bool = True
    """Whether the whole picture in one view stands before the tiles."""
    keep: Keep | None = None
    """Which features stay: `cover` every one that shows some picture (for `hd`), `floor` as many
    whole ones as the picture is long (LLaVA's rule, for `next`), which loses partly filled ones."""

    def __post_init__(self) -> None:
        check_choice("tiling scheme", self.scheme, get_args(Scheme))
        _check_whole("tile", self.tile, "Use the image_size of the vision backbone.")
        if self.max_tiles is not None:
            _check_whole("max_tiles", self.max_tiles, "LLaVA-1.5-HD has 6.")
        if not isinstance(self.global_view, bool):
            raise PumiceError(
                f"tiling global_view is {self.global_view!r}; true or false is needed."
            )
        fill = object.__setattr__
        if self.keep is None:
            fill(self, "keep", "cover" if self.scheme == "hd" else "floor")
        check_choice("tiling keep", self.keep, get_args(Keep))
        if self.max_tiles is not None and (self.grids is not None or self.scheme == "next"):
            raise PumiceError(
                f"tiling max_tiles is {self.max_tiles} beside "
                f"{'the scheme next' if self.grids is None else 'a list of grids'}; it only makes "
                f"the list of hd. Leave max_tiles out, or leave only the grids you want in grids."
            )
        if self.grids is not None:
            fill(self, "grids", _checked_grids(self.grids))
        elif self.scheme == "next":
            fill(self, "grids", NEXT_GRIDS)
        elif self.max_tiles is None:
            fill(self, "max_tiles", HD_TILES)

    @property
    def candidates(self) -> tuple[Pair, ...]:
        """The (columns, rows) a picture's grid is chosen from, in order."""
        if self.grids is not None:
            return self.grids
        assert self.max_tiles is not None  # filled in by __post_init__
        return grids_up_to(self.max_tiles)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads them back."""
        values = asdict(self)
        if self.grids is not None:
            values["grids"] = [list(grid) for grid in self.grids]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TilingSpec:
        """Strict: an unknown or missing key is an error."""
        check_settings("tiling", values, list(cls.__dataclass_fields__), ("scheme", "tile"))
        return cls(**values)

    @classmethod
    def from_pinpoints(
        cls, pinpoints: Sequence[Sequence[int]], tile: int, scheme: Scheme = "next"
    ) -> TilingSpec:
        """From (height, width) in pixels, as `image_grid_pinpoints` of transformers has them."""
        grids = []
        for height, width in pinpoints:
            if height % tile or width % tile:
                raise PumiceError(
                    f"the pinpoint {width} x {height} is not made of tiles of {tile} x {tile} "
                    f"pixels. Use multiples of {tile}."
                )
            grids.append((width // tile, height // tile))
        return cls(scheme, tile, grids=tuple(grids))

    def pinpoints(self) -> list[list[int]]:
        """The candidates as [height, width] in pixels, for transformers."""
        return [[rows * self.tile, cols * self.tile] for cols, rows in self.candidates]


class TokenCounts(NamedTuple):
    """The image tokens of one picture by kind; `removed` are features left out as padding."""

    global_view: int
    tiles: int
    row_end: int
    removed: int
    total: int

    def to_dict(self) -> dict[str, int]:
        """With the names of `pumice tiles --json`."""
        values = self._asdict()
        return {"global": values.pop("global_view"), **values}


@dataclass(frozen=True)
class ImagePlan:
    """What happens to one picture. Sizes and places in pixels, the kept part in features."""

    size: Pair
    """The picture as it came."""
    scheme: Scheme
    tile: int
    grid: Pair
    """Columns and rows of tiles."""
    resized: Pair
    """The picture as it stands on the canvas."""
    offset: Pair
    """Its left upper corner there."""
    tile_rows: Pair
    tile_cols: Pair
    """First and behind the last row and column of tiles that are views. `hd` leaves out tiles of
    pure padding, which are rare; `next` encodes all, as transformers does."""
    keep_rows: Pair
    keep_cols: Pair
    """The same of the merged feature map of the whole canvas. With a connector whose tokens have no
    places (side None) its rows and columns are the tiles."""
    side: int | None
    """Side of one view's map of tokens; None when its tokens have no places."""
    global_view: bool
    tokens: TokenCounts

    @property
    def target(self) -> Pair:
        """Width and height of the canvas."""
        return self.grid[0] * self.tile, self.grid[1] * self.tile

    @property
    def places(self) -> tuple[Pair, ...]:
        """(column, row) of each tile that is a view, in the order of the views."""
        return tuple((col, row) for row in range(*self.tile_rows) for col in range(*self.tile_cols))

    @property
    def views(self) -> int:
        """How many S x S pictures go through the vision backbone."""
        return int(self.global_view) + len(self.places)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the names of `pumice tiles --json`."""
        return {
            "target": list(self.target),
            "grid": list(self.grid),
            "tile": self.tile,
            "tokens": self.tokens.to_dict(),
            "scheme": self.scheme,
            "size": list(self.size),
            "resized": list(self.resized),
            "offset": list(self.offset),
            "views": self.views,
            "kept": {"rows": list(self.keep_rows), "columns": list(self.keep_cols)},
        }


def plan_image(size: Pair, spec: TilingSpec, side: int | None, tokens_per_view: int) -> ImagePlan:
    """The plan of a picture of `size` (width, height).

    `side` and `tokens_per_view` are the connector's: side * side = tokens_per_view, or side None.
    """
    width, height = size
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        raise PumiceError(
            f"an image size is {width} x {height}; whole numbers of pixels from 1 are needed."
        )
    if side is not None and side * side != tokens_per_view:
        raise PumiceError(
            f"a map of {side} x {side} tokens has {side * side}, but a view gives "
            f"{tokens_per_view}. Give side None for tokens that do not stand in a square."
        )
    return _plan((width, height), spec, side, tokens_per_view)


@lru_cache(maxsize=16384)
def _plan(size: Pair, spec: TilingSpec, side: int | None, tokens_per_view: int) -> ImagePlan:
    grid = choose_grid(size, spec)
    target = grid[0] * spec.tile, grid[1] * spec.tile
    resized = fit_size(size, target)
    offset = (target[0] - resized[0]) // 2, (target[1] - resized[1]) // 2
    across, down = ((start, start + long) for start, long in zip(offset, resized, strict=True))
    tile_cols, tile_rows = _touched(across, spec.tile, 1), _touched(down, spec.tile, 1)
    keep_cols, keep_rows = tile_cols, tile_rows
    if side is not None:
        keep_cols, keep_rows = (_touched(span, spec.tile, side) for span in (across, down))
    if side is not None and spec.scheme == "next":
        # transformers encodes the tiles of pure padding too; query connectors it has not.
        tile_cols, tile_rows = (0, grid[0]), (0, grid[1])
    if side is not None and spec.keep == "floor":
        whole = _unpadded(size, (grid[0] * side, grid[1] * side))
        # The floor of a very thin picture is nothing, which only a global view makes up for.
        if spec.global_view or all(first < last for first, last in whole):
            keep_cols, keep_rows = whole
    return ImagePlan(
        size=size,
        scheme=spec.scheme,
        tile=spec.tile,
        grid=grid,
        resized=resized,
        offset=offset,
        tile_rows=tile_rows,
        tile_cols=tile_cols,
        keep_rows=keep_rows,
        keep_cols=keep_cols,
        side=side,
        global_view=spec.global_view,
        tokens=_count(grid, keep_rows, keep_cols, side, tokens_per_view, spec.global_view),
    )


def _count(
    grid: Pair, rows: Pair, cols: Pair, side: int | None, tokens_per_view: int, global_view: bool
) -> TokenCounts:
    height, width = rows[1] - rows[0], cols[1] - cols[0]
    tiles = height * width * (tokens_per_view if side is None else 1)
    first = tokens_per_view if global_view else 0
    removed = grid[0] * grid[1] * tokens_per_view - tiles
    return TokenCounts(first, tiles, height, removed, first + tiles + height)


def choose_grid(size: Pair, spec: TilingSpec) -> Pair:
    """The (columns, rows) that keep most detail of a picture, then waste least of the canvas.

    Detail is the number of the picture's own pixels that remain; enlarging adds none. The sums are
    those of LLaVA and transformers, their rounding included.
    """
    width, height = size
    # A side that rounds to nothing would make all grids alike; transformers has them so.
    least = 0 if spec.scheme == "next" else 1

    def worth(grid: Pair) -> tuple[int, int]:
        across, down = grid[0] * spec.tile, grid[1] * spec.tile
        scale = min(across / width, down / height)
        shown = max(least, int(width * scale)) * max(least, int(height * scale))
        detail = min(shown, width * height)
        return detail, detail - across * down

    # Of equal ones max takes the first.
    return max(spec.candidates, key=worth)


@lru_cache(maxsize=64)
def grids_up_to(tiles: int) -> tuple[Pair, ...]:
    """Every (columns, rows) of at most so many tiles: few before many, then square, then wide."""
    found = [(c, r) for c in range(1, tiles + 1) for r in range(1, tiles // c + 1)]
    return tuple(sorted(found, key=lambda g: (g[0] * g[1], abs(g[0] - g[1]), -g[0])))


def fit_size(size: Pair, target: Pair) -> Pair:
    """Width and height of a picture enlarged or shrunk to touch the canvas; rounded up."""
    across, down = target[0] / size[0], target[1] / size[1]
    if across < down:
        return target[0], min(math.ceil(size[1] * across), target[1])
    return min(math.ceil(size[0] * down), target[0]), target[1]


def _touched(span: Pair, tile: int, side: int) -> Pair:
    """The cells, `side` to a tile, that hold any of the pixels span[0] .. span[1] - 1."""
    return span[0] * side // tile, -(-span[1] * side // tile)


def _unpadded(size: Pair, cells: Pair) -> tuple[Pair, Pair]:
    """Columns and rows LLaVA's `unpad_image` keeps of a map of `cells`; in whole numbers."""
    (width, height), (cols, rows) = size, cells
    if width * rows > height * cols:
        gap = (rows - height * cols // width) // 2
        return (0, cols), (gap, rows - gap)
    gap = (cols - width * rows // height) // 2
    return (gap, cols - gap), (0, rows)


def merge_views(features: torch.Tensor, plan: ImagePlan, row_end: torch.Tensor) -> torch.Tensor:
    """float[V, Q, D], float[D] -> float[T, D]: the global view, then the merged map row by row.

    Each row of the kept map ends in `row_end`.
    """
    views, tokens, dim = features.shape
    wanted = tokens if plan.side is None else plan.side**2
    if views != plan.views or tokens != wanted:
        raise PumiceError(
            f"features of {views} views of {tokens} tokens were given for a picture of "
            f"{plan.size[0]} x {plan.size[1]} that has {plan.views} views of {wanted}. Cut the "
            f"picture and plan it with the same tiling."
        )
    first = int(plan.global_view)
    height, width = (last - start for start, last in (plan.tile_rows, plan.tile_cols))
    tiles = features[first:]
    if plan.side is None:
        merged = tiles.reshape(height, width * tokens, dim)
    else:
        merged = tiles.reshape(height, width, plan.side, plan.side, dim).transpose(1, 2)
        merged = merged.reshape(height * plan.side, width * plan.side, dim)
        up, left = plan.tile_rows[0] * plan.side, plan.tile_cols[0] * plan.side
        (r0, r1), (c0, c1) = plan.keep_rows, plan.keep_cols
        merged = merged[r0 - up : r1 - up, c0 - left : c1 - left]
    ends = row_end.to(features.dtype).expand(merged.shape[0], 1, dim)
    rows = torch.cat((merged, ends), dim=1).flatten(0, 1)
    return torch.cat((features[:first].flatten(0, 1), rows))


def picture_mask(plan: ImagePlan, side: int) -> torch.Tensor:
    """bool[V, side * side]: which patches of each view, `side` to its width, hold any picture."""
    cols, rows = (
        torch.zeros(cells * side, dtype=torch.bool) for cells in (plan.grid[0], plan.grid[1])
    )
    for flags, start, length in zip((cols, rows), plan.offset, plan.resized, strict=True):
        first, last = _touched((start, start + length), plan.tile, side)
        flags[first:last] = True
    by_tile = rows.view(-1, 1, side, 1) & cols.view(1, -1, 1, side)
    kept = by_tile[slice(*plan.tile_rows), slice(*plan.tile_cols)].reshape(-1, side * side)
    return torch.cat((_global_mask(plan, side)[: int(plan.global_view)], kept))


def _global_mask(plan: ImagePlan, side: int) -> torch.Tensor:
    """bool[1, side * side] of the view of the whole picture: padded by `hd`, squeezed by `next`."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    longest = max(plan.size)
    spans = []
    for length in plan.size:
        start = 0 if plan.scheme == "next" else (longest - length) // 2
        whole = longest if plan.scheme == "next" else start + length
        spans.append(slice(*_touched((start, whole), longest, side)))
    mask[spans[1], spans[0]] = True
    return mask.view(1, -1)


def _check_whole(name: str, given: object, remedy: str) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise PumiceError(f"tiling {name} is {given!r}; a whole number from 1 is needed. {remedy}")


def _checked_grids(grids: Sequence[Sequence[int]]) -> tuple[Pair, ...]:
    fault = PumiceError(
        f"tiling grids is {grids!r}; a list of (columns, rows) is needed, such as [[1, 2], [2, 1]]."
    )
    if not isinstance(grids, list | tuple) or not grids:
        raise fault
    for grid in grids:
        if not isinstance(grid, list | tuple) or len(grid) != 2:
            raise fault
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in grid):
            raise fault
    return tuple((grid[0], grid[1]) for grid in grids)
