"""What can be said about a scene: phrases, captions, descriptions and questions with their answers.

Every question has a short answer (a word or phrase) and a full sentence; each kind of question has
several phrasings, and yes/no questions are as often true as false.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pumice.world.scenes import (
    BACKGROUNDS,
    COLORS,
    COLUMNS,
    COMPANIONS,
    ROWS,
    SHAPES,
    SIZE,
    TEXTURES,
    WORDS,
    Scene,
    Thing,
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene. `options` are the possible short answers of its kind."""

    kind: str
    text: str
    short: str
    long: str
    options: tuple[str, ...] = ()


def article(phrase: str) -> str:
    """'a' or 'an' and the phrase."""
    return ("an " if phrase[0] in "aeio" else "a ") + phrase


def thing_phrase(thing: Thing) -> str:
    """All that can be said of a thing without its place: 'large striped red circle'."""
    if thing.is_sign:
        return f"sign that says {thing.word}"
    return f"{thing.size} {thing.texture} {thing.color} {thing.shape}"


def join(phrases: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def box_text(thing: Thing, size: int = SIZE) -> str:
    """The box in 0..1 with two decimals, as LLaVA writes boxes: '[0.12, 0.30, 0.41, 0.58]'."""
    return "[" + ", ".join(f"{value / size:.2f}" for value in thing.box) + "]"


def caption(scene: Scene, rng: random.Random) -> str:
    """A dense one-sentence caption, as web captions of the align stage stand for."""
    form = rng.randrange(3)
    parts = []
    for thing in scene.things:
        phrase = article(thing_phrase(thing))
        parts.append(
            (f"{phrase} at the {thing.place}", f"{phrase} in the {thing.place}",
             f"at the {thing.place} {phrase}")[form]
        )  # fmt: skip
    if form == 2:
        return f"{scene.background} background with {join(parts)}."
    return f"{join(parts)} on {article(scene.background)} background."


def brief_caption(scene: Scene, rng: random.Random) -> str:
    """A short caption that leaves most attributes out."""
    names = [article(rng.choice((f"{t.color} {t.shape}", t.shape))) for t in scene.shapes]
    if scene.sign:
        names.append("a sign")
    return f"{join(names)} on {article(scene.background)} background."


def description(scene: Scene, rng: random.Random, noun: str = "shape") -> str:
    """A detailed description of a few sentences that names every thing; `noun` is counted."""
    count = len(scene.shapes)
    opening = rng.choice(("The image shows", "This picture shows"))
    sentences = [
        f"{opening} {count} {_plural(noun, count)} on {article(scene.background)} background."
    ]
    for thing in scene.things:
        phrase = article(thing_phrase(thing))
        if rng.random() < 0.5:
            sentences.append(f"There is {phrase} at the {thing.place}.")
        else:
            sentences.append(f"At the {thing.place} there is {phrase}.")
    return " ".join(sentences)


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def _number_sentence(count: int, noun: str) -> str:
    return f"There {'is' if count == 1 else 'are'} {count} {_plural(noun, count)} in the image."


Maker = Callable[[Scene, random.Random], Question | None]


def _attribute(kind: str) -> Maker:
    """Questions for one attribute of a named shape."""
    phrasings = {
        "color": ("What color is the {x}?", "What colour is the {x}?",
                  "What is the color of the {x}?", "Which color does the {x} have?"),
        "size": ("What size is the {x}?", "Is the {x} small or large?", "How big is the {x}?"),
        "texture": ("What pattern does the {x} have?", "What is the pattern of the {x}?",
                    "Is the {x} plain, striped or dotted?"),
    }[kind]  # fmt: skip
    options = {"color": tuple(COLORS), "size": ("small", "large"), "texture": TEXTURES}[kind]

    def make(scene: Scene, rng: random.Random) -> Question | None:
        thing = rng.choice(scene.shapes)
        value = {"color": thing.color, "size": thing.size, "texture": thing.texture}[kind]
        text = rng.choice(phrasings).format(x=thing.shape)
        return Question(kind, text, value, f"The {thing.shape} is {value}.", options)

    return make


def _where(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    name = "sign" if thing.is_sign else thing.shape
    text = rng.choice(
        (
            "Where is the {x}?",
            "Where can you see the {x}?",
            "In which part of the image is the {x}?",
        )
    )
    options = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
    long = f"The {name} is at the {thing.place}."
    return Question("where", text.format(x=name), thing.place, long, options)


def _shape_at(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.shapes)
    text = rng.choice(
        ("What shape is at the {p}?", "Which shape is in the {p}?", "What can be seen at the {p}?")
    )
    long = f"There is {article(thing.shape)} at the {thing.place}."
    return Question("shape", text.format(p=thing.place), thing.shape, long, SHAPES)


def _which(scene: Scene, rng: random.Random) -> Question | None:
    values: list[tuple[str, Thing]] = []
    for thing in scene.shapes:
        for value in (thing.color, thing.texture, thing.size):
            if sum(value in (t.color, t.texture, t.size) for t in scene.shapes) == 1:
                values.append((value, thing))
    if not values:
        return None
    value, thing = rng.choice(values)
    text = rng.choice(
        ("Which shape is {v}?", "What is the {v} shape?", "Which of the shapes is {v}?")
    )
    return Question(
        "which", text.format(v=value), thing.shape, f"The {thing.shape} is {value}.", SHAPES
    )


def _background(scene: Scene, rng: random.Random) -> Question | None:
    text = rng.choice(("What color is the background?", "What colour is the background?",
                       "Which color does the background have?"))  # fmt: skip
    long = f"The background is {scene.background}."
    return Question("background", text, scene.background, long, tuple(BACKGROUNDS))


def _count(scene: Scene, rng: random.Random) -> Question | None:
    text = rng.choice(("How many shapes are there?", "How many shapes are in the image?",
                       "What is the number of shapes?"))  # fmt: skip
    count = len(scene.shapes)
    return Question("count", text, str(count), _number_sentence(count, "shape"), tuple("12345"))


def _count_by(scene: Scene, rng: random.Random) -> Question | None:
    pool = (
        [t.color for t in scene.shapes]
        + [t.texture for t in scene.shapes]
        + [t.size for t in scene.shapes]
    )
    absent = [c for c in (*COLORS, *TEXTURES) if c not in pool]
    value = rng.choice(absent) if absent and rng.random() < 0.25 else rng.choice(pool)
    count = sum(value in (t.color, t.texture, t.size) for t in scene.shapes)
    text = rng.choice(("How many {v} shapes are there?", "How many {v} shapes are in the image?",
                       "How many shapes are {v}?"))  # fmt: skip
    long = _number_sentence(count, f"{value} shape")
    return Question("count_by", text.format(v=value), str(count), long, tuple("012345"))


def _ocr(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.sign:
        return None
    text = rng.choice(
        ("What does the sign say?", "What word is on the sign?", "What is written on the sign?")
    )
    return Question("ocr", text, scene.sign.word, f"The sign says {scene.sign.word}.", WORDS)


def yes_no(kind: str, text: str, answer: bool, sentence: str) -> Question:
    """A yes/no question; `sentence` is the long answer after 'Yes, ' or 'No, '."""
    word = "yes" if answer else "no"
    return Question(kind, text, word, f"{word.capitalize()}, {sentence}", ("yes", "no"))


def exist_question(name: str, present: bool, rng: random.Random) -> Question:
    """POPE's kind of question: is there such a thing in the image?"""
    text = rng.choice(
        ("Is there {x} in the image?", "Is there {x}?", "Can you see {x} in the image?")
    )
    sentence = f"there is {article(name) if present else 'no ' + name} in the image."
    return yes_no("exist", text.format(x=article(name)), present, sentence)


def _exist(scene: Scene, rng: random.Random) -> Question | None:
    present = [t.shape for t in scene.shapes]
    if rng.random() < 0.5:
        return exist_question(rng.choice(present), True, rng)
    absent = [name for name in SHAPES if name not in present]
    tempting = [COMPANIONS[name] for name in present if COMPANIONS[name] not in present]
    pool = tempting if tempting and rng.random() < 0.5 else absent
    return exist_question(rng.choice(pool), False, rng)


def _exist_pair(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.shapes)
    if rng.random() < 0.5:
        name, present = f"{thing.color} {thing.shape}", True
    else:
        others = [t.color for t in scene.shapes if t.color != thing.color]
        color = rng.choice(others or [c for c in COLORS if c != thing.color])
        name, present = f"{color} {thing.shape}", False
    question = exist_question(name, present, rng)
    return Question("exist_pair", question.text, question.short, question.long, question.options)


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    pairs = [(a, b) for a in scene.shapes for b in scene.shapes if a is not b]
    rng.shuffle(pairs)
    for a, b in pairs:
        words = []
        if a.column != b.column:
            words += [("left of", a.column < b.column), ("right of", a.column > b.column)]
        if a.row != b.row:
            words += [("above", a.row < b.row), ("below", a.row > b.row)]
        if words:
            word, true = rng.choice(words)
            sentence = f"the {a.shape} is {'' if true else 'not '}{word} the {b.shape}."
            return yes_no("relation", f"Is the {a.shape} {word} the {b.shape}?", true, sentence)
    return None


def _compare(scene: Scene, rng: random.Random) -> Question | None:
    pairs = [(a, b) for i, a in enumerate(scene.shapes) for b in scene.shapes[i + 1 :]]
    same: list[tuple[Thing, Thing, str]] = []
    different: list[tuple[Thing, Thing, str]] = []
    for a, b in pairs:
        for noun, equal in (("color", a.color == b.color), ("size", a.size == b.size),
                            ("pattern", a.texture == b.texture)):  # fmt: skip
            (same if equal else different).append((a, b, noun))
    true = rng.random() < 0.5
    pool = same if true else different
    if not pool:
        return None
    a, b, noun = rng.choice(pool)
    if rng.random() < 0.5:
        a, b = b, a
    text = f"Do the {a.shape} and the {b.shape} have the same {noun}?"
    sentence = (
        f"the {a.shape} and the {b.shape} {'have' if true else 'do not have'} the same {noun}."
    )
    return yes_no("compare", text, true, sentence)


# kind -> (maker, how often it is asked)
KINDS: dict[str, tuple[Maker, float]] = {
    "color": (_attribute("color"), 1.6),
    "size": (_attribute("size"), 1.0),
    "texture": (_attribute("texture"), 1.2),
    "shape": (_shape_at, 1.5),
    "where": (_where, 1.2),
    "which": (_which, 1.2),
    "background": (_background, 0.4),
    "count": (_count, 0.6),
    "count_by": (_count_by, 1.0),
    "ocr": (_ocr, 1.2),
    "exist": (_exist, 2.0),
    "exist_pair": (_exist_pair, 1.2),
    "relation": (_relation, 1.4),
    "compare": (_compare, 1.2),
}
# Kinds that can be asked as multiple choice.
CHOICE_KINDS = ("color", "texture", "shape", "where", "which", "ocr", "background")


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of this kind about the scene, or None where the scene does not allow it."""
    return KINDS[kind][0](scene, rng)


def questions(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Up to `count` different questions, kinds drawn by their weight."""
    found: list[Question] = []
    weights = [weight for _, weight in KINDS.values()]
    for kind in rng.choices(tuple(KINDS), weights, k=count * 2):
        question = ask(scene, kind, rng)
        if question and all(question.text != other.text for other in found):
            found.append(question)
        if len(found) == count:
            break
    return found


def choices(question: Question, rng: random.Random, most: int = 4) -> tuple[list[str], str]:
    """The options of a multiple-choice question in random order, and the right one's letter."""
    wrong = [option for option in question.options if option != question.short]
    options = [question.short, *rng.sample(wrong, min(most - 1, len(wrong)))]
    rng.shuffle(options)
    return options, "ABCDEF"[options.index(question.short)]


def reasoning(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question that needs a step of thought, and an answer that shows the step."""
    thing = rng.choice(scene.shapes)
    count = len(scene.shapes)
    form = rng.randrange(3)
    if form == 0 and count > 1:
        left = count - 1
        return (
            f"How many shapes would be left without the {thing.shape}?",
            f"There are {count} shapes in the image. Without the {thing.shape}, "
            f"{left} {_plural('shape', left)} would be left.",
        )
    small = sum(t.size == "small" for t in scene.shapes)
    large = count - small
    if form == 1:
        verdict = (
            "as many small as large shapes" if small == large
            else f"more {'small' if small > large else 'large'} shapes"
        )  # fmt: skip
        return (
            "Are there more small or more large shapes?",
            f"There {'is' if small == 1 else 'are'} {small} small and {large} large, "
            f"so there are {verdict}.",
        )
    first = scene.shapes[0]
    return (
        "Which shape would you meet first when reading the image like a page?",
        f"Reading from the top left, the first shape is the {first.shape} at the {first.place}.",
    )


TEXT_DIALOGUES: tuple[tuple[str, str], ...] = (
    (
        "Hello, who are you?",
        "I am pumice, a small assistant that answers questions about pictures.",
    ),
    ("What can you do?", "I can describe a picture and answer questions about it."),
    ("What is the opposite of small?", "The opposite of small is large."),
    ("What is the opposite of top?", "The opposite of top is bottom."),
    ("What is the opposite of left?", "The opposite of left is right."),
    ("What comes after 3?", "After 3 comes 4."),
    ("What comes before 3?", "Before 3 comes 2."),
    ("Name a shape with corners.", "A square is a shape with corners."),
    ("Name a shape without corners.", "A circle is a shape without corners."),
    ("Is red a color?", "Yes, red is a color."),
    ("Is a circle a color?", "No, a circle is a shape."),
    ("Thank you.", "You are welcome."),
)


def text_dialogue(rng: random.Random) -> list[tuple[str, str]]:
    """A few turns that need no picture; half of the turns ask about things told in words."""
    turns = []
    for _ in range(rng.randint(2, 4)):
        if rng.random() < 0.5:
            turns.append(rng.choice(TEXT_DIALOGUES))
            continue
        first, second = rng.sample(SHAPES, 2)
        one, two = rng.sample(tuple(COLORS), 2)
        asked, color = rng.choice(((first, one), (second, two)))
        turns.append(
            (f"A box holds a {one} {first} and a {two} {second}. What color is the {asked}?",
             f"The {asked} is {color}.")
        )  # fmt: skip
    return turns
