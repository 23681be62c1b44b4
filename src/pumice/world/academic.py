"""The training scenes in the official annotation format of every source of LLaVA-1.5's mixture.

They are small stand-ins: keys, types and file names are the official ones, so that converters and
documents run on them offline. The pictures are those of the training files.
"""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.scenes import Scene

# Enough to show every rule at work, and a second or two to make.
SCENES = 200
_PEOPLE = 10


def write_academic(folder: Path, scenes: list[Scene], seed: int) -> None:
    """Write one directory for each source; the first `SCENES` scenes are asked about."""
    scenes = scenes[:SCENES]
    for name, write in (
        ("vqav2", _write_vqa),
        ("okvqa", _write_vqa),
        ("gqa", _write_gqa),
        ("aokvqa", _write_aokvqa),
        ("ocrvqa", _write_ocrvqa),
        ("textcaps", _write_textcaps),
        ("refcoco", _write_refcoco),
        ("vg", _write_vg),
        ("scienceqa", _write_scienceqa),
        ("sharegpt", _write_sharegpt),
        ("lcs558k", _write_lcs),
        ("llava-instruct", _write_llava),
    ):
        write(folder / name, scenes, random.Random(f"academic {name} {seed}"))


def _json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, ensure_ascii=False))


def _name(index: int) -> str:
    """The name of a picture of the training files, which is also its id as text."""
    return f"{index + 1:012d}"


def _people(answer: str, rng: random.Random) -> list[dict[str, Any]]:
    """Ten annotators, of whom up to four say something else."""
    others = rng.randrange(5)
    said = [answer] * (_PEOPLE - others) + [rng.choice(("not sure", "thing"))] * others
    rng.shuffle(said)
    return [
        {"answer": text, "raw_answer": text, "answer_confidence": "yes", "answer_id": number + 1}
        for number, text in enumerate(said)
    ]


def _write_vqa(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    """Questions and annotations as VQAv2 and OK-VQA have them."""
    questions, annotations = [], []
    for index, scene in enumerate(scenes):
        for number, asked in enumerate(language.questions(scene, 4, rng)):
            ids = {"image_id": index + 1, "question_id": (index + 1) * 1000 + number}
            questions.append({**ids, "question": asked.text})
            annotations.append(
                {**ids, "question_type": asked.kind, "answer_type": "other",
                 "answers": _people(asked.short, rng)}
            )  # fmt: skip
            if folder.name == "vqav2":
                annotations[-1]["multiple_choice_answer"] = asked.short
    head = {"info": {"description": "pumice world"}, "license": {}, "data_type": "mscoco",
            "data_subtype": "train2014"}  # fmt: skip
    version = "v2_" if folder.name == "vqav2" else ""
    _json(
        folder / f"{version}OpenEnded_mscoco_train2014_questions.json",
        {**head, "task_type": "Open-Ended", "questions": questions},
    )
    _json(
        folder / f"{version}mscoco_train2014_annotations.json",
        {**head, "annotations": annotations},
    )


def _write_gqa(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    found: dict[str, Any] = {}
    for index, scene in enumerate(scenes):
        for asked in language.questions(scene, 4, rng):
            found[f"{len(found) + 1:08d}"] = {
                "question": asked.text, "imageId": _name(index), "answer": asked.short,
                "fullAnswer": asked.long, "isBalanced": rng.random() < 0.8,
                "types": {"structural": "query", "semantic": asked.kind, "detailed": asked.kind},
                "groups": {"global": asked.kind, "local": asked.kind},
            }  # fmt: skip
    _json(folder / "train_balanced_questions.json", found)


def _write_aokvqa(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    rows = []
    for index, scene in enumerate(scenes):
        made = [language.ask(scene, kind, rng) for kind in language.CHOICE_KINDS]
        asked = rng.choice([question for question in made if question])
        options, letter = language.choices(asked, rng)
        rows.append(
            {"split": "train", "image_id": index + 1, "question_id": f"q{index + 1:020d}",
             "question": asked.text, "choices": options,
             "correct_choice_idx": "ABCDEF".index(letter),
             "direct_answers": [asked.short] * _PEOPLE, "difficult_direct_answer": False,
             "rationales": [asked.long] * 3}
        )  # fmt: skip
    _json(folder / "aokvqa_v1p0_train.json", rows)


def _write_ocrvqa(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    covers = {}
    for index, scene in enumerate(scenes):
        asked = language.questions(scene, 4, rng)
        covers[_name(index)] = {
            "imageURL": f"http://images.example.org/{_name(index)}.jpg",
            "questions": [question.text for question in asked],
            "answers": [question.short for question in asked],
            "title": scene.sign.word if scene.sign else "untitled", "authorName": "nobody",
            "genre": scene.background, "split": rng.choice((1, 1, 1, 2, 3)),
        }  # fmt: skip
    _json(folder / "dataset.json", covers)


def _write_textcaps(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    captions: list[dict[str, Any]] = []
    words: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        told = [language.caption(scene, rng) for _ in range(5)]
        for text in told:
            captions.append(
                {"image_id": _name(index), "caption_id": len(captions), "caption_str": text,
                 "reference_strs": told, "image_path": f"train/{_name(index)}.jpg",
                 "image_width": scene.pixels, "image_height": scene.pixels, "set_name": "train"}
            )  # fmt: skip
        tokens = [scene.sign.word] if scene.sign else []
        words.append({"image_id": _name(index), "ocr_tokens": tokens, "ocr_info": []})
    head = {"dataset_name": "pumice world", "dataset_type": "train", "dataset_version": "0.1"}
    _json(folder / "TextCaps_0.1_train.json", {**head, "data": captions})
    _json(folder / "TextVQA_Rosetta_OCR_v0.2_train.json", {**head, "data": words})


def _write_refcoco(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    """Pickled references and COCO's boxes, as the three RefCOCO sets come."""
    refs: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        name = f"{_name(index)}.jpg"
        size = {"width": scene.pixels, "height": scene.pixels}
        pictures.append({"id": index + 1, "file_name": name, **size})
        for thing in scene.shapes:
            x0, y0, x1, y1 = thing.box
            boxes.append(
                {"id": len(boxes) + 1, "image_id": index + 1, "category_id": 1,
                 "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0,
                 "segmentation": []}
            )  # fmt: skip
            phrases = (language.thing_phrase(thing), f"the {thing.shape}", thing.place)
            refs.append(
                {"ref_id": len(refs), "ann_id": len(boxes), "image_id": index + 1,
                 "category_id": 1, "file_name": name,
                 "split": rng.choice(("train", "train", "train", "val", "testA")),
                 "sent_ids": [len(refs) * 3 + k for k in range(3)],
                 "sentences": [
                     {"sent_id": len(refs) * 3 + k, "sent": text, "raw": text.capitalize(),
                      "tokens": text.split()} for k, text in enumerate(phrases)]}
            )  # fmt: skip
    write_atomic(folder / "refs(unc).p", pickle.dumps(refs, protocol=2))
    categories = [{"id": 1, "name": "shape", "supercategory": "shape"}]
    _json(
        folder / "instances.json",
        {"images": pictures, "annotations": boxes, "categories": categories},
    )


def _write_vg(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    descriptions, pictures = [], []
    for index, scene in enumerate(scenes):
        regions: list[dict[str, Any]] = []
        for thing in scene.things:
            for text in (language.thing_phrase(thing), f"a {thing.color} thing", thing.place):
                x0, y0, x1, y1 = thing.box
                regions.append(
                    {"region_id": index * 100 + len(regions), "image_id": index + 1,
                     "phrase": text, "x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
                )  # fmt: skip
        descriptions.append({"id": index + 1, "regions": regions})
        place = rng.choice(("VG_100K", "VG_100K_2"))
        pictures.append(
            {"image_id": index + 1, "width": scene.pixels, "height": scene.pixels,
             "url": f"https://images.example.org/{place}/{index + 1}.jpg", "coco_id": None,
             "flickr_id": None}
        )  # fmt: skip
    _json(folder / "region_descriptions.json", descriptions)
    _json(folder / "image_data.json", pictures)


def _write_scienceqa(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    problems = {}
    for index, scene in enumerate(scenes):
        made = [language.ask(scene, kind, rng) for kind in language.CHOICE_KINDS]
        asked = rng.choice([question for question in made if question])
        options, letter = language.choices(asked, rng)
        problems[str(index + 1)] = {
            "question": asked.text, "choices": options, "answer": "ABCDEF".index(letter),
            "hint": rng.choice(("", "Look at the picture.")), "image": f"{_name(index)}.jpg",
            "task": "closed choice", "grade": "grade2", "subject": "natural science",
            "topic": asked.kind, "category": asked.kind, "skill": asked.kind,
            "lecture": "A shape has a color and a place.", "solution": asked.long,
            "split": "train",
        }  # fmt: skip
    _json(folder / "problems.json", problems)
    _json(folder / "pid_splits.json", {"train": list(problems), "val": [], "test": []})


def _write_sharegpt(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    """Dialogues as they were shared, some of them with the faults that cleaning removes."""
    rows = []
    for index in range(len(scenes)):
        turns = [
            {"from": speaker, "value": text}
            for asked in language.text_dialogue(rng)
            for speaker, text in zip(("human", "gpt"), asked, strict=True)
        ]
        if index % 10 == 3:
            turns = [{"from": "gpt", "value": "Hello!"}, *turns]
        elif index % 10 == 5:
            turns.append({"from": "human", "value": "And then?"})
        elif index % 10 == 7:
            turns[1] = {"from": "gpt", "value": f"<div><p>{turns[1]['value']}</p></div>"}
        elif index % 10 == 9:
            turns.insert(1, turns[0])
        rows.append({"id": f"w{index:06d}_0", "conversations": turns})
    _json(folder / "sg_90k_part1.json", rows)


def _write_lcs(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    _json(
        folder / "blip_laion_cc_sbu_558k_meta.json",
        [
            {"id": f"{index:09d}", "image": f"{_name(index)}.jpg",
             "blip_caption": language.caption(scene, rng), "url": ""}
            for index, scene in enumerate(scenes)
        ],
    )  # fmt: skip


def _write_llava(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    rows = []
    for index, scene in enumerate(scenes):
        turns = []
        for number, asked in enumerate(language.questions(scene, 3, rng)):
            slot = "" if number else "<image>\n"
            turns += [{"from": "human", "value": slot + asked.text},
                      {"from": "gpt", "value": asked.long}]  # fmt: skip
        rows.append({"id": _name(index), "image": f"{_name(index)}.jpg", "conversations": turns})
    _json(folder / "llava_instruct_150k.json", rows)
