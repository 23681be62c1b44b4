"""What the scripted teacher says: made from the captions and boxes of a prompt, or as a judge."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

_BOX = re.compile(r"^(.+?): \[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]$")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_COMMON = frozenset(
    "a an and are as at be by for from has have he her his in into is it its near next of on one "
    "or other over she some that the their there they this to two under up very was with while "
    "who which background image picture photo".split()
)
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "As an AI language model, I am unable to view images.",
)

Box = tuple[str, tuple[float, float, float, float]]
Pair = tuple[str, str]


def answer(messages: list[dict[str, Any]], rng: random.Random, fault: str | None = None) -> str:
    """The teacher's text for a chat; `fault` is a flaw that it shall have."""
    system = " ".join(_text(m) for m in messages if m.get("role") == "system").lower()
    asked = _text(messages[-1])
    if fault == "refusal":
        return rng.choice(_REFUSALS)
    if fault == "malformed":
        return "Sure! Here is what you asked for:"
    if "[Assistant 2]" in asked:
        return _review(asked)
    if re.search(r"\|\s*(Predict the correctness.*)?$", asked):
        return _grade(asked)
    captions, boxes = _facts(asked)
    if "by reasoning" in system:
        pairs = [_reasoning(captions, boxes, rng)]
    elif "question:" in system:
        pairs = _conversation(captions, boxes, rng)
    else:
        text = _description(captions, boxes, rng)
        return f"According to the captions, {text}" if fault == "mention" else text
    if fault == "mention":
        pairs[-1] = (pairs[-1][0], f"The captions mention it: {pairs[-1][1]}")
    elif fault == "leak":
        pairs[-1] = (f"Do you agree that {_lower(pairs[-1][1])}", pairs[-1][1])
    return "\n===\n".join(f"Question:\n{asks}\n===\nAnswer:\n{says}" for asks, says in pairs)


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content)


def _facts(asked: str) -> tuple[list[str], list[Box]]:
    captions, boxes = [], []
    for line in filter(None, map(str.strip, asked.splitlines())):
        found = _BOX.match(line)
        if found:
            x0, y0, x1, y1 = map(float, found.groups()[1:])
            boxes.append((found[1], (x0, y0, x1, y1)))
        else:
            captions.append(line[0].upper() + line[1:].rstrip(" .") + ".")
    return captions or ["Something can be seen."], boxes


def _conversation(captions: list[str], boxes: list[Box], rng: random.Random) -> list[Pair]:
    told = list(dict.fromkeys(captions))
    rng.shuffle(told)
    opening = ("What is going on in the image?", "What do you see here?", "What is shown here?")
    pairs = [(rng.choice(opening), told[0])]
    things = _things(captions)
    if things:
        named = rng.choice(things)
        says = next(caption for caption in told if named in _WORD.findall(caption.lower()))
        pairs.append((f"Is there anything like '{named}' here?", f"Yes. {says}"))
    if len(told) > 1:
        more = ("What else can you tell me about it?", "Can you say more about the scene?")
        pairs.append((rng.choice(more), told[1]))
    for category, count in Counter(name for name, _ in boxes).most_common(2):
        says = f"I can make out {_NUMBERS[count] if count < 11 else count}."
        pairs.append((f"How many things of the kind '{category}' are there?", says))
    return pairs


def _description(captions: list[str], boxes: list[Box], rng: random.Random) -> str:
    told = list(dict.fromkeys(captions))
    rng.shuffle(told)
    said = told[:3]
    for category, box in boxes[:8]:
        words = rng.choice(("there is", "one sees", "one finds"))
        said.append(f"{_place(box)} {words} {_article(category)}.")
    said.append("Together these things make up the whole scene, and nothing hides them.")
    return " ".join(said)


def _reasoning(captions: list[str], boxes: list[Box], rng: random.Random) -> Pair:
    asks = rng.choice(
        (
            "What can be concluded about the situation?",
            "Why might somebody have wanted to keep this moment?",
            "What should one pay attention to in this situation?",
        )
    )
    things = ", ".join(dict.fromkeys(name for name, _ in boxes)) or "the things around"
    says = (
        f"{rng.choice(captions)} From this it follows that {things} belong together here. People "
        f"who know such situations would expect this, because each part has its usual place and "
        f"its usual use, so nothing unusual seems to be about to happen."
    )
    return asks, says


def _things(captions: list[str]) -> list[str]:
    """Words that two captions share, or any if there are none."""
    counts = Counter(
        word
        for caption in captions
        for word in set(_WORD.findall(caption.lower()))
        if word not in _COMMON and len(word) > 2
    )
    return [word for word, count in counts.items() if count > 1] or list(counts)


def _place(box: tuple[float, float, float, float]) -> str:
    across = ("On the left", "In the middle", "On the right")[min(int((box[0] + box[2]) * 1.5), 2)]
    return f"{across}, {('higher up', 'lower down')[box[1] + box[3] > 1]},"


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".") + "?"


def _review(asked: str) -> str:
    """LLaVA-Bench's two scores of 1 to 10, by the words shared with the context."""
    context, first, second = (
        _between(asked, start, end)
        for start, end in (
            ("[Context]", "[Question]"),
            ("[Assistant 1]", "[End of Assistant 1]"),
            ("[Assistant 2]", "[End of Assistant 2]"),
        )
    )
    truth = set(_WORD.findall(f"{context} {first}".lower())) - _COMMON
    scores = [1 + round(9 * _share(truth, text)) for text in (first, second)]
    return f"{scores[0]} {scores[1]}\nBoth answers were compared with the context word by word."


def _grade(asked: str) -> str:
    """MM-Vet's correctness in 0..1 of the last row of its table."""
    row = [cell.strip() for cell in asked.split("\n") if "|" in cell][-1]
    cells = [cell.strip() for cell in row.split("|")]
    truth, given = (cells[1], cells[2]) if len(cells) > 2 else ("", "")
    return f"{round(_share(set(_WORD.findall(truth.lower())) - _COMMON, given), 1)}"


def _share(truth: set[str], text: str) -> float:
    return len(truth & set(_WORD.findall(text.lower()))) / max(len(truth), 1)


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]
