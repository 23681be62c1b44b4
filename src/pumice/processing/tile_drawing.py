"""Draws what tiling does to one picture: canvas, tiles, padding left out, row ends, global view."""

from __future__ import annotations

import math

import PIL.Image
import PIL.ImageChops
import PIL.ImageDraw
import PIL.ImageFont
import torch

from pumice.models.tiling import ImagePlan
from pumice.processing.images import ImageSpec, preprocess
from pumice.processing.tiles import canvas, global_spec

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

_PAPER: Color = (255, 255, 255)
_INK: Color = (31, 41, 55)
_FAINT: Color = (107, 114, 128)
# Blue, green, orange and red of equal weight, told apart by colour-blind readers too.
_GLOBAL: Color = (37, 99, 235)
_TILES: Color = (5, 150, 105)
_ROW_END: Color = (245, 158, 11)
_REMOVED: Color = (220, 38, 38)

_MARGIN = 28
_SIDE_WIDTH = 280
_CANVAS_BOX = (960, 720)
# Finer than this, the lines between features would hide the picture.
_FINEST_CELL = 7


def draw_plan(image: PIL.Image.Image, plan: ImagePlan, spec: ImageSpec) -> PIL.Image.Image:
    """One page: the picture and its global view at the left, the tiled canvas, the tokens below."""
    tiled = _tiled(image, plan, spec)
    left = _left_column(image, plan, spec)
    inner = max(left.height, tiled.height)
    width = 3 * _MARGIN + _SIDE_WIDTH + tiled.width
    # The legend needs its width also beside a tall and narrow canvas.
    width = max(width, 2 * _MARGIN + 900)
    bar = _token_bar(plan, width - 2 * _MARGIN)
    page = PIL.Image.new("RGB", (width, inner + bar.height + 3 * _MARGIN), _PAPER)
    page.paste(left, (_MARGIN, _MARGIN))
    page.paste(tiled, (2 * _MARGIN + _SIDE_WIDTH, _MARGIN))
    page.paste(bar, (_MARGIN, inner + 2 * _MARGIN))
    return page


def _left_column(image: PIL.Image.Image, plan: ImagePlan, spec: ImageSpec) -> PIL.Image.Image:
    parts = [_panel(_scaled(image, (_SIDE_WIDTH, 220)), f"picture  {_by(plan.size)}", _FAINT)]
    if plan.global_view:
        view = _scaled(_global_picture(image, plan, spec), (220, 220))
        how = "squeezed" if plan.scheme == "next" else "padded"
        name = f"view 1, global ({how})  {_by((plan.tile, plan.tile))}"
        parts.append(_panel(view, name, _GLOBAL))
    height = sum(part.height for part in parts) + _MARGIN * (len(parts) - 1)
    column = PIL.Image.new("RGB", (_SIDE_WIDTH, height), _PAPER)
    top = 0
    for part in parts:
        column.paste(part, (0, top))
        top += part.height + _MARGIN
    return column


def _global_picture(image: PIL.Image.Image, plan: ImagePlan, spec: ImageSpec) -> PIL.Image.Image:
    """The global view as the vision backbone gets it, turned back into a picture."""
    values = preprocess(image, global_spec(plan, spec)).permute(1, 2, 0)
    pixels = (values * torch.tensor(spec.std) + torch.tensor(spec.mean)) * 255
    return PIL.Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).numpy())


def _panel(picture: PIL.Image.Image, title: str, frame: Color) -> PIL.Image.Image:
    """A framed picture below its title."""
    panel = PIL.Image.new("RGB", (_SIDE_WIDTH, picture.height + 30), _PAPER)
    draw = PIL.ImageDraw.Draw(panel)
    draw.text((0, 2), title, fill=_INK, font=_font(15))
    panel.paste(picture, (2, 26))
    draw.rectangle((0, 24, picture.width + 3, picture.height + 27), outline=frame, width=2)
    return panel


def _tiled(image: PIL.Image.Image, plan: ImagePlan, spec: ImageSpec) -> PIL.Image.Image:
    """The canvas with its tiles, under its title."""
    picture = _scaled(canvas(image, plan, spec), _CANVAS_BOX)
    ends = 18  # room for the row ends, right of the canvas
    cols, rows = plan.grid
    title = f"target  {_by(plan.target)} = {_by(plan.grid)} tiles of {plan.tile}"
    width = max(picture.width + ends + 4, math.ceil(_font(15).getlength(title)))
    sheet = PIL.Image.new("RGB", (width, picture.height + 30), _PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    draw.text((0, 2), title, fill=_INK, font=_font(15))
    _tint_removed(picture, plan)
    _draw_cells(picture, plan)
    for number, (col, row) in enumerate(plan.places, start=1 + int(plan.global_view)):
        across, down = picture.width / cols, picture.height / rows
        _draw_number(picture, (round(col * across) + 8, round(row * down) + 8), str(number))
    sheet.paste(picture, (2, 26))
    frame = (0, 24, picture.width + 3, picture.height + 27)
    draw.rectangle(frame, outline=_TILES, width=2)
    _draw_row_ends(draw, plan, picture.size)
    return sheet


def _tint_removed(picture: PIL.Image.Image, plan: ImagePlan) -> None:
    """Red hatching over the features that are left out."""
    kept = _kept_box(plan, picture.size)
    removed = PIL.Image.new("L", picture.size, 255)
    if kept[0] < kept[2] and kept[1] < kept[3]:
        removed.paste(0, kept)
    hatch = PIL.Image.new("L", picture.size, 45)
    draw = PIL.ImageDraw.Draw(hatch)
    for start in range(-picture.height, picture.width, 12):
        draw.line((start, picture.height, start + picture.height, 0), fill=190, width=3)
    red = PIL.Image.new("RGB", picture.size, _REMOVED)
    picture.paste(red, (0, 0), PIL.ImageChops.multiply(removed, hatch))


def _draw_cells(picture: PIL.Image.Image, plan: ImagePlan) -> None:
    """Thin lines between features, thick ones between tiles, a frame round what is kept."""
    lines = PIL.Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = PIL.ImageDraw.Draw(lines)
    cells = [count * (plan.side or 1) for count in plan.grid]
    if plan.side is not None and picture.width / cells[0] >= _FINEST_CELL:
        _draw_grid(draw, picture.size, cells, (255, 255, 255, 90), 1)
    _draw_grid(draw, picture.size, list(plan.grid), (*_INK, 255), 3)
    left, top, right, bottom = _kept_box(plan, picture.size)
    if left < right and top < bottom:
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(*_TILES, 255), width=3)
    picture.paste(lines, (0, 0), lines)


def _draw_grid(
    draw: PIL.ImageDraw.ImageDraw,
    size: tuple[int, int],
    cells: list[int],
    color: tuple[int, int, int, int],
    width: int,
) -> None:
    for number in range(1, cells[0]):
        x = round(number * size[0] / cells[0])
        draw.line((x, 0, x, size[1]), fill=color, width=width)
    for number in range(1, cells[1]):
        y = round(number * size[1] / cells[1])
        draw.line((0, y, size[0], y), fill=color, width=width)


def _draw_row_ends(draw: PIL.ImageDraw.ImageDraw, plan: ImagePlan, size: tuple[int, int]) -> None:
    """An orange mark right of each row of the map that is kept."""
    tall = size[1] / (plan.grid[1] * (plan.side or 1))
    mark = min(12.0, max(2.0, tall - 3))
    for row in range(*plan.keep_rows):
        middle = 26 + (row + 0.5) * tall
        box = (size[0] + 8, round(middle - mark / 2), size[0] + 19, round(middle + mark / 2))
        draw.rectangle(box, fill=_ROW_END)


def _draw_number(picture: PIL.Image.Image, corner: tuple[int, int], text: str) -> None:
    draw = PIL.ImageDraw.Draw(picture)
    font = _font(15)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width = max(right - left, bottom - top) + 12
    box = (corner[0], corner[1], corner[0] + width, corner[1] + 22)
    draw.rounded_rectangle(box, radius=6, fill=_INK)
    middle = (corner[0] + width / 2, corner[1] + 11)
    draw.text(middle, text, fill=_PAPER, font=font, anchor="mm")


def _token_bar(plan: ImagePlan, width: int) -> PIL.Image.Image:
    """The image tokens by kind: a bar to scale and a line of numbers."""
    counts = plan.tokens
    parts = [
        ("global view", counts.global_view, _GLOBAL),
        ("tiles", counts.tiles, _TILES),
        ("row ends", counts.row_end, _ROW_END),
    ]
    bar = PIL.Image.new("RGB", (width, 82), _PAPER)
    draw = PIL.ImageDraw.Draw(bar)
    draw.text((0, 0), f"{counts.total} image tokens", fill=_INK, font=_font(20))
    start = 0.0
    for _, count, color in parts:
        end = start + width * count / counts.total
        draw.rectangle((round(start), 30, max(round(start), round(end) - 1), 48), fill=color)
        start = end
    x = 0
    for name, count, color in (*parts, ("left out", counts.removed, _REMOVED)):
        draw.rectangle((x, 61, x + 12, 73), fill=color)
        text = f"{name} {count}"
        draw.text((x + 19, 58), text, fill=_INK, font=_font(15))
        x += 19 + round(draw.textlength(text, font=_font(15))) + 28
    return bar


def _kept_box(plan: ImagePlan, size: tuple[int, int]) -> Box:
    """The kept features in the pixels of a drawing of the canvas."""
    side = plan.side or 1
    across, down = size[0] / (plan.grid[0] * side), size[1] / (plan.grid[1] * side)
    (left, right), (top, bottom) = plan.keep_cols, plan.keep_rows
    return round(left * across), round(top * down), round(right * across), round(bottom * down)


def _scaled(image: PIL.Image.Image, box: tuple[int, int]) -> PIL.Image.Image:
    """As large as fits into the box; small pictures are enlarged with hard pixels."""
    scale = min(box[0] / image.width, box[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    soft = PIL.Image.Resampling.LANCZOS
    return image.resize(size, PIL.Image.Resampling.NEAREST if scale > 2 else soft)


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def _font(size: int) -> PIL.ImageFont.ImageFont | PIL.ImageFont.FreeTypeFont:
    return PIL.ImageFont.load_default(size)
