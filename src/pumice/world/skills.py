"""Training files for studies of skills that no row trains together.

`pictures.json` is a mixture about pictures in which yes and no stand in sentences alone, and short
answers are asked for of all other questions. `yes_no.json` asks for yes and no shortly. Without any
picture: `dialogues.json` in English, `german.json` with German words and questions,
`unanswerable.json` with VizWiz's prompt and questions that the text does not answer. What these ask
about is told in one sentence on two shapes; in longer stories the pocket model finds little.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.datasets import (
    SHORT,
    Turns,
    conversation,
    different,
    llava_row,
    picture_row,
    short_turns,
)
from pumice.world.german import KINDS, german, german_questions, german_word
from pumice.world.scenes import SHAPES, Scene

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
# As the world's mixture, with more in sentences and less multiple choice.
_SHARES = {
    "sentences": 0.24, "detail": 0.11, "reasoning": 0.03, "short": 0.26, "choice": 0.28,
    "region": 0.08,
}  # fmt: skip
_YES_NO = ("exist", "exist_pair", "relation", "compare")
_SHORT_KINDS = tuple(kind for kind in language.KINDS if kind not in _YES_NO)
_TOLD = 2


def write_skills(folder: Path, scenes: Sequence[Scene], seed: int) -> None:
    """Write the files, each with one row for a scene."""
    for name, make, pictured in (
        ("pictures", _pictured, True),
        ("yes_no", _short_yes_no, True),
        ("dialogues", lambda scene, rng: language.text_dialogue(rng), False),
        ("german", _german, False),
        ("unanswerable", _unanswerable, False),
    ):
        _write(folder / f"{name}.json", scenes, make, seed, pictured=pictured)


def _write(
    path: Path,
    scenes: Sequence[Scene],
    make: Callable[[Scene, random.Random], Turns],
    seed: int,
    *,
    pictured: bool,
) -> None:
    rng = random.Random(f"skills {path.stem} {seed}")
    rows = []
    for number, scene in enumerate(scenes):
        turns = make(scene, rng)
        name = f"{path.stem}_{number:06d}"
        if turns:
            rows.append(
                picture_row(name, number, turns) if pictured else llava_row(name, None, turns)
            )
    rng.shuffle(rows)
    write_atomic(path, json.dumps(rows, ensure_ascii=False))


def _pictured(scene: Scene, rng: random.Random) -> Turns:
    kind = rng.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
    if kind == "sentences":
        asked = [language.ask(scene, name, rng) for name in rng.sample(_YES_NO, 3)]
        found = asked + language.questions(scene, 2, rng)
        return [(q.text, q.long) for q in different(found)]
    if kind == "short":
        return _shortly(scene, rng.choices(_SHORT_KINDS, k=8), rng)
    return conversation(scene, kind, rng)


def _short_yes_no(scene: Scene, rng: random.Random) -> Turns:
    return _shortly(scene, rng.choices(_YES_NO, k=8), rng)


def _shortly(scene: Scene, kinds: Sequence[str], rng: random.Random) -> Turns:
    """Six questions at most."""
    asked = different(language.ask(scene, kind, rng) for kind in kinds)
    return short_turns(asked[:6])


def _told(scene: Scene, rng: random.Random) -> tuple[Scene, str]:
    """Two of the scene's shapes, and the sentence that tells of them."""
    things = tuple(rng.sample(scene.shapes, min(_TOLD, len(scene.shapes))))
    phrases = [language.article(language.thing_phrase(thing)) for thing in things]
    background = language.article(scene.background)
    told = f"A picture shows {language.join(phrases)} on {background} background."
    return replace(scene, things=things), told


def _german(scene: Scene, rng: random.Random) -> Turns:
    """What German words and questions mean; then a picture told in English, asked in German."""
    turns = [(f'What does "{word}" mean?', means) for word, means in
             dict(german_word(rng) for _ in range(3)).items()]  # fmt: skip
    kind = rng.choice(KINDS)
    if (question := language.ask(scene, kind, rng)) is not None:
        turns.append((f'What does "{german(question).text}" mean?', question.text))
    part, told = _told(scene, rng)
    for index, asked in enumerate(german_questions(part, 4, rng)):
        text = asked.text if index else f"{told} {asked.text}\n{SHORT}"
        turns.append((text, asked.english.short))
    return turns


def _unanswerable(scene: Scene, rng: random.Random) -> Turns:
    """A picture told in words, and questions of which half are about what it does not show."""
    part, told = _told(scene, rng)
    present = {thing.shape for thing in part.shapes}
    asked = [(q.text, q.short) for q in _attributes(part, 2, rng)]
    for question in _attributes(part, 2, rng):
        known = next(word for word in present if word in question.text.removesuffix("?").split())
        absent = rng.choice([name for name in SHAPES if name not in present])
        asked.append((question.text.replace(known, absent), "unanswerable"))
    rng.shuffle(asked)
    (first, answer), *others = asked
    return [(f"{told} {first}\n{UNANSWERABLE}\n{SHORT}", answer), *others]


def _attributes(scene: Scene, count: int, rng: random.Random) -> list[language.Question]:
    """Questions on the colour, the size or the pattern of a shape."""
    asked = [language.ask(scene, rng.choice(("color", "size", "texture")), rng)
             for _ in range(count)]  # fmt: skip
    return [question for question in asked if question is not None]
