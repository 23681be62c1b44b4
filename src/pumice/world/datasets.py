"""The world's training files: pictures, COCO JSON, LLaVA JSON (pretrain, instruct, multi_image).

`make_world` writes everything under one directory; the benchmark files come from
`world.benchmarks`. Evaluation scenes are disjoint from training scenes by their seeds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.files import write_atomic
from pumice.world import language
from pumice.world.multi_image import multi_image_rows
from pumice.world.scenes import SHAPES, Scene, Thing, random_scene, render, widened

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
REGION_NAME = "Please provide a short description for this region: {box}."
REGION_BOX = (
    "Please provide the bounding box coordinate of the region this sentence describes: {phrase}."
)
BRIEF_INSTRUCTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Give a short and clear explanation of the subsequent image.",
)
DETAIL_INSTRUCTIONS = (
    "Describe the following image in detail.",
    "Provide a detailed description of the given image.",
    "Explain the various aspects of the image before you.",
)
OPENINGS = ("What do you see in the image?", "What is in this picture?")
# Shares of the instruction mixture, after the rows of LLaVA-1.5's 665K mixture.
MIXTURE = {
    "conversation": 0.06, "detail": 0.11, "reasoning": 0.03, "vqa": 0.13, "ocr": 0.15,
    "choice": 0.40, "region": 0.08, "text": 0.04,
}  # fmt: skip
# How often a kind is asked as multiple choice: those with many possible answers take longest.
CHOICE_SHARES = {
    "shape": 2.0, "where": 2.0, "which": 2.0, "ocr": 1.5, "color": 1.0, "texture": 1.0,
    "background": 0.3,
}  # fmt: skip
EVAL_SCENES = 5_000_000
SEED_STRIDE = 40_000
ROWS_PER_IMAGE = 1.5
# Of a row about regions: how many it has, and the share whose box is given and not asked for.
REGIONS = 3
NAMED_REGIONS = 0.35

Progress = Callable[[int, int], None]
Turns = list[tuple[str, str]]
"""What is said and what is answered, in order."""


def make_world(
    out: Path,
    *,
    images: int = 6000,
    eval_images: int = 500,
    seed: int = 0,
    wide: bool = False,
    sources: bool = False,
    variants: bool = False,
    resolution: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the training files and the benchmarks' official files of a world to `out`.

    A `wide` world has pictures twice as wide and high with things of the same pixels: in the one
    view of a vision backbone they are half as large, and signs cannot be read. `sources` adds
    sources/: one training file for each source of LLaVA-1.5's mixture, `variants` adds files that
    say less of the same pictures and skills/: one file for each skill. With a `resolution` pictures
    keep their size but no more detail than so many pixels a side hold. The same arguments write the
    same bytes. `world.json` is written last: its presence means the world is complete.
    """
    from pumice.world.academic import write_academic
    from pumice.world.benchmarks import write_benchmarks
    from pumice.world.less_detail import write_less_detail
    from pumice.world.mixture_sources import write_sources
    from pumice.world.skills import write_skills

    for name, count in (("images", images), ("eval_images", eval_images)):
        if not 1 <= count <= SEED_STRIDE:
            raise PumiceError(
                f"{name}={count} cannot be made: a world holds 1 to {SEED_STRIDE} images of each "
                "split. Give a number in this range."
            )
    first = seed * SEED_STRIDE
    train = _scenes(range(first, first + images), wide, resolution)
    first += EVAL_SCENES
    held_out = _scenes(range(first, first + eval_images), wide, resolution)
    total = images + eval_images
    done = _write_pictures(train, out / "images" / "train", train_name, progress, 0, total)
    _write_pictures(held_out, out / "val2014", eval_name, progress, done, total)
    _write_json(out / "llava" / "pretrain.json", pretrain_rows(train, seed))
    _write_json(out / "llava" / "instruct.json", instruct_rows(train, seed))
    several = multi_image_rows(train, train_name, out / "images", seed)
    _write_json(out / "llava" / "multi_image.json", several)
    write_coco(out / "coco" / "annotations", "train2014", train, train_name, seed)
    write_coco(out / "coco" / "annotations", "val2014", held_out, eval_name, seed)
    write_benchmarks(out, held_out, seed)
    write_academic(out / "academic", train, seed)
    if sources:
        write_sources(out / "sources", train, seed)
    if variants:
        write_less_detail(out / "llava", train, seed)
        write_skills(out / "skills", train, seed)
    record = {
        "format": 1, "images": images, "eval_images": eval_images, "seed": seed, "wide": wide,
        "sources": sources, "variants": variants, "resolution": resolution,
    }  # fmt: skip
    _write_json(out / "world.json", record)


def _scenes(seeds: Iterable[int], wide: bool, resolution: int | None) -> list[Scene]:
    scenes = [widened(random_scene(seed)) if wide else random_scene(seed) for seed in seeds]
    return [replace(scene, resolution=resolution) for scene in scenes]


def train_name(index: int) -> str:
    """File name of a training picture."""
    return f"{index + 1:012d}.jpg"


def eval_name(index: int) -> str:
    """File name of a held-out picture, as COCO names its validation images."""
    return f"COCO_val2014_{index + 1:012d}.jpg"


def _write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, ensure_ascii=False))


def _write_pictures(
    scenes: Iterable[Scene],
    folder: Path,
    name: Callable[[int], str],
    progress: Progress | None,
    done: int,
    total: int,
) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        render(scene).save(folder / name(index), quality=92)
        done += 1
        if progress:
            progress(done, total)
    return done


def pretrain_rows(scenes: list[Scene], seed: int) -> list[dict[str, Any]]:
    """Rows like blip_laion_cc_sbu_558k.json: a brief instruction and a caption."""
    rng = random.Random(f"pretrain {seed}")
    rows = []
    for index, scene in enumerate(scenes):
        instruction = rng.choice(BRIEF_INSTRUCTIONS)
        human = rng.choice((f"<image>\n{instruction}", f"{instruction}\n<image>"))
        turns = [(human, language.caption(scene, rng))]
        rows.append(llava_row(f"{index + 1:012d}", f"train/{train_name(index)}", turns))
    return rows


def instruct_rows(scenes: list[Scene], seed: int) -> list[dict[str, Any]]:
    """Rows like llava_v1_5_mix665k.json, kinds of rows by `MIXTURE`."""
    rng = random.Random(f"instruct {seed}")
    rows: list[dict[str, Any]] = []
    order = [index % len(scenes) for index in range(round(len(scenes) * ROWS_PER_IMAGE))]
    for number, index in enumerate(order):
        kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
        if kind == "text":
            rows.append(llava_row(f"text_{number:06d}", None, language.text_dialogue(rng)))
            continue
        turns = conversation(scenes[index], kind, rng)
        rows.append(picture_row(f"{kind}_{number:06d}", index, turns))
    rng.shuffle(rows)
    return rows


def picture_row(name: str, index: int, turns: Turns) -> dict[str, Any]:
    """A conversation about a training picture, which stands before its first words."""
    (first, answer), *others = turns
    return llava_row(name, f"train/{train_name(index)}", [(f"<image>\n{first}", answer), *others])


def llava_row(name: str, image: str | None, turns: Turns) -> dict[str, Any]:
    """A conversation as LLaVA's files hold it."""
    row: dict[str, Any] = {"id": name} if image is None else {"id": name, "image": image}
    row["conversations"] = [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]
    return row


def conversation(scene: Scene, kind: str, rng: random.Random) -> Turns:
    """The turns of one instruction row of this kind, without the image's mark."""
    if kind == "detail":
        return [(rng.choice(DETAIL_INSTRUCTIONS), language.description(scene, rng))]
    if kind == "reasoning":
        return [language.reasoning(scene, rng)]
    if kind == "conversation":
        opening = [(rng.choice(OPENINGS), language.brief_caption(scene, rng).capitalize())]
        questions = [(q.text, q.long) for q in language.questions(scene, 4, rng)]
        return (opening if rng.random() < 0.4 else []) + questions
    if kind == "region":
        return _region_turns(scene, rng)
    if kind == "choice":
        return choice_turns(scene, rng)
    if kind == "ocr" and scene.sign:
        ocr = language.ask(scene, "ocr", rng)
        assert ocr is not None
        found = [ocr, *(q for q in language.questions(scene, 3, rng) if q.kind != "ocr")]
    else:
        found = language.questions(scene, 6, rng)
    return short_turns(found)


def different(asked: Iterable[language.Question | None]) -> list[language.Question]:
    """Those that the scene allowed, each text once."""
    return list({question.text: question for question in asked if question}.values())


def short_turns(questions: Sequence[language.Question]) -> Turns:
    """As in the reference's merged conversations, only the first turn carries the format prompt."""
    return [
        (q.text if number else f"{q.text}\n{SHORT}", q.short) for number, q in enumerate(questions)
    ]


def _region_turns(scene: Scene, rng: random.Random) -> Turns:
    turns: Turns = []
    for thing in rng.sample(scene.things, min(REGIONS, len(scene.things))):
        if rng.random() < NAMED_REGIONS:
            turns.append(name_turn(scene, thing))
        else:
            name = rng.choice((language.thing_phrase(thing), f"the {thing.shape}"))
            turns.append(box_turn(scene, thing, name))
    return turns


def name_turn(scene: Scene, thing: Thing) -> tuple[str, str]:
    """What is in this box?"""
    box = language.box_text(thing, scene.pixels)
    return REGION_NAME.format(box=box), f"{language.thing_phrase(thing)}."


def box_turn(scene: Scene, thing: Thing, name: str) -> tuple[str, str]:
    """Where is what has this name?"""
    return REGION_BOX.format(phrase=name), language.box_text(thing, scene.pixels)


def choice_turns(scene: Scene, rng: random.Random) -> Turns:
    """Questions with lettered options; short ones where the scene allows none."""
    turns: Turns = []
    asked: set[str] = set()
    for kind in rng.choices(tuple(CHOICE_SHARES), tuple(CHOICE_SHARES.values()), k=8):
        question = language.ask(scene, kind, rng)
        if question and question.text not in asked and len(turns) < 3:
            asked.add(question.text)
            turns.append(choice_turn(question, rng))
    return turns or conversation(scene, "vqa", rng)


def choice_turn(question: language.Question, rng: random.Random) -> tuple[str, str]:
    """The question with lettered options."""
    options, letter = language.choices(question, rng)
    lines = [f"{name}. {option}" for name, option in zip("ABCD", options, strict=False)]
    return "\n".join([question.text, *lines, LETTER]), letter


def write_coco(
    folder: Path, split: str, scenes: list[Scene], name: Callable[[int], str], seed: int
) -> None:
    """Write captions_{split}.json and instances_{split}.json as COCO lays them out."""
    rng = random.Random(f"coco {split} {seed}")
    categories = [
        {"id": number + 1, "name": shape, "supercategory": "shape"}
        for number, shape in enumerate((*SHAPES, "sign"))
    ]
    ids = {category["name"]: category["id"] for category in categories}
    pictures: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        picture = {
            "id": index + 1,
            "file_name": name(index),
            "width": scene.pixels,
            "height": scene.pixels,
        }
        pictures.append(picture)
        for text in (language.caption(scene, rng), language.brief_caption(scene, rng)):
            captions.append({"id": len(captions) + 1, "image_id": index + 1, "caption": text})
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            instances.append(
                {"id": len(instances) + 1, "image_id": index + 1, "iscrowd": 0,
                 "category_id": ids[thing.shape], "bbox": [x0, y0, x1 - x0, y1 - y0],
                 "area": (x1 - x0) * (y1 - y0), "segmentation": []}
            )  # fmt: skip
    info = {"description": "pumice world", "version": "1"}
    _write_json(
        folder / f"captions_{split}.json",
        {"info": info, "licenses": [], "images": pictures, "annotations": captions},
    )
    _write_json(
        folder / f"instances_{split}.json",
        {"info": info, "licenses": [], "images": pictures, "annotations": instances,
         "categories": categories},
    )  # fmt: skip
