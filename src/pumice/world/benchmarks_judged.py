"""The held-out scenes as LLaVA-Bench and MM-Vet: free answers, which a judge compares."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.datasets import DETAIL_INSTRUCTIONS
from pumice.world.scenes import Scene, render

# As many questions of each category, and about as many images, as the original has.
WILD_IMAGES = 24
_WILD = {"conv": 17, "detail": 15, "complex": 28}
MMVET_QUESTIONS = 60
_DETAIL = DETAIL_INSTRUCTIONS[0]
_RULE = (
    "The sentences under [Context] describe an image about which both assistants were asked. Give "
    "each answer 1 to 10 points for being helpful, relevant, right and complete. Your first line "
    "holds both numbers with a space between them; reasons may follow below."
)
# Which of MM-Vet's capabilities a kind of question needs.
_NEEDS = {
    "color": ["rec"], "texture": ["rec"], "size": ["rec"], "ocr": ["ocr"],
    "shape": ["rec", "spat"], "where": ["rec", "spat"], "relation": ["rec", "spat"],
    "count": ["rec", "math"],
}  # fmt: skip


def write_llava_wild(folder: Path, scenes: list[Scene], seed: int) -> None:
    """LLaVA-Bench's questions, contexts and reference answers, and the judge's rule."""
    rng = random.Random(f"llava_wild {seed}")
    shown = scenes[:WILD_IMAGES]
    questions: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    contexts: list[dict[str, Any]] = []
    asked = {category: 0 for category in _WILD}
    for index, scene in enumerate(shown):
        image = f"{index + 1:03d}.jpg"
        picture = folder / "images" / image
        picture.parent.mkdir(parents=True, exist_ok=True)
        render(scene).save(picture, quality=92)
        caption = language.description(scene, rng)
        contexts.append({"id": index, "image": image, "caption": caption})
        for category, text, answer in _wild_questions(scene, rng, more=index < 4):
            if asked[category] == _WILD[category]:
                continue
            asked[category] += 1
            ids = {"question_id": len(questions)}
            questions.append({**ids, "image": image, "category": category, "text": text})
            references.append(
                {**ids, "prompt": text, "answer_id": f"reference{len(references)}",
                 "model_id": "pumice world", "metadata": {}, "text": answer}
            )  # fmt: skip
    for name, rows in (
        ("questions.jsonl", questions),
        ("context.jsonl", contexts),
        ("answers_gpt4.jsonl", references),
    ):
        write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    rules = {f"llava_bench_{name}": {"role": "Assistant", "prompt": _RULE} for name in _WILD}
    write_atomic(folder / "rule.json", json.dumps(rules))


def _wild_questions(
    scene: Scene, rng: random.Random, *, more: bool
) -> Iterator[tuple[str, str, str]]:
    """Category, question and reference answer."""
    kind = rng.choice(("color", "texture", "where", "count"))
    told = language.ask(scene, kind, rng) or language.ask(scene, "background", rng)
    assert told is not None
    yield "conv", told.text, told.long
    yield "detail", _DETAIL, language.description(scene, rng)
    first = language.reasoning(scene, rng)
    yield "complex", *first
    second = first
    while more and second[0] == first[0]:
        second = language.reasoning(scene, rng)
    if more:
        yield "complex", *second


def write_mmvet(folder: Path, scenes: list[Scene], seed: int) -> None:
    """MM-Vet's questions: of one capability or several, short and long answers, <AND> and <OR>."""
    rng = random.Random(f"mmvet {seed}")
    questions: dict[str, Any] = {}
    for index in range(MMVET_QUESTIONS):
        scene = scenes[index % len(scenes)]
        text, answer, capabilities = _vet_question(scene, index, rng)
        name = f"v1_{index}"
        picture = folder / "images" / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        render(scene).save(picture)
        questions[name] = {
            "imagename": picture.name, "question": text, "answer": answer,
            "imagesource": "pumice world", "capability": capabilities,
        }  # fmt: skip
    write_atomic(folder / "mm-vet.json", json.dumps(questions, indent=4))


def _vet_question(scene: Scene, index: int, rng: random.Random) -> tuple[str, str, list[str]]:
    form = index % 6
    if form == 0:
        return _DETAIL, language.description(scene, rng), ["rec", "gen", "spat"]
    if form == 1:
        shapes = dict.fromkeys(thing.shape for thing in scene.shapes)
        return "What shapes are there?", "<AND>".join(shapes), ["rec"]
    if form == 2:
        text, answer = language.reasoning(scene, rng)
        return text, answer, ["rec", "gen", "math"]
    kinds = list(_NEEDS)
    rng.shuffle(kinds)
    asked = next(q for kind in kinds if (q := language.ask(scene, kind, rng)))
    return asked.text, f"{asked.short}<OR>{asked.long}", _NEEDS[asked.kind]
