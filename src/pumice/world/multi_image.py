"""Rows with several images: two scenes to compare, and frames of a scene that changes.

They are a file of their own with random numbers of their own, so no other file of a world depends
on them. An image's place in the text is part of what is learnt: "the second image" is the one that
stands second, whichever turn shows it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.world import language
from pumice.world.scenes import Scene, Thing, render

# Of a world's scenes one in so many begins a row of the kind.
PAIRS_SHARE, EVENTS_SHARE = 10, 30
FRAMES = 3
SHORT = "Answer the question using a single word or phrase."
_NAMES = ("first", "second", "third")
# How a turn shows its images: a line for each, or words in between.
_SHOWN = (
    lambda count: "<image>\n" * count,
    lambda count: "".join(f"Image {k}: <image>\n" for k in range(1, count + 1)),
    lambda count: "Here are " + " and ".join(["<image>"] * count) + ".\n",
)

Turn = tuple[str, str]


def multi_image_rows(
    scenes: list[Scene], train_name: Callable[[int], str], folder: Path, seed: int
) -> list[dict[str, Any]]:
    """The rows of multi_image.json; frames are drawn into `folder`/sequence."""
    rng = random.Random(f"multi image {seed}")
    rows = []
    for number in range(-(-len(scenes) // PAIRS_SHARE)):
        # A world of one scene compares it with itself.
        first, second = rng.sample(range(len(scenes)), 2) if len(scenes) > 1 else (0, 0)
        turns = compared(scenes[first], scenes[second], rng)
        images = [f"train/{train_name(index)}" for index in (first, second)]
        rows.append(_row(f"pair_{number:06d}", images, turns))
    eventful = [scene for scene in scenes if len(scene.things) >= FRAMES]
    for number in range(min(-(-len(scenes) // EVENTS_SHARE), len(eventful))):
        frames, turns = events(rng.choice(eventful), rng)
        names = [f"sequence/{number:06d}_{place}.jpg" for place in range(1, FRAMES + 1)]
        (folder / "sequence").mkdir(parents=True, exist_ok=True)
        for frame, name in zip(frames, names, strict=True):
            render(frame).save(folder / name, quality=92)
        rows.append(_row(f"events_{number:06d}", names, turns))
    rng.shuffle(rows)
    return rows


def compared(first: Scene, second: Scene, rng: random.Random) -> list[Turn]:
    """Questions about two scenes; the second is shown with the first, or in a turn of its own."""
    pair = (first, second)
    kinds = (*rng.sample(_COMPARISONS, 3), _of_one)
    asked = [made for kind in kinds if (made := kind(pair, rng)) is not None][:3]
    question, answer = asked[0]
    if rng.random() < 0.3:
        opening = ("<image>\nWhat do you see?", language.brief_caption(first, rng).capitalize())
        return [opening, (f"And this is another image: <image>\n{question}", answer), *asked[1:]]
    return [(f"{rng.choice(_SHOWN)(2)}{question}\n{SHORT}", answer), *asked[1:]]


def events(scene: Scene, rng: random.Random) -> tuple[list[Scene], list[Turn]]:
    """Frames of a scene to which one thing is added each time, in order or mixed, and questions."""
    order = rng.sample(scene.things, len(scene.things))
    start = rng.randint(1, len(order) - FRAMES + 1)
    taken = [_only(scene, order[: start + step]) for step in range(FRAMES)]
    added = [order[start + step] for step in range(FRAMES - 1)]
    places = list(range(FRAMES))
    if rng.random() < 0.5:
        question = f"{rng.choice(_SHOWN)(FRAMES)}{_added(0)}\n{SHORT}"
        last = ("Which thing appears last?", language.thing_phrase(added[-1]))
        turns = [(question, language.thing_phrase(added[0])), last]
    else:
        rng.shuffle(places)
        # Where the frame of each moment stands.
        right = ", ".join(str(places.index(moment) + 1) for moment in range(FRAMES))
        question = "Things are only ever added. In which order were these images taken?"
        mixed = f"In image {places.index(FRAMES - 1) + 1}."
        turns = [
            (f"{rng.choice(_SHOWN)(FRAMES)}{question}", right),
            ("In which image are the most things?", mixed),
        ]
    return [taken[moment] for moment in places], turns


def _only(scene: Scene, things: list[Thing]) -> Scene:
    """The scene with these of its things, in reading order as always."""
    return replace(scene, things=tuple(thing for thing in scene.things if thing in things))


def _added(step: int) -> str:
    return f"What is added from the {_NAMES[step]} image to the {_NAMES[step + 1]}?"


Pair = tuple[Scene, Scene]


def _more(pair: Pair, rng: random.Random) -> Turn | None:
    counts = [len(scene.shapes) for scene in pair]
    if counts[0] == counts[1]:
        return None
    answer = _NAMES[counts.index(max(counts))]
    return rng.choice(("Which image has more shapes?", "In which image are more shapes?")), answer


def _where(pair: Pair, rng: random.Random) -> Turn | None:
    names = [{thing.shape for thing in scene.shapes} for scene in pair]
    alone = sorted(names[0] ^ names[1])
    if not alone:
        return None
    shape = rng.choice(alone)
    question = f"In which of the two images is there {language.article(shape)}?"
    return question, _NAMES[0 if shape in names[0] else 1]


def _same_background(pair: Pair, rng: random.Random) -> Turn | None:
    same = pair[0].background == pair[1].background
    # Of four backgrounds two are equal once in four times: as often yes as no.
    if not same and rng.random() < 2 / 3:
        return None
    return "Do both images have the same background?", "yes" if same else "no"


def _of_one(pair: Pair, rng: random.Random) -> Turn | None:
    place = rng.randrange(2)
    thing = rng.choice(pair[place].shapes)
    return f"What color is the {thing.shape} in the {_NAMES[place]} image?", thing.color


def _background_of_one(pair: Pair, rng: random.Random) -> Turn | None:
    place = rng.randrange(2)
    question = f"What color is the background of the {_NAMES[place]} image?"
    return question, pair[place].background


_COMPARISONS = (_more, _where, _same_background, _background_of_one)


def _row(name: str, images: list[str], turns: list[Turn]) -> dict[str, Any]:
    said = [
        {"from": who, "value": value}
        for turn in turns
        for who, value in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"id": name, "image": images, "conversations": said}
