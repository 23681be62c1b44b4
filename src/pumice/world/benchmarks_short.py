"""The held-out scenes as GQA, VizWiz, TextVQA and MME: answers of a word or phrase."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.datasets import SHORT, eval_name
from pumice.world.german import german_questions
from pumice.world.scenes import BACKGROUNDS, COLORS, SHAPES, WORDS, Scene, render

GQA_PER_IMAGE = 3
UNANSWERABLE = 0.3
MME_IMAGES = 30
_ANNOTATORS = 10
_STRUCTURAL = {
    "exist": "verify",
    "exist_pair": "verify",
    "relation": "verify",
    "compare": "compare",
}
_SEMANTIC = {
    "exist": "obj",
    "shape": "obj",
    "which": "obj",
    "relation": "rel",
    "background": "global",
}
Pair = tuple[str, str]


def write_gqa(folder: Path, scenes: list[Scene], seed: int) -> None:
    """GQA's balanced questions of testdev; `groups.global` is the kind of question."""
    rng = random.Random(f"gqa {seed}")
    asked = [(index, q, q.text) for index, scene in enumerate(scenes)
             for q in language.questions(scene, GQA_PER_IMAGE, rng)]  # fmt: skip
    _write_gqa_file(folder / "testdev_balanced_questions.json", asked)


def write_xgqa(folder: Path, scenes: list[Scene], seed: int) -> None:
    """xGQA's German file: German questions, English answers."""
    rng = random.Random(f"xgqa {seed}")
    asked = [(index, q.english, q.text) for index, scene in enumerate(scenes)
             for q in german_questions(scene, GQA_PER_IMAGE, rng)]  # fmt: skip
    _write_gqa_file(folder / "testdev_balanced_questions_de.json", asked)


def _write_gqa_file(path: Path, asked: list[tuple[int, language.Question, str]]) -> None:
    """Picture, question and the words in which it is asked."""
    questions = {
        f"20{number:07d}": {
            "semantic": [], "entailed": [], "equivalent": [], "question": text,
            "imageId": Path(eval_name(index)).stem, "isBalanced": True,
            "groups": {"global": question.kind, "local": None}, "answer": question.short,
            "semanticStr": "", "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": question.kind,
                      "semantic": _SEMANTIC.get(question.kind, "attr"),
                      "structural": _structural(question)},
            "fullAnswer": question.long,
        }
        for number, (index, question, text) in enumerate(asked)
    }  # fmt: skip
    write_atomic(path, json.dumps(questions))


def _structural(asked: language.Question) -> str:
    named = all(option in asked.text for option in asked.options)
    return "choose" if named else _STRUCTURAL.get(asked.kind, "query")


def write_vizwiz(folder: Path, scenes: list[Scene], seed: int) -> None:
    """VizWiz's val.json and, without answers, test.json; some questions cannot be answered."""
    rng = random.Random(f"vizwiz {seed}")
    rows = []
    for index, scene in enumerate(scenes):
        # Of a kind that the scene has no question of, none comes; every scene has a background.
        asked = next(iter(language.questions(scene, 1, rng)), None)
        asked = asked or language.ask(scene, "background", rng)
        assert asked is not None
        text, short = asked.text, asked.short
        absent = [name for name in SHAPES if name not in {thing.shape for thing in scene.shapes}]
        if rng.random() < UNANSWERABLE:
            text, short = f"What color is the {rng.choice(absent)}?", "unanswerable"
        # One or two annotators say that they cannot tell, as in the original.
        doubts = rng.randrange(3) if short != "unanswerable" else 0
        said = [short] * (_ANNOTATORS - doubts) + ["unsuitable"] * doubts
        rows.append(
            {"image": eval_name(index), "question": text,
             "answers": [{"answer": word, "answer_confidence": "yes"} for word in said],
             "answer_type": _answer_type(short), "answerable": int(short != "unanswerable")}
        )  # fmt: skip
    write_atomic(folder / "val.json", json.dumps(rows))
    hidden = [{"image": row["image"], "question": row["question"]} for row in rows]
    write_atomic(folder / "test.json", json.dumps(hidden))


def _answer_type(short: str) -> str:
    if short in ("yes", "no"):
        return "yes/no"
    if short == "unanswerable":
        return short
    return "number" if short.isdigit() else "other"


def write_textvqa(folder: Path, scenes: list[Scene], seed: int) -> None:
    """TextVQA's questions, and LLaVA's file with what an OCR system read: at times nothing."""
    rng = random.Random(f"textvqa {seed}")
    rows: list[dict[str, Any]] = []
    asked_rows = []
    for index, scene in enumerate(scenes):
        asked = language.ask(scene, "ocr", rng)
        if asked is None:
            continue
        image = Path(eval_name(index)).stem
        rows.append(
            {"question": asked.text.lower(), "image_id": image, "image_classes": ["Poster"],
             "image_width": scene.pixels, "image_height": scene.pixels,
             "answers": [asked.short] * _ANNOTATORS, "question_tokens": asked.text.lower().split(),
             "question_id": 34602 + len(rows), "set_name": "val"}
        )  # fmt: skip
        tokens = asked.short if rng.random() < 0.9 else ""
        text = f"{asked.text.capitalize()}\nReference OCR token: {tokens}\n{SHORT}"
        asked_rows.append({"question_id": image, "image": f"{image}.jpg", "text": text})
    write_atomic(
        folder / "TextVQA_0.5.1_val.json",
        json.dumps({"dataset_type": "val", "dataset_version": "0.5.1", "data": rows}),
    )
    lines = "".join(json.dumps({**row, "category": "default"}) + "\n" for row in asked_rows)
    write_atomic(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)


def write_mme(folder: Path, scenes: list[Scene], seed: int) -> None:
    """Seven of MME's subtasks, those that a world of shapes can stand for.

    A picture comes with two questions, one for each answer.
    """
    for subtask, ask in _MME.items():
        rng = random.Random(f"mme {subtask} {seed}")
        place = folder / "MME_Benchmark_release_version" / subtask
        needed = _NEEDED.get(subtask)
        fitting = [scene for scene in scenes if needed is None or needed(scene)]
        for number, scene in enumerate(fitting[:MME_IMAGES]):
            place.mkdir(parents=True, exist_ok=True)
            render(scene).save(place / f"{number:04d}.jpg", quality=92)
            lines = [
                f"{question} Please answer yes or no.\t{answer}\n"
                for question, answer in zip(ask(scene, rng), ("Yes", "No"), strict=True)
            ]
            write_atomic(place / f"{number:04d}.txt", "".join(lines), sync=False)


def _existence(scene: Scene, rng: random.Random) -> Pair:
    present = [thing.shape for thing in scene.shapes]
    absent = [name for name in SHAPES if name not in present]
    here, away = (language.article(rng.choice(pool)) for pool in (present, absent))
    return f"Is there {here} in the image?", f"Is there {away} in the image?"


def _count(scene: Scene, rng: random.Random) -> Pair:
    count = len(scene.shapes)
    wrong = rng.choice([number for number in range(1, 6) if number != count])
    return _are_there(count, ""), _are_there(wrong, "")


def _more_than(scene: Scene, rng: random.Random) -> Pair:
    count = len(scene.shapes)
    return _are_there(rng.randrange(count), "more than "), _are_there(count, "more than ")


def _are_there(count: int, how: str) -> str:
    return f"Are there {how}{count} shapes in the image?"


def _position(scene: Scene, rng: random.Random) -> Pair:
    one, other = rng.sample(scene.shapes, 2)
    if one.column != other.column:
        words = ("left of", "right of") if one.column < other.column else ("right of", "left of")
    else:
        words = ("above", "below") if one.row < other.row else ("below", "above")
    true, false = (f"Is the {one.shape} {word} the {other.shape}?" for word in words)
    return true, false


def _color(scene: Scene, rng: random.Random) -> Pair:
    thing = rng.choice(scene.shapes)
    wrong = rng.choice([color for color in COLORS if color != thing.color])
    ask = "Is there {} in the image?"
    return (
        ask.format(language.article(f"{thing.color} {thing.shape}")),
        ask.format(language.article(f"{wrong} {thing.shape}")),
    )


def _scene(scene: Scene, rng: random.Random) -> Pair:
    wrong = rng.choice([name for name in BACKGROUNDS if name != scene.background])
    return f"Is the background {scene.background}?", f"Is the background {wrong}?"


def _ocr(scene: Scene, rng: random.Random) -> Pair:
    assert scene.sign is not None
    wrong = rng.choice([word for word in WORDS if word != scene.sign.word])
    ask = "Is the word on the sign {}?"
    return ask.format(scene.sign.word), ask.format(wrong)


_MME: dict[str, Callable[[Scene, random.Random], Pair]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
    "scene": _scene,
    "OCR": _ocr,
    "numerical_calculation": _more_than,
}
# What a scene must have to be asked about.
_NEEDED: dict[str, Callable[[Scene], bool]] = {
    "OCR": lambda scene: scene.sign is not None,
    "position": lambda scene: len(scene.shapes) > 1,
}
