"""Scenes: the scene graph, its random generator and its renderer.

A scene is a 192 x 192 picture of 3 x 3 places. A place holds at most one thing: a shape (each kind
of shape at most once, so "the circle" is never ambiguous) or a sign with a word. A wide scene is
the same on 384 x 384 pixels with things of the same pixels, so they are half as large in it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from math import cos, pi, sin

from PIL import Image, ImageDraw, ImageFont

SIZE = 192
CELL = SIZE // 3
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
SHAPES = (
    "circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "arrow", "moon",
)  # fmt: skip
# Common and rare shapes, so that POPE's "popular" negatives mean something.
SHAPE_WEIGHTS = (2.0, 1.8, 1.6, 1.4, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7)
# Shapes that like each other's company, so that "adversarial" negatives mean something.
COMPANIONS = {
    "circle": "square", "square": "circle", "star": "moon", "moon": "star", "heart": "arrow",
    "arrow": "heart", "triangle": "cross", "cross": "triangle", "ring": "diamond",
    "diamond": "ring",
}  # fmt: skip
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "green": (44, 150, 60), "blue": (40, 80, 210), "yellow": (240, 210, 40),
    "purple": (130, 50, 170), "orange": (245, 130, 20), "white": (250, 250, 250),
}  # fmt: skip
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (128, 128, 128), "black": (22, 22, 26), "pink": (248, 190, 205),
    "cyan": (150, 225, 230),
}  # fmt: skip
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
WORDS = (
    "cat", "sun", "box", "key", "map", "fox", "log", "van", "bus", "cup", "egg", "hat", "jam",
    "pen", "zoo", "owl", "tree", "milk", "door", "park", "shop", "stop", "lamp", "book",
)  # fmt: skip
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing in a scene: a shape, or a sign when `word` is set. `box`: x0, y0, x1, y1, pixels."""

    shape: str
    color: str
    size: str
    texture: str
    row: int
    column: int
    box: Box
    word: str = ""

    @property
    def place(self) -> str:
        """The place in words, like 'top left'."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def is_sign(self) -> bool:
        """A sign carries a word and has no shape of its own."""
        return bool(self.word)


@dataclass(frozen=True, slots=True)
class Scene:
    """The scene graph of one picture, things in reading order."""

    background: str
    things: tuple[Thing, ...]
    seed: int
    pixels: int = SIZE
    resolution: int | None = None
    """The picture has no more detail than so many pixels a side would hold; None for all."""

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """The shapes, without the sign."""
        return tuple(thing for thing in self.things if not thing.is_sign)

    @property
    def sign(self) -> Thing | None:
        """The sign, if there is one."""
        return next((thing for thing in self.things if thing.is_sign), None)


def random_scene(seed: int) -> Scene:
    """The scene of this seed: 1 to 5 shapes and, two times in five, a sign."""
    rng = random.Random(f"scene {seed}")
    names = _choose_shapes(rng, rng.choices((1, 2, 3, 4, 5), (1, 2, 3, 3, 2))[0])
    has_sign = rng.random() < 0.4
    places = rng.sample([(row, column) for row in range(3) for column in range(3)], len(names) + 1)
    things = [_random_shape(rng, name, place) for name, place in zip(names, places, strict=False)]
    if has_sign:
        things.append(_random_sign(rng, places[-1]))
    things.sort(key=lambda thing: (thing.row, thing.column))
    return Scene(rng.choice(tuple(BACKGROUNDS)), tuple(things), seed)


def widened(scene: Scene) -> Scene:
    """The scene on a canvas twice as wide, its things with the pixels they had.

    Each thing stands in one quarter of its place, so that no line through the middle cuts it.
    """
    rng = random.Random(f"wide {scene.seed}")
    things = []
    for thing in scene.things:
        x = (thing.column + rng.randrange(2)) * CELL
        y = (thing.row + rng.randrange(2)) * CELL
        x0, y0, x1, y1 = thing.box
        things.append(replace(thing, box=(x0 + x, y0 + y, x1 + x, y1 + y)))
    return replace(scene, things=tuple(things), pixels=2 * SIZE)


def _choose_shapes(rng: random.Random, count: int) -> list[str]:
    chosen: list[str] = []
    while len(chosen) < count:
        companion = COMPANIONS[chosen[-1]] if chosen else ""
        if companion and companion not in chosen and rng.random() < 0.4:
            chosen.append(companion)
            continue
        name = rng.choices(SHAPES, SHAPE_WEIGHTS)[0]
        if name not in chosen:
            chosen.append(name)
    return chosen


def _random_shape(rng: random.Random, name: str, place: tuple[int, int]) -> Thing:
    size = rng.choice(SIZES)
    diameter = rng.randint(28, 32) if size == "small" else rng.randint(50, 56)
    slack = (CELL - diameter) // 2 - 1
    jitter = min(slack, 8)
    x = place[1] * CELL + CELL // 2 + rng.randint(-jitter, jitter) - diameter // 2
    y = place[0] * CELL + CELL // 2 + rng.randint(-jitter, jitter) - diameter // 2
    left, top, right, bottom = shape_mask(name, diameter).getbbox() or (0, 0, diameter, diameter)
    return Thing(
        shape=name,
        color=rng.choice(tuple(COLORS)),
        size=size,
        texture=rng.choice(TEXTURES),
        row=place[0],
        column=place[1],
        box=(x + left, y + top, x + right, y + bottom),
    )


def _random_sign(rng: random.Random, place: tuple[int, int]) -> Thing:
    x = place[1] * CELL + 2 + rng.randint(-1, 1)
    y = place[0] * CELL + 15 + rng.randint(-6, 6)
    return Thing(
        shape="sign",
        color="",
        size="",
        texture="",
        row=place[0],
        column=place[1],
        box=(x, y, x + CELL - 4, y + 34),
        word=rng.choice(WORDS),
    )


@lru_cache(maxsize=512)
def shape_mask(name: str, diameter: int) -> Image.Image:
    """The outline of a shape as a black-and-white picture of diameter x diameter pixels."""
    mask = Image.new("L", (diameter, diameter), 0)
    draw = ImageDraw.Draw(mask)
    end = diameter - 1
    if name == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif name == "ring":
        inset = round(diameter * 0.27)
        draw.ellipse((0, 0, end, end), fill=255)
        draw.ellipse((inset, inset, end - inset, end - inset), fill=0)
    elif name == "moon":
        draw.ellipse((0, 0, end, end), fill=255)
        shift = round(diameter * 0.38)
        draw.ellipse((shift, -2, end + shift, end - round(diameter * 0.1)), fill=0)
    elif name == "heart":
        half, top = end / 2, diameter * 0.3
        draw.ellipse((0, 0, half + 1, top * 2), fill=255)
        draw.ellipse((half - 1, 0, end, top * 2), fill=255)
        draw.polygon([(1, top * 1.25), (end - 1, top * 1.25), (half, end)], fill=255)
    else:
        draw.polygon([(x * end, y * end) for x, y in _outline(name)], fill=255)
    return mask


def _outline(name: str) -> list[tuple[float, float]]:
    if name == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    if name == "triangle":
        return [(0.5, 0.0), (1.0, 0.95), (0.0, 0.95)]
    if name == "diamond":
        return [(0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5)]
    if name == "cross":
        a, b = 0.34, 0.66
        return [
            (a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b),
            (0, a), (a, a),
        ]  # fmt: skip
    if name == "arrow":
        return [(0, 0.35), (0.5, 0.35), (0.5, 0.1), (1, 0.5), (0.5, 0.9), (0.5, 0.65), (0, 0.65)]
    if name == "star":
        points = []
        for k in range(10):
            radius = 0.5 if k % 2 == 0 else 0.21
            angle = -pi / 2 + k * pi / 5
            points.append((0.5 + radius * cos(angle), 0.52 + radius * sin(angle)))
        return points
    raise AssertionError(f"no outline for shape {name!r}")


@lru_cache(maxsize=256)
def _fill(color: str, texture: str) -> Image.Image:
    """A 64 x 64 swatch of the texture in the colour and a darker shade of it."""
    rgb = COLORS[color]
    dark = tuple(round(channel * 0.45) for channel in rgb)
    swatch = Image.new("RGB", (CELL, CELL), rgb)
    draw = ImageDraw.Draw(swatch)
    if texture == "striped":
        for x in range(-CELL, CELL, 11):
            draw.line((x, CELL, x + CELL, 0), fill=dark, width=4)
    elif texture == "dotted":
        for row, y in enumerate(range(2, CELL, 9)):
            for x in range(2 + 5 * (row % 2), CELL, 10):
                draw.ellipse((x, y, x + 4, y + 4), fill=dark)
    return swatch


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=23)


def render(scene: Scene) -> Image.Image:
    """Draw the scene: RGB, `scene.pixels` wide and high, with a little brightness noise."""
    rng = random.Random(f"noise {scene.seed}")
    shift = [rng.randint(-7, 7) for _ in range(3)]
    background = tuple(
        min(255, max(0, channel + delta))
        for channel, delta in zip(BACKGROUNDS[scene.background], shift, strict=True)
    )
    image = Image.new("RGB", (scene.pixels, scene.pixels), background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        if thing.is_sign:
            _draw_sign(draw, thing)
        else:
            _draw_shape(image, thing)
    if scene.resolution is None:
        return image
    # Back to its size, so that boxes and every file that names one stay right.
    small = image.resize((scene.resolution, scene.resolution), Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def _draw_sign(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    draw.rectangle(thing.box, fill=(246, 240, 222), outline=(90, 60, 30), width=2)
    x0, y0, x1, y1 = thing.box
    center = ((x0 + x1) / 2, (y0 + y1) / 2)
    draw.text(center, thing.word, fill=(10, 10, 10), font=_font(), anchor="mm")


def _draw_shape(image: Image.Image, thing: Thing) -> None:
    x0, y0, x1, y1 = thing.box
    # The mask that has exactly this bounding box: shapes do not fill their square alike.
    mask = _fitting_mask(thing.shape, x1 - x0, y1 - y0)
    swatch = _fill(thing.color, thing.texture).crop((0, 0, mask.width, mask.height))
    edge = tuple(round(channel * 0.35) for channel in COLORS[thing.color])
    image.paste(Image.new("RGB", mask.size, edge), (x0 - 1, y0 + 1), mask)
    image.paste(swatch, (x0, y0), mask)


@lru_cache(maxsize=512)
def _fitting_mask(name: str, width: int, height: int) -> Image.Image:
    for diameter in range(26, 60):
        mask = shape_mask(name, diameter)
        box = mask.getbbox()
        if box and (box[2] - box[0], box[3] - box[1]) == (width, height):
            return mask.crop(box)
    raise AssertionError(f"no {name} of {width} x {height} pixels")
