"""Training files for studies of skills that no row trains together.

`pictures.json` is a mixture about pictures in which yes and no stand in sentences alone, and short
answers are asked for of all other questions. `yes_no.json` asks for yes and no shortly. Without any
picture, about scenes told in words: `dialogues.json` in English, `german.json` with German
questions, `unanswerable.json` with VizWiz's prompt and questions that the text does not answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.datasets import SHORT, conversation, llava_row, train_name
from pumice.world.german import german_questions, german_word
from pumice.world.scenes import SHAPES, Scene

Turns = list[tuple[str, str]]
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
# As the world's mixture, with more in sentences and less multiple choice.
_SHARES = {
    "sentences": 0.24, "detail": 0.11, "reasoning": 0.03, "short": 0.26, "choice": 0.28,
    "region": 0.08,
}  # fmt: skip
_YES_NO = ("exist", "exist_pair", "relation", "compare")
_SHORT_KINDS = tuple(kind for kind in language.KINDS if kind not in _YES_NO)
_TOLD = 3


def write_skills(folder: Path, scenes: Sequence[Scene], seed: int) -> None:
    """Write the files; those without pictures have one row for three scenes."""
    _write(folder / "pictures.json", scenes, _pictured, seed, pictured=True)
    _write(folder / "yes_no.json", scenes[::_TOLD], _short_yes_no, seed, pictured=True)
    for name, make in (
        ("dialogues", lambda scene, rng: language.text_dialogue(rng)),
        ("german", _german),
        ("unanswerable", _unanswerable),
    ):
        _write(folder / f"{name}.json", scenes[::_TOLD], make, seed, pictured=False)


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
        if not turns:
            continue
        image = None
        if pictured:
            (first, answer), *others = turns
            turns = [(f"<image>\n{first}", answer), *others]
            image = f"train/{train_name(number * (_TOLD if path.stem == 'yes_no' else 1))}"
        rows.append(llava_row(f"{path.stem}_{number:06d}", image, turns))
    rng.shuffle(rows)
    write_atomic(path, json.dumps(rows, ensure_ascii=False))


def _pictured(scene: Scene, rng: random.Random) -> Turns:
    kind = rng.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
    if kind == "sentences":
        asked = [language.ask(scene, name, rng) for name in rng.sample(_YES_NO, 3)]
        found = [q for q in asked if q] + language.questions(scene, 2, rng)
        return [(q.text, q.long) for q in {q.text: q for q in found}.values()]
    if kind == "short":
        return _shortly(scene, rng.choices(_SHORT_KINDS, k=8), rng)
    return conversation(scene, kind, rng)


def _short_yes_no(scene: Scene, rng: random.Random) -> Turns:
    return _shortly(scene, rng.choices(_YES_NO, k=8), rng)


def _shortly(scene: Scene, kinds: Sequence[str], rng: random.Random) -> Turns:
    """Six questions at most; as in LLaVA's merged rows, the first alone carries the prompt."""
    asked = [language.ask(scene, kind, rng) for kind in kinds]
    found = list({q.text: q for q in asked if q}.values())[:6]
    return [
        (f"{q.text}\n{SHORT}" if index == 0 else q.text, q.short) for index, q in enumerate(found)
    ]


def _german(scene: Scene, rng: random.Random) -> Turns:
    """A scene told in English and asked about in German, and what German words mean."""
    told = language.description(scene, rng)
    short = rng.random() < 0.6
    turns = []
    for index, asked in enumerate(german_questions(scene, 4, rng)):
        text = asked.text if index else f"{told} {asked.text}"
        text += f"\n{SHORT}" if short and not index else ""
        turns.append((text, asked.english.short if short else asked.long))
    if not short:
        turns += [(f'What does "{word}" mean?', means) for word, means in
                  dict(german_word(rng) for _ in range(3)).items()]  # fmt: skip
    return turns


def _unanswerable(scene: Scene, rng: random.Random) -> Turns:
    """A scene told in words, and questions of which half are about what it does not have."""
    present = {thing.shape for thing in scene.shapes}
    absent = rng.sample([name for name in SHAPES if name not in present], 2)
    asked = [(q.text, q.short) for q in language.questions(scene, 2, rng)]
    for name in absent:
        kind = rng.choice(("color", "size", "texture"))
        question = language.ask(scene, kind, rng)
        assert question is not None
        known = next(word for word in present if word in question.text.removesuffix("?").split())
        asked.append((question.text.replace(known, name), "unanswerable"))
    rng.shuffle(asked)
    (first, answer), *others = asked
    prompt = f"{language.description(scene, rng)} {first}\n{UNANSWERABLE}\n{SHORT}"
    return [(prompt, answer), *others]
