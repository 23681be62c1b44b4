"""The held-out scenes as benchmarks, each in its official files under their official names."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.benchmarks_choice import write_mmbench, write_seed
from pumice.world.benchmarks_judged import write_llava_wild, write_mmvet
from pumice.world.benchmarks_short import (
    write_gqa,
    write_mme,
    write_textvqa,
    write_vizwiz,
    write_xgqa,
)
from pumice.world.datasets import SHORT, eval_name
from pumice.world.scenes import SHAPES, Scene, render

POPE_PER_SIDE = 3
VQA_PER_IMAGE = 6
# How many questions of a kind are drawn to ask the one with the rarest answer, and how far over
# the mean of its kind's answers an answer may come.
BALANCING_DRAWS = 8
LARGEST_SHARE = 1.3
CHOICES_PER_WORLD = 400
_TEST_DEV = 4  # One in so many test questions is one of test-dev.
DETAIL_QUESTION = "Provide a detailed description of the given image."


def write_benchmarks(out: Path, scenes: list[Scene], seed: int) -> None:
    """Write the official files of every benchmark the world can stand for."""
    write_pope(out / "pope", scenes, seed)
    write_vqa(out / "vqav2", scenes, seed)
    write_scienceqa(out / "scienceqa", scenes, seed)
    write_refcoco(out / "refcoco", scenes, seed)
    write_detail(out / "detail", scenes)
    write_gqa(out / "gqa", scenes, seed)
    write_xgqa(out / "xgqa", scenes, seed)
    write_vizwiz(out / "vizwiz", scenes, seed)
    write_textvqa(out / "textvqa", scenes, seed)
    write_mme(out / "mme", scenes, seed)
    write_mmbench(out / "mmbench", scenes, seed)
    write_seed(out / "seed_bench", scenes, seed)
    write_llava_wild(out / "llava_wild", scenes, seed)
    write_mmvet(out / "mmvet", scenes, seed)


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_pope(folder: Path, scenes: list[Scene], seed: int) -> None:
    """POPE's three files: as many absent as present objects, the absent ones chosen three ways.

    As POPE builds them: random absent objects; the most frequent absent ones (popular); the absent
    ones seen most often together with what is present (adversarial).
    """
    frequency = Counter(thing.shape for scene in scenes for thing in scene.shapes)
    together = Counter(
        pair
        for scene in scenes
        for pair in permutations(sorted(thing.shape for thing in scene.shapes), 2)
    )
    for strategy in ("random", "popular", "adversarial"):
        rng = random.Random(f"pope {strategy} {seed}")
        rows: list[dict[str, Any]] = []
        for index, scene in enumerate(scenes):
            present = [thing.shape for thing in scene.shapes]
            if len(present) < POPE_PER_SIDE:
                continue
            absent = [name for name in SHAPES if name not in present]
            if strategy == "popular":
                absent.sort(key=lambda name: -frequency[name])
            elif strategy == "adversarial":
                near = {name: sum(together[other, name] for other in present) for name in absent}
                absent.sort(key=near.__getitem__, reverse=True)
            else:
                rng.shuffle(absent)
            asked = zip(rng.sample(present, POPE_PER_SIDE), absent[:POPE_PER_SIDE], strict=True)
            for names in asked:
                for name, label in zip(names, ("yes", "no"), strict=True):
                    text = f"Is there {language.article(name)} in the image?"
                    rows.append({"question_id": len(rows) + 1, "image": eval_name(index),
                                 "text": text, "label": label})  # fmt: skip
        _lines(folder / f"coco_pope_{strategy}.json", rows)


def write_vqa(folder: Path, scenes: list[Scene], seed: int) -> None:
    """VQAv2's questions and annotations; `question_type` is the kind of question."""
    rng = random.Random(f"vqa {seed}")
    questions, annotations = [], []
    told: dict[str, Counter[str]] = {kind: Counter() for kind in language.KINDS}
    for index, scene in enumerate(scenes):
        for number, asked in enumerate(_balanced_questions(scene, told, rng)):
            ids = {"image_id": index + 1, "question_id": (index + 1) * 1000 + number}
            questions.append({**ids, "question": asked.text})
            answer_type = "yes/no" if asked.short in ("yes", "no") else "other"
            if asked.short.isdigit():
                answer_type = "number"
            answers = [
                {"answer": asked.short, "answer_confidence": "yes", "answer_id": person + 1}
                for person in range(10)
            ]
            annotations.append(
                {**ids, "question_type": asked.kind, "answer_type": answer_type,
                 "multiple_choice_answer": asked.short, "answers": answers}
            )  # fmt: skip
    head = {"info": {"description": "pumice world"}, "license": {}, "data_type": "mscoco",
            "data_subtype": "val2014"}  # fmt: skip
    write_atomic(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        json.dumps({**head, "task_type": "Open-Ended", "questions": questions}),
    )
    write_atomic(
        folder / "v2_mscoco_val2014_annotations.json",
        json.dumps({**head, "annotations": annotations}),
    )
    _write_vqa_test(folder, questions)


def _write_vqa_test(folder: Path, questions: list[dict[str, Any]]) -> None:
    """LLaVA's files of the test questions, without answers; test-dev is a part of test."""
    rows = [
        {"question_id": asked["question_id"], "image": eval_name(asked["image_id"] - 1),
         "text": f"{asked['question']}\n{SHORT}", "category": "default"}
        for asked in questions
    ]  # fmt: skip
    for split, part in (("test2015", rows), ("test-dev2015", rows[::_TEST_DEV])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        write_atomic(folder / f"llava_vqav2_mscoco_{split}.jsonl", text)


def _balanced_questions(
    scene: Scene, told: dict[str, Counter[str]], rng: random.Random
) -> list[language.Question]:
    """Questions whose answers even out within each kind; `told` counts the answers so far.

    Balanced as VQA v2 was made from VQA v1, so that guessing the usual answer does not pay: of
    several questions of a kind the one with the rarest answer is asked, and none whose answer is
    well over its share.
    """
    asked: list[language.Question] = []
    weights = [weight for _, weight in language.KINDS.values()]
    for kind in rng.choices(tuple(language.KINDS), weights, k=3 * VQA_PER_IMAGE):
        drawn = [language.ask(scene, kind, rng) for _ in range(BALANCING_DRAWS)]
        known = {question.text for question in asked}
        fresh = [question for question in drawn if question and question.text not in known]
        counts = told[kind]
        if not fresh or len(asked) == VQA_PER_IMAGE:
            continue
        rarest = min(fresh, key=lambda question: counts[question.short])
        share = counts.total() / max(len(counts), 1)
        if counts[rarest.short] < LARGEST_SHARE * share + 2:
            counts[rarest.short] += 1
            asked.append(rarest)
    return asked


def write_scienceqa(folder: Path, scenes: list[Scene], seed: int) -> None:
    """ScienceQA's problems.json and pid_splits.json: multiple choice, one question a picture."""
    rng = random.Random(f"scienceqa {seed}")
    problems: dict[str, Any] = {}
    for scene in scenes[:CHOICES_PER_WORLD]:
        kinds = [kind for kind in language.CHOICE_KINDS if kind != "background"]
        rng.shuffle(kinds)
        asked = next(q for kind in kinds if (q := language.ask(scene, kind, rng)))
        options, letter = language.choices(asked, rng)
        name = str(len(problems) + 1)
        problems[name] = {
            "question": asked.text, "choices": options, "answer": "ABCDEF".index(letter),
            "hint": "", "image": "image.png", "task": "closed choice", "grade": "grade2",
            "subject": "natural science", "topic": asked.kind, "category": asked.kind,
            "skill": asked.kind, "lecture": "", "solution": asked.long, "split": "test",
        }  # fmt: skip
        picture = folder / "images" / "test" / name / "image.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        render(scene).save(picture)
    write_atomic(folder / "problems.json", json.dumps(problems))
    splits = {"train": [], "val": [], "test": list(problems)}
    write_atomic(folder / "pid_splits.json", json.dumps(splits))


def write_refcoco(folder: Path, scenes: list[Scene], seed: int) -> None:
    """COCO-style phrases with boxes: one phrase a picture."""
    rng = random.Random(f"refcoco {seed}")
    pictures, annotations = [], []
    for index, scene in enumerate(scenes):
        thing = rng.choice(scene.shapes)
        x0, y0, x1, y1 = thing.box
        pictures.append(
            {
                "id": index + 1,
                "file_name": eval_name(index),
                "width": scene.pixels,
                "height": scene.pixels,
            }
        )
        phrase = rng.choice((language.thing_phrase(thing), f"the {thing.shape}"))
        annotations.append(
            {"id": index + 1, "image_id": index + 1, "bbox": [x0, y0, x1 - x0, y1 - y0],
             "caption": phrase}
        )  # fmt: skip
    write_atomic(
        folder / "refcoco_val.json", json.dumps({"images": pictures, "annotations": annotations})
    )


def write_detail(folder: Path, scenes: list[Scene]) -> None:
    """LLaVA question rows that ask for a detailed description of each picture."""
    _lines(
        folder / "questions.jsonl",
        [
            {"question_id": index + 1, "image": eval_name(index), "text": DETAIL_QUESTION}
            for index in range(len(scenes))
        ],
    )
