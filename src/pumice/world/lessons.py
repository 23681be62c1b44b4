"""What the pocket language model learns: scenes as words at positions, and texts about them.

A draft is a text in pieces with a loss weight each; `language_backbone` turns drafts into tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pumice.world import language
from pumice.world.scenes import CELL, COLUMNS, ROWS, Scene, widened
from pumice.world.vision_backbone import GRID, patch_owner

PATCHES = GRID * GRID
# What a row of tiles ends with, in the place of a model's own row end.
ROW_END = "\n"
WARMUP = 600
DROPPED_WORDS = 0.06
QUESTION_WEIGHT = 0.1
# The questions that need two steps, as often as they are practised: at first, and at last (those
# that come late: what two things have in common, and the letter of an option).
HARD_KINDS = ("relation", "relation", "compare", "choice", "choice", "count_by", "exist_pair")
LATE_KINDS = (
    "relation", "compare", "compare", "choice", "choice", "choice", "choice", "count_by",
)  # fmt: skip
DESCRIBE = ("Describe the image in detail.", "What do you see in the image?")
BRIEFLY = ("Answer briefly.", "Give a short answer.")


@dataclass(slots=True)
class Draft:
    """A sequence in the making: pieces of text with their loss weight; None is the scene."""

    scene: Scene | None
    pieces: list[tuple[str | None, float]] = field(default_factory=list)

    def say(self, text: str | None, weight: float = QUESTION_WEIGHT) -> None:
        self.pieces.append((text, weight))


def scene_words(scene: Scene, rng: random.Random | None) -> list[list[str]]:
    """The words at each of the 36 positions; `rng` drops some of them."""
    owner = patch_owner(scene)
    positions = []
    for patch in range(PATCHES):
        row, column = divmod(patch, GRID)
        words = [ROWS[row // 2], COLUMNS[column // 2]]
        words += _seen(scene, owner[row, column])
        if rng is not None:
            words = [word for word in words if rng.random() > DROPPED_WORDS] or words[:1]
        positions.append(words)
    return positions


def tiled_scene_words(scene: Scene, rng: random.Random | None) -> list[list[str]]:
    """A wide scene at 36 + 156 positions: a coarse view of the whole, then 12 rows of tiles.

    The coarse view says places and seldom all of a thing, and never the word on a sign. The tiles
    say all, but places only within a tile; each of their rows ends with a line break.
    """
    rng = rng or random.Random(scene.seed)
    wide = widened(scene)
    owner = np.full((2 * GRID, 2 * GRID), -1, dtype=np.int64)
    near = patch_owner(scene)
    for index, thing in enumerate(wide.things):
        # A quarter of a place is 64 pixels: one patch of the whole, two by two of a tile.
        row, column = (
            int((low + high) / 2 // CELL) for low, high in (thing.box[1::2], thing.box[::2])
        )
        block = near[2 * thing.row : 2 * thing.row + 2, 2 * thing.column : 2 * thing.column + 2]
        owner[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = np.where(
            block == index, index, -1
        )
    positions = [_coarse_words(wide, owner, *divmod(patch, GRID), rng) for patch in range(PATCHES)]
    for row in range(2 * GRID):
        for column in range(2 * GRID):
            place = [ROWS[row % GRID // 2], COLUMNS[column % GRID // 2]]
            words = place if rng.random() < 0.5 else []
            words += _seen(wide, owner[row, column])
            positions.append([word for word in words if rng.random() > DROPPED_WORDS] or words[-1:])
        positions.append([ROW_END])
    return positions


def _coarse_words(
    scene: Scene, owner: np.ndarray, row: int, column: int, rng: random.Random
) -> list[str]:
    """What the view of the whole says at a patch: its place, and some of what is there."""
    block = owner[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    words = [ROWS[row // 2], COLUMNS[column // 2]]
    index = int(block.max())
    seen = _seen(scene, index)
    if index >= 0 and scene.things[index].is_sign:
        seen = ["sign"]
    return words + [word for word in seen if index < 0 or rng.random() < 0.6]


def _seen(scene: Scene, index: int) -> list[str]:
    """The words of the thing with this index, or of the background for -1."""
    if index < 0:
        return [scene.background]
    thing = scene.things[index]
    if thing.is_sign:
        return ["sign", thing.word]
    return [thing.size, thing.texture, thing.color, thing.shape]


def cloze(scene: Scene, rng: random.Random, *, harder: bool) -> Draft:
    """Statements with the key directly before the answer: 'color circle red . where star top'.

    `harder` adds statements that need two steps: comparisons, and letters of listed options.
    """
    facts = _facts(scene)
    if harder:
        facts += _comparisons(scene, rng)
    rng.shuffle(facts)
    draft = Draft(scene)
    draft.say(None)
    if harder and rng.random() < 0.6:
        _say_options(draft, scene, rng)
    for key, answer in facts:
        draft.say(key)
        draft.say(answer, 1.0)
        draft.say(".", 0.0)
    return draft


def _facts(scene: Scene) -> list[tuple[str, str]]:
    facts = [("background", scene.background), ("shapes", str(len(scene.shapes)))]
    for thing in scene.things:
        name = "sign" if thing.is_sign else thing.shape
        facts += [("where " + name, thing.place), (thing.place, name)]
        if thing.is_sign:
            facts.append(("sign", thing.word))
        else:
            facts += [
                ("color " + name, thing.color),
                ("size " + name, thing.size),
                ("pattern " + name, thing.texture),
            ]
    for values in zip(*[(t.color, t.texture, t.size) for t in scene.shapes], strict=True):
        facts += [("number " + value, str(values.count(value))) for value in sorted(set(values))]
    return facts


def _comparisons(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Yes/no statements of two things, and of things that may not be there."""
    found = []
    for kind in ("relation", "compare", "exist_pair", "exist"):
        for _ in range(2):
            question = language.ask(scene, kind, rng)
            if question is not None:
                words = question.text.removesuffix("?").split()
                kept = [word for word in words if word not in _IDLE_WORDS]
                found.append((" ".join(kept), question.short))
    return found


_IDLE_WORDS = frozenset("Is Do Can you see there a an the in image and have same".split())


def _say_options(draft: Draft, scene: Scene, rng: random.Random) -> None:
    """Options under letters, then options and their letters: 'A ring B star . letter star B .'"""
    question = next(
        (
            q
            for kind in rng.sample(language.CHOICE_KINDS, 3)
            if (q := language.ask(scene, kind, rng))
        ),
        None,
    )
    if question is None:
        return
    options, _ = language.choices(question, rng)
    for letter, option in zip("ABCD", options, strict=False):
        draft.say(f"\n{letter}. {option}")
    draft.say(".", 0.0)
    for index in rng.sample(range(len(options)), len(options)):
        draft.say(f"letter {options[index]}")
        draft.say("ABCD"[index], 1.0)
        draft.say(".", 0.0)


def dialogue(scene: Scene, rng: random.Random) -> Draft:
    """A conversation about the scene in the form the tune stage uses."""
    draft = Draft(scene)
    draft.say("USER: ", 0.0)
    draft.say(None)
    turns = _turns(scene, rng)
    for index, (question, answer) in enumerate(turns):
        lead = "\n" if index == 0 else "USER: "
        draft.say(f"{lead}{question} ASSISTANT:")
        draft.say(answer, 1.0)
        draft.say("</s>", 1.0)
    return draft


def _turns(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    if rng.random() < 0.12:
        return [(rng.choice(DESCRIBE), language.description(scene, rng))]
    turns = []
    for question in language.questions(scene, 7, rng):
        draw = rng.random()
        if draw < 0.4 and question.kind in language.CHOICE_KINDS:
            turns.append(_as_choice(question, rng))
        elif draw < 0.65:
            turns.append((f"{question.text} {rng.choice(BRIEFLY)}", question.short))
        else:
            turns.append((question.text, question.long))
    if rng.random() < 0.25:
        turns.insert(rng.randrange(len(turns) + 1), language.reasoning(scene, rng))
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        thing = rng.choice(scene.things)
        box, name = language.box_text(thing), language.thing_phrase(thing)
        phrase = rng.choice((name, thing.shape))
        pair = (
            (f"What is in the box {box}?", name)
            if rng.random() < 0.4
            else (f"Give the box of the {phrase}.", box)
        )
        turns.insert(rng.randrange(len(turns) + 1), pair)
    return turns


def in_words(scene: Scene, rng: random.Random) -> Draft:
    """The same scene told in ordinary words, then one or two questions."""
    draft = Draft(None)
    told = language.description(scene, rng) if rng.random() < 0.5 else language.caption(scene, rng)
    for index, question in enumerate(language.questions(scene, 2, rng)):
        draft.say(f"USER: {told + ' ' if index == 0 else ''}{question.text} ASSISTANT:")
        draft.say(question.long, 1.0)
        draft.say("</s>", 1.0)
    return draft


def text_only(rng: random.Random) -> Draft:
    """A dialogue without any scene."""
    draft = Draft(None)
    for question, answer in language.text_dialogue(rng):
        draft.say(f"USER: {question} ASSISTANT:")
        draft.say(answer, 1.0)
        draft.say("</s>", 1.0)
    return draft


def plain_caption(scene: Scene, rng: random.Random) -> Draft:
    """Scene, caption, line break: the form the align stage uses."""
    draft = Draft(scene)
    draft.say(None)
    draft.say(language.caption(scene, rng), 1.0)
    return draft


def practice(scene: Scene, rng: random.Random, kinds: tuple[str, ...]) -> Draft:
    """A dialogue of the questions that need two steps, some with their steps asked before them.

    "Where is the circle?" and "Where is the star?" make "Is the circle left of the star?" easy;
    the same question without them comes in the same dialogues.
    """
    turns: list[tuple[str, str]] = []
    for _ in range(6):
        kind = rng.choice(kinds)
        asked = rng.choice(language.CHOICE_KINDS) if kind == "choice" else kind
        question = language.ask(scene, asked, rng)
        if question is None:
            continue
        if rng.random() < 0.35:
            turns += _steps_towards(question, kind, scene)
        if kind == "choice":
            turns.append(_as_choice(question, rng))
        else:
            turns.append((f"{question.text} {BRIEFLY[0]}", question.short))
    draft = Draft(scene)
    draft.say("USER: ", 0.0)
    draft.say(None)
    for index, (text, answer) in enumerate(turns):
        draft.say(f"{chr(10) if index == 0 else 'USER: '}{text} ASSISTANT:")
        draft.say(answer, 1.0)
        draft.say("</s>", 1.0)
    return draft


def describing(scene: Scene, rng: random.Random) -> Draft:
    """A detailed description of the scene: a long text in which things are easily repeated."""
    draft = Draft(scene)
    draft.say("USER: ", 0.0)
    draft.say(None)
    draft.say(f"\n{rng.choice(DESCRIBE)} ASSISTANT:")
    draft.say(language.description(scene, rng), 1.0)
    draft.say("</s>", 1.0)
    return draft


def _steps_towards(question: language.Question, kind: str, scene: Scene) -> list[tuple[str, str]]:
    """The single look-ups whose answers decide the question."""
    if kind == "choice":
        return [(f"{question.text} {BRIEFLY[0]}", question.short)]
    words = question.text.removesuffix("?").split()
    named = [thing for thing in scene.shapes if thing.shape in words]
    for noun, attribute in (("color", "color"), ("size", "size"), ("pattern", "texture")):
        if words[-1] == noun:
            return [
                (f"What {noun} is the {thing.shape}? {BRIEFLY[0]}", getattr(thing, attribute))
                for thing in named
            ]
    return [(f"Where is the {thing.shape}? {BRIEFLY[0]}", thing.place) for thing in named]


def _as_choice(question: language.Question, rng: random.Random) -> tuple[str, str]:
    options, letter = language.choices(question, rng)
    lines = "\n".join(f"{name}. {option}" for name, option in zip("ABCD", options, strict=False))
    return f"{question.text}\n{lines}\n{rng.choice(BRIEFLY)}", letter


Lesson = Callable[[int, Scene, random.Random], Draft]


@dataclass(frozen=True, slots=True)
class Sight:
    """How a scene is written: at how many positions, and which words stand at each."""

    positions: int
    words: Callable[[Scene, random.Random | None], list[list[str]]]


WHOLE = Sight(PATCHES, scene_words)
TILED = Sight(PATCHES + 2 * GRID * (2 * GRID + 1), tiled_scene_words)


def mixture(step: int, scene: Scene, rng: random.Random) -> Draft:
    """The lesson of the first cycle: cloze alone at first, then everything."""
    while True:
        draft = _drawn(step, scene, rng)
        if any(weight == 1.0 for _, weight in draft.pieces):
            return draft


def practice_mixture(kinds: tuple[str, ...], describe: float = 0.0) -> Lesson:
    """The lesson of the later cycles: practice of these questions, and everything as before.

    `describe` is the share of detailed descriptions beside those that come in any case.
    """

    def lesson(step: int, scene: Scene, rng: random.Random) -> Draft:
        while True:
            draw = rng.random()
            if draw < 0.6:
                draft = practice(scene, rng, kinds)
            elif draw < 0.6 + describe:
                draft = describing(scene, rng)
            else:
                draft = mixture(WARMUP, scene, rng)
            if any(weight == 1.0 for _, weight in draft.pieces):
                return draft

    return lesson


def _drawn(step: int, scene: Scene, rng: random.Random) -> Draft:
    draw = rng.random()
    if step < WARMUP or draw < 0.2:
        return cloze(scene, rng, harder=step >= WARMUP)
    if draw < 0.82:
        return dialogue(scene, rng)
    if draw < 0.91:
        return plain_caption(scene, rng)
    return in_words(scene, rng) if draw < 0.97 else text_only(rng)
