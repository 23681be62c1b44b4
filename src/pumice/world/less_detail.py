"""Training files that say less of the same pictures: large shapes alone.

Small shapes, signs and numbers of things are not spoken of, and what is said is true of the whole
picture: a shape is never denied, nor called the only one of its colour, because it is small.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.datasets import (
    BRIEF_INSTRUCTIONS,
    CHOICE_SHARES,
    DETAIL_INSTRUCTIONS,
    MIXTURE,
    NAMED_REGIONS,
    OPENINGS,
    REGIONS,
    ROWS_PER_IMAGE,
    Turns,
    box_turn,
    choice_turn,
    different,
    llava_row,
    name_turn,
    picture_row,
    short_turns,
)
from pumice.world.language import Question
from pumice.world.scenes import Scene

NOUN = "large shape"
# Kinds of questions whose answers need every thing in the picture, or a sign.
_OF_ALL = ("count", "count_by", "ocr", "size")
_KINDS = {name: weight for name, (_, weight) in language.KINDS.items() if name not in _OF_ALL}
_CHOICES = {name: share for name, share in CHOICE_SHARES.items() if name not in _OF_ALL}
# What the rows of the whole mixture become that need a sign or all things.
_INSTEAD = {"ocr": "vqa", "reasoning": "conversation"}


def write_less_detail(folder: Path, scenes: Sequence[Scene], seed: int) -> None:
    """Write pretrain_large.json and instruct_large.json beside the files that say everything."""
    for name, rows in (
        ("pretrain_large", large_pretrain_rows(scenes, seed)),
        ("instruct_large", large_instruct_rows(scenes, seed)),
    ):
        write_atomic(folder / f"{name}.json", json.dumps(rows, ensure_ascii=False))


def large_part(scene: Scene) -> Scene | None:
    """The scene with its large shapes alone; None where it has none."""
    large = tuple(thing for thing in scene.shapes if thing.size == "large")
    return replace(scene, things=large) if large else None


def large_pretrain_rows(scenes: Sequence[Scene], seed: int) -> list[dict[str, Any]]:
    """Captions of the large shapes; a picture without one has no row."""
    rng = random.Random(f"large pretrain {seed}")
    rows = []
    for index, scene in enumerate(scenes):
        if (part := large_part(scene)) is None:
            continue
        turns = [(rng.choice(BRIEF_INSTRUCTIONS), language.caption(part, rng))]
        rows.append(picture_row(f"{index + 1:012d}", index, turns))
    return rows


def large_instruct_rows(scenes: Sequence[Scene], seed: int) -> list[dict[str, Any]]:
    """As many rows as the whole mixture has, in its shares, of the large shapes alone."""
    rng = random.Random(f"large instruct {seed}")
    parts = [(index, part) for index, s in enumerate(scenes) if (part := large_part(s))]
    rows: list[dict[str, Any]] = []
    for number in range(round(len(scenes) * ROWS_PER_IMAGE)):
        kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
        if kind == "text" or not parts:
            rows.append(llava_row(f"text_{number:06d}", None, language.text_dialogue(rng)))
            continue
        index, part = parts[number % len(parts)]
        turns = _turns(scenes[index], part, _INSTEAD.get(kind, kind), rng)
        rows.append(picture_row(f"{kind}_{number:06d}", index, turns))
    rng.shuffle(rows)
    return rows


def _turns(whole: Scene, part: Scene, kind: str, rng: random.Random) -> Turns:
    if kind == "detail":
        return [(rng.choice(DETAIL_INSTRUCTIONS), language.description(part, rng, NOUN))]
    if kind == "region":
        return _region_turns(part, rng)
    questions = different(_asked(whole, part, name, rng) for name in _drawn(_KINDS, 12, rng))
    if kind == "conversation":
        opening = [(rng.choice(OPENINGS), language.brief_caption(part, rng).capitalize())]
        return opening + [(q.text, q.long) for q in questions[:4]]
    if kind == "choice":
        choices = different(_asked(whole, part, name, rng) for name in _drawn(_CHOICES, 8, rng))
        return [choice_turn(question, rng) for question in choices[:3] or questions[:1]]
    return short_turns(questions[:6])


def _drawn(kinds: dict[str, float], count: int, rng: random.Random) -> list[str]:
    return rng.choices(tuple(kinds), tuple(kinds.values()), k=count)


def _asked(whole: Scene, part: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question about the large shapes, if its answer is true of the whole picture."""
    question = language.ask(part, kind, rng)
    if question is None:
        return None
    words = set(question.text.removesuffix("?").split())
    if kind == "exist" and question.short == "no":
        return None if words & {thing.shape for thing in whole.shapes} else question
    if kind == "which":
        fitting = [t for t in whole.shapes if words & {t.color, t.texture, t.size}]
        return question if len(fitting) == 1 else None
    return question


def _region_turns(part: Scene, rng: random.Random) -> Turns:
    return [
        name_turn(part, thing)
        if rng.random() < NAMED_REGIONS
        else box_turn(part, thing, language.thing_phrase(thing))
        for thing in rng.sample(part.things, min(REGIONS, len(part.things)))
    ]
