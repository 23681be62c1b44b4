"""The world's questions in a second language, for studies of what text alone can teach.

As xGQA has it, a German question gets an English answer; in dialogues it may get a German one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pumice.world import language
from pumice.world.scenes import Scene

# Nominative and accusative with their articles.
_SHAPES = {
    "circle": ("der Kreis", "einen Kreis"), "square": ("das Quadrat", "ein Quadrat"),
    "triangle": ("das Dreieck", "ein Dreieck"), "star": ("der Stern", "einen Stern"),
    "cross": ("das Kreuz", "ein Kreuz"), "ring": ("der Ring", "einen Ring"),
    "heart": ("das Herz", "ein Herz"), "diamond": ("die Raute", "eine Raute"),
    "arrow": ("der Pfeil", "einen Pfeil"), "moon": ("der Mond", "einen Mond"),
}  # fmt: skip
_VALUES = {
    "red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "purple": "lila",
    "orange": "orange", "white": "weiß", "gray": "grau", "black": "schwarz", "pink": "rosa",
    "cyan": "türkis", "small": "klein", "large": "groß", "plain": "einfarbig",
    "striped": "gestreift", "dotted": "gepunktet", "yes": "ja", "no": "nein",
}  # fmt: skip
_QUESTIONS = {
    "color": "Welche Farbe hat {the}?",
    "texture": "Welches Muster hat {the}?",
    "size": "Wie groß ist {the}?",
    "exist": "Gibt es {a}?",
    "background": "Welche Farbe hat der Hintergrund?",
}
KINDS = tuple(_QUESTIONS)
_WEIGHTS = tuple(language.KINDS[kind][1] for kind in KINDS)


@dataclass(frozen=True, slots=True)
class GermanQuestion:
    """A German question; `english` is the same one, with its answers."""

    text: str
    long: str
    """The answer in a German sentence."""
    english: language.Question


def german(question: language.Question) -> GermanQuestion:
    """The question in German; its kind is one of `KINDS`."""
    words = question.text.removesuffix("?").split()
    the, a = next((_SHAPES[word] for word in words if word in _SHAPES), ("", ""))
    value = _VALUES[question.short]
    subject = "der Hintergrund" if question.kind == "background" else the
    long = f"{subject[:1].upper()}{subject[1:]} ist {value}."
    if question.kind == "exist":
        long = f"{value.capitalize()}, es gibt {a if question.short == 'yes' else 'k' + a}."
    return GermanQuestion(_QUESTIONS[question.kind].format(the=the, a=a), long, question)


def german_questions(scene: Scene, count: int, rng: random.Random) -> list[GermanQuestion]:
    """Up to `count` different German questions, kinds drawn as often as in English."""
    found: dict[str, GermanQuestion] = {}
    for kind in rng.choices(KINDS, _WEIGHTS, k=3 * count):
        question = language.ask(scene, kind, rng)
        if question is not None and len(found) < count:
            translated = german(question)
            found.setdefault(translated.text, translated)
    return list(found.values())


def german_word(rng: random.Random) -> tuple[str, str]:
    """A word and what it means: ("das Herz", "the heart"), ("rot", "red")."""
    if rng.random() < 0.5:
        shape = rng.choice(tuple(_SHAPES))
        return _SHAPES[shape][0], f"the {shape}"
    english = rng.choice(tuple(_VALUES))
    return _VALUES[english], english
