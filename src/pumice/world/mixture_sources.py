"""The training scenes as the sources of LLaVA-1.5's mixture, one file of LLaVA's rows for each.

The files carry the names that `pumice recipes` and the shipped mixtures give the sources. What is
asked is split among them as it is there: VQAv2 asks what is in a picture, GQA how things relate,
OCR-VQA what is written, A-OKVQA to choose, RefCOCO and Visual Genome for boxes and what is in them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.datasets import (
    REGIONS,
    SHORT,
    Turns,
    box_turn,
    choice_turns,
    conversation,
    different,
    llava_row,
    name_turn,
    picture_row,
    short_turns,
)
from pumice.world.scenes import Scene

# Thousands of rows of the three parts of LLaVA-Instruct-158K.
_INSTRUCT = {"conversation": 58, "detail": 23, "reasoning": 77}
_VQAV2 = (
    "color", "size", "texture", "shape", "background", "count", "count_by", "exist", "exist_pair",
)  # fmt: skip
_GQA = ("where", "which", "relation", "compare")
_SHORT_ANSWERS = ("vqav2", "gqa", "ocrvqa")
_PROMPTS = {"every": f"{{}}\n{SHORT}", "bare": "{}", "qa": "Q: {} A:"}
_QUESTIONS = 6


def write_sources(folder: Path, scenes: list[Scene], seed: int) -> None:
    """Write one file for each source, with one row for each scene that it can ask about.

    Sources of short answers ask for them as LLaVA-1.5 does, once a row. The same questions and
    answers stand in NAME-every.json with every question asking, in NAME-bare.json with none, and in
    NAME-qa.json as "Q: ... A:".
    """
    for name, make in _SOURCES.items():
        rng = random.Random(f"source {name} {seed}")
        made = [make(scene, rng) for scene in scenes]
        _write(folder / f"{name}.json", made)
        for prompt, form in _PROMPTS.items() if name in _SHORT_ANSWERS else ():
            _write(folder / f"{name}-{prompt}.json", [_asked(turns, form) for turns in made])
    rng = random.Random(f"source sharegpt {seed}")
    rows = [
        llava_row(f"sharegpt_{index:06d}", None, language.text_dialogue(rng))
        for index in range(len(scenes))
    ]
    write_atomic(folder / "sharegpt.json", json.dumps(rows, ensure_ascii=False))


def _write(path: Path, made: list[Turns]) -> None:
    rows = [
        picture_row(f"{path.stem}_{index:06d}", index, turns)
        for index, turns in enumerate(made)
        if turns
    ]
    write_atomic(path, json.dumps(rows, ensure_ascii=False))


def _asked(turns: Turns, form: str) -> Turns:
    return [(form.format(text.removesuffix(f"\n{SHORT}")), answer) for text, answer in turns]


def _instruct(scene: Scene, rng: random.Random) -> Turns:
    kind = rng.choices(tuple(_INSTRUCT), tuple(_INSTRUCT.values()))[0]
    return conversation(scene, kind, rng)


def _short_answers(scene: Scene, kinds: tuple[str, ...], rng: random.Random) -> Turns:
    """Different questions of these kinds, as often as the world asks each of them."""
    weights = [language.KINDS[kind][1] for kind in kinds]
    drawn = rng.choices(kinds, weights, k=2 * _QUESTIONS)
    asked = different(language.ask(scene, kind, rng) for kind in drawn)
    return short_turns(asked[:_QUESTIONS])


def _vqav2(scene: Scene, rng: random.Random) -> Turns:
    return _short_answers(scene, _VQAV2, rng)


def _gqa(scene: Scene, rng: random.Random) -> Turns:
    return _short_answers(scene, _GQA, rng)


def _ocrvqa(scene: Scene, rng: random.Random) -> Turns:
    """What the sign says and where it stands; nothing without a sign."""
    if scene.sign is None:
        return []
    asked = language.ask(scene, "ocr", rng)
    assert asked is not None
    return [*short_turns([asked]), ("Where is the sign?", scene.sign.place)]


def _refcoco(scene: Scene, rng: random.Random) -> Turns:
    return [
        box_turn(scene, thing, rng.choice((language.thing_phrase(thing), f"the {thing.shape}")))
        for thing in rng.sample(scene.things, min(REGIONS, len(scene.things)))
    ]


def _vg(scene: Scene, rng: random.Random) -> Turns:
    things = rng.sample(scene.things, min(REGIONS, len(scene.things)))
    return [name_turn(scene, thing) for thing in things]


_SOURCES: dict[str, Callable[[Scene, random.Random], Turns]] = {
    "llava-instruct": _instruct,
    "vqav2": _vqav2,
    "ocrvqa": _ocrvqa,
    "aokvqa": choice_turns,
    "refcoco": _refcoco,
    "vg": _vg,
    "gqa": _gqa,
}
