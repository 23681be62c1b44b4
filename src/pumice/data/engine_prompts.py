"""What the data engine asks for, and how an answer in the asked form is read."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pumice.core.errors import DataError
from pumice.core.registry import Registry
from pumice.data.engine_scenes import Described

Pair = tuple[str, str]

VERSION = "1"
"""Changes with every word below; part of each row's provenance."""

_SEEN = (
    "You help to write training texts about pictures. You cannot see the picture; you get "
    "sentences that people wrote about it, one a line{boxes}. Write as somebody who looks at the "
    "picture itself: never speak of sentences, captions, boxes, coordinates or of what you were "
    "given. State only what is certain from it; do not guess names, brands or numbers.\n\n"
)
_BOXES = (
    ", and after an empty line the things in it, each as `kind: [x0, y0, x1, y1]` with the left, "
    "top, right and bottom edge as shares of the picture's width and height"
)
_FORM = "Question:\n<question>\n===\nAnswer:\n<answer>"
_CONVERSATION = (
    "Write a conversation between a person who asks about the picture and an assistant who sees "
    "it. Ask about kinds of things, their number, what they do, where they are and how they lie "
    "to each other, and end with one or two questions that need knowledge of the world. Ask only "
    "what can be answered with confidence. No question may hold its own answer. Use exactly this "
    f"form, with === between all parts and nothing else:\n\n{_FORM}\n===\n{_FORM}"
)
_DETAIL = (
    "Describe the picture in detail, in one or more paragraphs of running text: the scene, each "
    "thing with its place and its relation to others, and what happens. Use the places to say "
    "where things are, in words and without numbers. Write the description alone."
)
_REASONING = (
    "Write one question about the picture that can be answered only by reasoning over what is "
    "seen together with knowledge of the world, and its answer, which explains the reasoning step "
    "by step. The question must not itself tell details of the picture. Use exactly this form and "
    f"nothing else:\n\n{_FORM}"
)
DETAIL_QUESTIONS = (
    "What can be seen in this picture? Describe all of it.",
    "Please give a thorough description of this image.",
    "Tell me in detail what the image shows.",
    "Write a full description of this picture.",
    "Walk me through everything that is visible here.",
    "Could you describe this scene closely?",
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of data: its instruction, what the prompt shows, and the sizes that are sound."""

    name: str
    instruction: str
    shows_boxes: bool
    pairs: tuple[int, int]
    """Fewest and most questions."""
    words: tuple[int, int]
    """Fewest and most words of an answer."""
    usual_tokens: int
    """About how long a reply is, for the estimate before there is one."""

    @property
    def described_only(self) -> bool:
        """Whether the reply is an answer alone, to a question of our own."""
        return self.name == "detail"

    def system(self) -> str:
        """The system message."""
        return _SEEN.format(boxes=_BOXES if self.shows_boxes else "") + self.instruction


KINDS = Registry(
    "kind of generated data",
    {
        "conversation": Kind("conversation", _CONVERSATION, False, (2, 16), (1, 200), 350),
        "detail": Kind("detail", _DETAIL, True, (1, 1), (20, 600), 250),
        "reasoning": Kind("reasoning", _REASONING, True, (1, 1), (15, 500), 250),
    },
)


def custom_kind(file: Path) -> Kind:
    """A kind whose instruction is a file's text, which must ask for the form that is read."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: this is not UTF-8 text. Save it again as UTF-8.") from error
    if "Question:" not in text or "Answer:" not in text or "===" not in text:
        raise DataError(
            f"{file}: the prompt does not ask for the form that is read: Question:, then ===, then "
            f"Answer:, with === between further pairs. Add the form to it."
        )
    return Kind("custom", text, True, (1, 32), (1, 1000), 300)


def asked_text(scene: Described, *, boxes: bool) -> str:
    """The user message: captions, and boxes with three decimals after an empty line."""
    text = "\n".join(scene.captions)
    if boxes and scene.boxes:
        lines = (
            f"{category}: [{', '.join(f'{edge:.3f}' for edge in box)}]"
            for category, box in scene.boxes
        )
        text += "\n\n" + "\n".join(lines)
    return text


def read_pairs(kind: Kind, scene: Described, text: str) -> list[Pair] | None:
    """Questions and answers of a reply; None when it is not in the asked form."""
    if kind.described_only:
        if re.search(r"^(Question:|Answer:|={3,})", text, flags=re.MULTILINE):
            return None
        ask = random.Random(f"detail {scene.id}").choice(DETAIL_QUESTIONS)
        return [(ask, text.strip())]
    parts = [part.strip() for part in re.split(r"^={3,}\s*$", text.strip(), flags=re.MULTILINE)]
    parts = [part for part in parts if part]
    if not parts or len(parts) % 2:
        return None
    pairs = []
    for asks, says in zip(parts[::2], parts[1::2], strict=True):
        if not (asks.startswith("Question:") and says.startswith("Answer:")):
            return None
        pairs.append((asks.removeprefix("Question:").strip(), says.removeprefix("Answer:").strip()))
    return pairs if all(asks and says for asks, says in pairs) else None


def written_pairs(kind: Kind, pairs: Sequence[Pair]) -> str:
    """Questions and answers in the asked form, which `read_pairs` reads."""
    if kind.described_only:
        return pairs[0][1]
    return "\n===\n".join(f"Question:\n{asks}\n===\nAnswer:\n{says}" for asks, says in pairs)
