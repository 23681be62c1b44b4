"""Tiling: the geometry of `hd` and `next`, the views cut, the features merged.

The oracles here are naive: masks of pixels, loops over cells, and transformers' LLaVA-NeXT.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import tiny
from pumice.core.errors import PumiceError
from pumice.models.constants import IMAGE_ID
from pumice.models.lmm import LMM
from pumice.models.tiling import (
    ImagePlan,
    TilingSpec,
    TokenCounts,
    choose_grid,
    grids_up_to,
    merge_views,
    picture_mask,
    plan_image,
)
from pumice.processing.images import ImageSpec, preprocess
from pumice.processing.tiles import canvas, cut_views

HD = TilingSpec("hd", 224)
NEXT = TilingSpec("next", 336)
EXTREMES = [(1, 1), (20000, 10), (10, 20000), (1, 3000), (3000, 1), (223, 225), (2016, 673)]
VARIANTS = [
    TilingSpec("hd", 28),
    TilingSpec("hd", 28, keep="floor"),
    TilingSpec("hd", 28, max_tiles=9, global_view=False),
    TilingSpec("hd", 28, max_tiles=4, keep="floor", global_view=False),
    TilingSpec("hd", 28, grids=((3, 3), (5, 1))),
    TilingSpec("next", 28),
    TilingSpec("next", 28, keep="cover"),
    TilingSpec("next", 28, global_view=False),
]


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Widths and heights from 1 to 20000 with every aspect, small ones as frequent as large."""
    draw = random.Random(seed)
    found = [(int(20000 ** draw.random()), int(20000 ** draw.random())) for _ in range(count)]
    return EXTREMES + [(max(1, w), max(1, h)) for w, h in found]


def plan(size: tuple[int, int], spec: TilingSpec, patch: int = 14) -> ImagePlan:
    side = spec.tile // patch
    return plan_image(size, spec, side, side * side)


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["cover", "floor"])
@pytest.mark.parametrize(
    ("size", "total"),
    [
        ((224, 224), 256 + 272),
        ((448, 448), 256 + 1056),
        ((672, 448), 256 + 32 * 49),
        ((1344, 224), 256 + 16 * 97),
        ((224, 1344), 256 + 96 * 17),
    ],
)
def test_token_counts_of_hd_are_the_published_ones(
    size: tuple[int, int], total: int, keep: Any
) -> None:
    found = plan(size, TilingSpec("hd", 224, keep=keep))
    assert found.target == size and found.tokens.total == total
    without = plan(size, TilingSpec("hd", 224, global_view=False))
    assert without.tokens.total == total - 256


def test_token_counts_of_next_are_the_published_ones() -> None:
    assert plan((672, 672), NEXT).tokens == TokenCounts(576, 2304, 48, 0, 2928)
    # No grid of one tile: a small square takes two and loses the padding again.
    assert plan((336, 336), NEXT).grid == (2, 1)
    assert plan((336, 336), NEXT).tokens == TokenCounts(576, 576, 24, 576, 576 + 24 * 25)


def test_a_photograph_of_1920_x_1080() -> None:
    """The numbers of docs/hd.md."""
    found = plan((1920, 1080), HD)
    assert (found.grid, found.target, found.resized) == ((3, 2), (672, 448), (672, 378))
    assert (found.offset, found.views) == ((0, 35), 7)
    assert (found.keep_rows, found.keep_cols) == ((2, 30), (0, 48))
    assert found.tokens == TokenCounts(256, 28 * 48, 28, 4 * 48, 1628)
    # Resized to 378 pixels it is 27 rows long; between rows it touches 28.
    assert plan((1920, 1080), NEXT).tokens.total == 576 + 28 * 49


def test_the_fourteen_grids_of_the_paper() -> None:
    assert len(HD.candidates) == 14 and HD.candidates == grids_up_to(6)
    expected = {(1, n) for n in range(1, 7)} | {(2, 2), (2, 3)}
    assert set(HD.candidates) == expected | {(r, c) for c, r in expected}


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (1, 1)),  # nothing is gained by enlarging
        ((300, 100), (2, 1)),
        ((1000, 1000), (2, 2)),
        ((3000, 1000), (3, 1)),  # three tiles show as much of it as six
        ((20000, 10), (6, 1)),
        ((10, 20000), (1, 6)),
    ],
)
def test_the_grid_keeps_detail_then_saves_tiles(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert choose_grid(size, HD) == grid


def test_between_grids_of_equal_detail_the_least_waste_decides_then_the_order() -> None:
    assert choose_grid((50, 50), TilingSpec("hd", 28, grids=((3, 3), (2, 2), (4, 4)))) == (2, 2)
    assert choose_grid((20, 20), TilingSpec("hd", 28, grids=((1, 2), (2, 1)))) == (1, 2)
    assert choose_grid((20, 20), TilingSpec("hd", 28, grids=((2, 1), (1, 2)))) == (2, 1)


# --- properties over sizes ------------------------------------------------------------------------


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda s: f"{s.scheme}-{s.keep}-{s.max_tiles}")
@pytest.mark.parametrize("side", [1, 2, 3, 4, None])
def test_planned_tokens_are_the_tokens_made(spec: TilingSpec, side: int | None) -> None:
    tokens = 5 if side is None else side * side
    for size in sizes(60, seed=0):
        found = plan_image(size, spec, side, tokens)
        features = torch.zeros(found.views, tokens, 1)
        made = merge_views(features, found, torch.ones(1))
        counts = found.tokens
        assert len(made) == counts.total == counts.global_view + counts.tiles + counts.row_end > 0
        assert int(made.sum()) == counts.row_end
        assert counts.tiles + counts.removed == found.grid[0] * found.grid[1] * tokens
        assert picture_mask(found, 4).shape == (found.views, 16)


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda s: f"{s.scheme}-{s.keep}-{s.max_tiles}")
@pytest.mark.parametrize("side", [2, 3, 4])
def test_kept_features_are_those_that_show_picture(spec: TilingSpec, side: int) -> None:
    for size in sizes(40, seed=1):
        found = plan_image(size, spec, side, side * side)
        shown = shown_cells(found, side)
        kept = torch.zeros_like(shown)
        kept[slice(*found.keep_rows), slice(*found.keep_cols)] = True
        assert not (kept & ~shown).any(), "a feature of pure padding was kept"
        if spec.keep == "cover":
            assert torch.equal(kept, shown), "a pixel of the picture was lost"
        tiles = shown_cells(found, 1)
        encoded = {(col, row) for row, col in tiles.nonzero().tolist()}
        assert encoded <= set(found.places)
        if spec.scheme == "hd":
            assert encoded == set(found.places)


def shown_cells(found: ImagePlan, side: int) -> torch.Tensor:
    """bool[rows, cols] of the whole canvas, from a mask of its pixels: which cells show picture."""
    scale = 12 // side  # 28 * 12 pixels divide by each side tried
    pixels = torch.zeros(found.target[1], found.target[0], dtype=torch.bool)
    (x, y), (width, height) = found.offset, found.resized
    pixels[y : y + height, x : x + width] = True
    fine = pixels.repeat_interleave(12, 0).repeat_interleave(12, 1)
    cell = found.tile * scale
    rows = fine.shape[0] // cell, cell
    return fine.view(*rows, fine.shape[1] // cell, cell).any(3).any(1)


def test_the_picture_mask_is_the_mask_of_pixels() -> None:
    for spec in (TilingSpec("hd", 28), TilingSpec("next", 28)):
        for size in sizes(40, seed=2):
            found = plan_image(size, spec, None, 3)
            mask = picture_mask(found, 4)
            shown = shown_cells(found, 4)
            for view, (col, row) in enumerate(found.places, start=1):
                tile = shown[4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
                assert torch.equal(mask[view], tile.flatten())
            assert mask.any(1).all()  # a query must have something to attend to


@pytest.mark.parametrize("size", [(60, 15), (15, 60), (40, 40), (31, 4), (300, 1), (7, 6)])
def test_the_mask_of_the_global_view_follows_its_padding(size: tuple[int, int]) -> None:
    longest = max(size)
    x, y = ((longest - length) // 2 for length in size)  # as LLaVA-1.5 pads
    pixels = torch.zeros(longest, longest, dtype=torch.bool)
    pixels[y : y + size[1], x : x + size[0]] = True
    fine = pixels.repeat_interleave(4, 0).repeat_interleave(4, 1)
    shown = fine.view(4, longest, 4, longest).any(3).any(1)
    found = plan_image(size, TilingSpec("hd", 32), None, 1)
    assert torch.equal(picture_mask(found, 4)[0], shown.flatten())
    squeezed = plan_image(size, TilingSpec("next", 32), None, 1)
    assert picture_mask(squeezed, 4)[0].all()


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda s: f"{s.scheme}-{s.keep}-{s.max_tiles}")
def test_merging_equals_a_walk_over_the_map(spec: TilingSpec) -> None:
    side = 3
    for size in sizes(15, seed=3):
        found = plan_image(size, spec, side, side * side)
        features = torch.randn(found.views, side * side, 2)
        row_end = torch.randn(2)
        first = int(spec.global_view)
        expected = list(features[0]) if first else []
        for row in range(*found.keep_rows):
            for col in range(*found.keep_cols):
                view = first + found.places.index((col // side, row // side))
                expected.append(features[view, (row % side) * side + col % side])
            expected.append(row_end)
        assert torch.equal(merge_views(features, found, row_end), torch.stack(expected))


def test_pixels_come_back_in_reading_order() -> None:
    """Views of mean colours, merged, are the canvas at the size of its patches."""
    for size in [(90, 50), (50, 90), (17, 17), (200, 20)]:
        image = noise(size)
        found = plan_image(size, TilingSpec("hd", 32), 4, 16)
        spec = ImageSpec("pad", 32)
        patches = torch.nn.functional.avg_pool2d(cut_views(image, found, spec), 8)
        merged = merge_views(patches.flatten(2).transpose(1, 2), found, torch.full((3,), 9.0))
        big = preprocess_whole(canvas(image, found, spec), spec)
        whole = torch.nn.functional.avg_pool2d(big, 8).permute(1, 2, 0)
        kept = whole[slice(*found.keep_rows), slice(*found.keep_cols)]
        rows = merged[16:].view(len(kept), -1, 3)
        assert torch.allclose(rows[:, :-1], kept, atol=1e-6) and (rows[:, -1] == 9).all()
        small = torch.nn.functional.avg_pool2d(preprocess(image, spec), 8)
        assert torch.allclose(merged[:16], small.flatten(1).T, atol=1e-6)


def preprocess_whole(image: PIL.Image.Image, spec: ImageSpec) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)
    return (values - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]


def noise(size: tuple[int, int], seed: int = 0) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def test_query_tokens_stand_tile_after_tile() -> None:
    found = plan_image((60, 40), TilingSpec("hd", 20), None, 2)
    assert found.grid == (3, 2)
    features = torch.arange(14.0).view(7, 2, 1)
    merged = merge_views(features, found, torch.tensor([-1.0])).flatten().tolist()
    assert merged == [0, 1, 2, 3, 4, 5, 6, 7, -1, 8, 9, 10, 11, 12, 13, -1]


def test_tiles_of_pure_padding_are_neither_encoded_nor_kept() -> None:
    # 34 pixels wide in the middle of 120.
    spec = TilingSpec("hd", 20, grids=((6, 1),))
    for side, tokens in ((None, 7), (2, 4)):
        found = plan_image((100, 60), spec, side, tokens)
        assert found.places == ((2, 0), (3, 0)) and found.views == 3
    assert found.tokens.tiles == 2 * 4 and found.keep_cols == (4, 8)
    assert picture_mask(found, 10).sum(1).tolist() == [60, 90, 90]


def test_gradients_reach_features_and_row_end() -> None:
    found = plan((500, 300), TilingSpec("hd", 28))
    features = torch.randn(found.views, 4, 3, requires_grad=True)
    row_end = torch.randn(3, requires_grad=True)
    merge_views(features, found, row_end).sum().backward()
    assert features.grad is not None and row_end.grad is not None
    assert float(row_end.grad[0]) == found.tokens.row_end
    assert float(features.grad.sum()) == 3 * (found.tokens.global_view + found.tokens.tiles)


def test_half_precision_stays() -> None:
    found = plan((500, 300), TilingSpec("hd", 28))
    features = torch.zeros(found.views, 4, 3, dtype=torch.bfloat16)
    assert merge_views(features, found, torch.zeros(3)).dtype == torch.bfloat16


# --- transformers' LLaVA-NeXT ---------------------------------------------------------------------

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def test_next_has_the_grids_of_transformers() -> None:
    assert NEXT.pinpoints() == PINPOINTS
    assert TilingSpec.from_pinpoints(PINPOINTS, 336) == NEXT


@pytest.mark.parametrize("tile", [32, 336])
def test_next_plans_as_transformers(tile: int) -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    spec = TilingSpec("next", tile)
    side = 4 if tile == 32 else 24
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = tile // side, 0
    processor.image_processor = type("Images", (), {"image_grid_pinpoints": spec.pinpoints()})()
    for width, height in sizes(1500, seed=4):
        found = plan_image((width, height), spec, side, side * side)
        target = select_best_resolution((height, width), spec.pinpoints())
        assert found.target == target[::-1], (width, height)
        expected = processor._get_number_of_features(height, width, tile, tile)
        assert found.tokens.total == expected, (width, height)


def test_hd_with_floor_is_the_rule_of_transformers_on_other_grids() -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    spec = TilingSpec("hd", 224, keep="floor")
    for width, height in sizes(600, seed=5):
        if max(width, height) > 200 * min(width, height):
            continue  # where a side rounds to nothing, hd keeps the detail that next gives up
        found = plan((width, height), spec)
        target = select_best_resolution((height, width), spec.pinpoints())
        assert found.target == target[::-1], (width, height)
        whole = torch.zeros(1, found.grid[1] * 16, found.grid[0] * 16)
        kept = unpad_image(whole, (height, width)).shape
        assert found.tokens.tiles == kept[1] * kept[2] and found.tokens.row_end == kept[1]


def test_next_merges_as_transformers() -> None:
    from transformers import LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    spec = TilingSpec("next", 32)
    vision, text = tiny.vision_config(), tiny.language_config(64)
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=spec.pinpoints()
    )
    torch.manual_seed(0)
    model = LlavaNextModel(config)
    row_end = model.image_newline.detach()
    for width, height in sizes(60, seed=6):
        found = plan_image((width, height), spec, 4, 16)
        features = torch.randn(found.views, 16, 32)
        theirs, counts = model.pack_image_features(
            [features], torch.tensor([[height, width]]), "default", row_end
        )
        assert torch.equal(merge_views(features, found, row_end), theirs[0])
        assert int(counts[0]) == found.tokens.total


@pytest.mark.parametrize(
    "size", [(64, 64), (33, 31), (100, 40), (40, 100), (1, 1), (1, 50), (700, 2), (95, 64)]
)
def test_next_cuts_as_transformers(size: tuple[int, int]) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    spec = TilingSpec("next", 32)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=spec.pinpoints(),
    )
    image = noise(size)
    expected = theirs(image, return_tensors="pt")
    found = plan_image(size, spec, 4, 16)
    views = cut_views(image, found, ImageSpec("resize", 32))
    assert expected["image_sizes"].tolist() == [[size[1], size[0]]]
    assert views.shape == expected["pixel_values"][0].shape
    assert (views - expected["pixel_values"][0]).abs().max() < 1e-5


def test_next_has_the_logits_of_transformers(tmp_path: Path) -> None:
    """Two pictures in one row, from pixels to logits, on identical weights."""
    from transformers import AutoModel, LlamaForCausalLM, LlavaNextConfig
    from transformers import LlavaNextForConditionalGeneration as LlavaNext

    vision, language = tiny.vision_folder(tmp_path / "v"), tiny.language_folder(tmp_path / "l")
    spec = TilingSpec("next", tiny.IMAGE_SIZE)
    torch.manual_seed(0)
    ours = LMM.from_backbones(vision, language, "mlp2x_gelu", -2, "patch", tiling=spec).eval()
    text = LlamaForCausalLM.from_pretrained(language)
    mark = text.config.vocab_size - 1
    config = LlavaNextConfig(
        vision_config=tiny.vision_config(),
        text_config=text.config,
        image_grid_pinpoints=spec.pinpoints(),
        image_token_index=mark,
        vision_feature_layer=-2,
    )
    theirs = LlavaNext(config).eval()
    theirs.model.vision_tower.load_state_dict(AutoModel.from_pretrained(vision).state_dict())
    theirs.model.language_model.load_state_dict(text.model.state_dict())
    theirs.lm_head.load_state_dict(text.lm_head.state_dict())
    theirs.model.multi_modal_projector.linear_1.load_state_dict(ours.connector[0].state_dict())
    theirs.model.multi_modal_projector.linear_2.load_state_dict(ours.connector[2].state_dict())
    assert ours.row_end is not None
    theirs.model.image_newline.data = ours.row_end.data

    sizes = [(100, 40), (30, 33)]
    plans = [plan_image(size, spec, 4, 16) for size in sizes]
    views = [torch.randn(found.views, 3, 32, 32) for found in plans]
    ids = [1, 300]
    for found in plans:
        ids += [IMAGE_ID] * found.tokens.total + [301, 302]
    row = torch.tensor([ids])
    most = max(found.views for found in plans)
    padded = torch.stack([torch.cat((v, torch.zeros(most - len(v), 3, 32, 32))) for v in views])
    with torch.no_grad():
        expected = theirs(
            input_ids=row.masked_fill(row == IMAGE_ID, mark),
            pixel_values=padded,
            image_sizes=torch.tensor([size[::-1] for size in sizes]),
        ).logits
        got = ours(row, pixel_values=torch.cat(views), image_sizes=sizes)
    assert (got - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


# --- views ----------------------------------------------------------------------------------------


def test_hd_pads_with_the_mean_colour_and_next_with_black() -> None:
    image = PIL.Image.new("RGB", (200, 50), "white")
    spec = ImageSpec("pad", 32)
    padded = canvas(
        image, plan_image(image.size, TilingSpec("hd", 32, grids=((2, 2),)), 4, 16), spec
    )
    assert padded.size == (64, 64)
    assert padded.getpixel((0, 0)) == spec.canvas_color == (122, 116, 104)
    black = canvas(image, plan_image(image.size, TilingSpec("next", 32), 4, 16), spec)
    assert black.getpixel((0, 0)) == (0, 0, 0)
    assert black.getpixel((48, 16)) == padded.getpixel((32, 32)) == (255, 255, 255)


def test_a_picture_of_the_size_of_the_canvas_is_cut_untouched() -> None:
    image = noise((64, 32))
    spec = ImageSpec("crop", 32)
    found = plan_image(image.size, TilingSpec("hd", 32, global_view=False), 4, 16)
    views = cut_views(image, found, spec)
    whole = preprocess_whole(image, spec)
    assert torch.allclose(torch.cat(list(views), dim=2), whole, atol=1e-6)


def test_a_wrong_picture_is_refused() -> None:
    found = plan_image((64, 32), TilingSpec("hd", 32), 4, 16)
    for image, size in ((noise((32, 64)), 32), (noise((64, 32)), 48)):
        with pytest.raises(PumiceError, match="the plan is for 64 x 32 and tiles of 32"):
            cut_views(image, found, ImageSpec("pad", size))


# --- settings and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [HD, NEXT, *VARIANTS])
def test_a_spec_survives_json(spec: TilingSpec) -> None:
    import json

    assert TilingSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(TilingSpec.from_dict(spec.to_dict())) == hash(spec)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scheme": "hdd", "tile": 224}, "Did you mean 'hd'?"),
        ({"scheme": "hd", "tile": 0}, "tiling tile is 0; a whole number from 1"),
        ({"scheme": "hd", "tile": True}, "tiling tile is True"),
        ({"scheme": "hd", "tile": 224, "max_tile": 4}, "Did you mean 'max_tiles'?"),
        ({"scheme": "hd", "tile": 224, "max_tiles": 0}, "max_tiles is 0"),
        ({"scheme": "hd", "tile": 224, "grids": []}, "a list of (columns, rows)"),
        ({"scheme": "hd", "tile": 224, "grids": [[1, 0]]}, "a list of (columns, rows)"),
        ({"scheme": "hd", "tile": 224, "grids": [[1, 2, 3]]}, "a list of (columns, rows)"),
        ({"scheme": "hd", "tile": 224, "grids": [[1, 2]], "max_tiles": 2}, "a list of grids"),
        ({"scheme": "next", "tile": 336, "max_tiles": 4}, "beside the scheme next"),
        ({"scheme": "hd", "tile": 224, "keep": "all"}, "allowed: cover, floor"),
        ({"scheme": "hd", "tile": 224, "global_view": 1}, "true or false"),
        ({"scheme": "hd"}, "lack tile"),
    ],
)
def test_a_wrong_spec_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(PumiceError) as caught:
        TilingSpec.from_dict(values)
    assert said in str(caught.value)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(PumiceError, match="has 16, but a view gives 17"):
        plan_image((10, 10), HD, 4, 17)
    with pytest.raises(PumiceError, match="0 x 10"):
        plan_image((0, 10), HD, 4, 16)
    with pytest.raises(PumiceError, match="not made of tiles of 336"):
        TilingSpec.from_pinpoints([[336, 600]], 336)
    found = plan_image((64, 32), TilingSpec("hd", 32), 4, 16)
    with pytest.raises(PumiceError, match="4 views of 16 tokens.* has 3 views of 16"):
        merge_views(torch.zeros(4, 16, 2), found, torch.zeros(2))


def test_plans_are_made_once() -> None:
    assert plan_image((640, 480), HD, 16, 256) is plan_image((640, 480), HD, 16, 256)
