"""The world: pictures match their scene graph, files are in the public formats, splits disjoint."""

import dataclasses
import json
import random
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pumice.cli.world import ensure_world
from pumice.core.errors import PumiceError
from pumice.data.sources import LlavaJson
from pumice.recipe.schema import World
from pumice.world import language
from pumice.world.benchmarks import VQA_PER_IMAGE, _balanced_questions
from pumice.world.datasets import MIXTURE, make_world
from pumice.world.mixture_sources import write_sources
from pumice.world.scenes import COLORS, SHAPES, SIZE, Scene, random_scene, render, widened
from pumice.world.vision_backbone import patch_owner

IMAGES, EVAL_IMAGES = 40, 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, images=IMAGES, eval_images=EVAL_IMAGES)
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_equal_arguments_write_equal_bytes_and_another_seed_another_world(
    world: Path, tmp_path: Path
) -> None:
    make_world(tmp_path / "again", images=IMAGES, eval_images=EVAL_IMAGES)
    assert files(tmp_path / "again") == files(world)
    make_world(tmp_path / "other", images=IMAGES, eval_images=EVAL_IMAGES, seed=1)
    other = files(tmp_path / "other")
    assert all(other[name] != data for name, data in files(world).items() if "train/" in name)


@pytest.mark.parametrize("seed", range(60))
def test_every_thing_is_drawn_where_its_box_says(seed: int) -> None:
    scene = random_scene(seed)
    picture = np.asarray(render(scene)).astype(int)
    for thing in scene.things:
        without = Scene(scene.background, tuple(t for t in scene.things if t is not thing), seed)
        changed = np.abs(picture - np.asarray(render(without)).astype(int)).sum(2) > 0
        rows, columns = np.where(changed)
        drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # One pixel of shadow to the left and below.
        assert np.abs(np.subtract(drawn, thing.box)).max() <= 1, (thing, drawn)
        cell = SIZE // 3
        assert thing.column == (thing.box[0] + thing.box[2]) // 2 // cell
        assert thing.row == (thing.box[1] + thing.box[3]) // 2 // cell


@pytest.mark.parametrize("seed", range(40))
def test_plain_shapes_have_their_colour(seed: int) -> None:
    scene = random_scene(seed)
    picture = np.asarray(render(scene))
    for thing in scene.shapes:
        x0, y0, x1, y1 = thing.box
        inside = picture[y0:y1, x0:x1].reshape(-1, 3)
        share = (inside == COLORS[thing.color]).all(1).mean()
        assert share > 0.15, thing


def test_shapes_are_distinct_in_a_scene_and_every_thing_owns_a_patch() -> None:
    for seed in range(300):
        scene = random_scene(seed)
        names = [thing.shape for thing in scene.shapes]
        assert len(set(names)) == len(names) >= 1
        owned = set(patch_owner(scene).flatten().tolist()) - {-1}
        assert owned == set(range(len(scene.things)))


def test_yes_no_questions_are_balanced_and_answers_follow_the_scene() -> None:
    rng = random.Random(0)
    answers: dict[str, Counter[str]] = {}
    for seed in range(1500):
        scene = random_scene(seed)
        for question in language.questions(scene, 5, rng):
            answers.setdefault(question.kind, Counter())[question.short] += 1
            assert question.short in question.options
            assert question.short in question.long.lower()
    for kind in ("exist", "exist_pair", "relation", "compare"):
        share = answers[kind]["yes"] / answers[kind].total()
        assert 0.42 < share < 0.58, (kind, share)
    assert set(answers) == set(language.KINDS)


def test_the_right_choice_is_under_its_letter() -> None:
    rng = random.Random(1)
    letters = Counter()
    for seed in range(200):
        for question in language.questions(random_scene(seed), 5, rng):
            if question.kind in language.CHOICE_KINDS:
                options, letter = language.choices(question, rng)
                assert options["ABCDEF".index(letter)] == question.short
                assert len(set(options)) == len(options)
                letters[letter] += 1
    assert max(letters.values()) / letters.total() < 0.35


def test_the_training_files_are_read_by_the_library(world: Path) -> None:
    for name in ("pretrain.json", "instruct.json"):
        source = LlavaJson(world / "llava" / name, world / "images")
        kinds = Counter()
        for index in range(len(source)):
            sample = source[index]
            kinds[sample.id.split("_")[0]] += 1
            assert all(image.image.is_file() for image in sample.images)
        assert len(source) > 0
    assert set(kinds) <= {*MIXTURE}


def test_only_the_first_turn_of_merged_questions_carries_the_format_prompt(world: Path) -> None:
    rows = json.loads((world / "llava" / "instruct.json").read_text())
    merged = [row for row in rows if row["id"].startswith("vqa_")]
    assert merged
    for row in merged:
        human = [turn["value"] for turn in row["conversations"][::2]]
        assert ["single word or phrase" in text for text in human] == [True] + [False] * (
            len(human) - 1
        )


def test_pope_is_built_as_pope_builds_it(world: Path) -> None:
    instances = json.loads((world / "coco/annotations/instances_val2014.json").read_text())
    names = {category["id"]: category["name"] for category in instances["categories"]}
    pictures = {picture["id"]: picture["file_name"] for picture in instances["images"]}
    present: dict[str, set[str]] = {name: set() for name in pictures.values()}
    for item in instances["annotations"]:
        present[pictures[item["image_id"]]].add(names[item["category_id"]])
    shapes = {image: found - {"sign"} for image, found in present.items()}
    frequency = Counter(name for found in shapes.values() for name in found)
    together = Counter(pair for found in shapes.values() for pair in permutations(found, 2))
    for strategy in ("random", "popular", "adversarial"):
        rows = read(world / "pope" / f"coco_pope_{strategy}.json")
        assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
        assert Counter(row["label"] for row in rows)["yes"] * 2 == len(rows)
        for row in rows:
            asked = row["text"].removesuffix(" in the image?").split()[-1]
            assert (asked in present[row["image"]]) == (row["label"] == "yes")
            if row["label"] == "no" and strategy != "random":
                found = shapes[row["image"]]
                absent = [name for name in SHAPES if name not in found]
                rank = (
                    (lambda name: frequency[name]) if strategy == "popular"
                    else (lambda name, found=found: sum(together[o, name] for o in found))
                )  # fmt: skip
                assert rank(asked) >= sorted(map(rank, absent))[-3]


def test_vqa_files_pair_up_and_held_out_pictures_are_not_in_training(world: Path) -> None:
    folder = world / "vqav2"
    questions = json.loads((folder / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    annotations = json.loads((folder / "v2_mscoco_val2014_annotations.json").read_text())
    asked = {row["question_id"]: row for row in questions["questions"]}
    assert len(asked) == len(annotations["annotations"]) == EVAL_IMAGES * 6
    for row in annotations["annotations"]:
        assert asked[row["question_id"]]["image_id"] == row["image_id"]
        assert len(row["answers"]) == 10
    train = {path.read_bytes() for path in (world / "images" / "train").iterdir()}
    held_out = {path.read_bytes() for path in (world / "val2014").iterdir()}
    assert len(train) == IMAGES and len(held_out) == EVAL_IMAGES and not train & held_out


def test_vqa_answers_are_balanced_within_each_kind() -> None:
    scenes = [random_scene(7_000_000 + index) for index in range(120)]
    rng = random.Random(0)

    def most_frequent(balanced: bool) -> dict[str, float]:
        told: dict[str, Counter[str]] = {kind: Counter() for kind in language.KINDS}
        for scene in scenes:
            if balanced:
                asked = _balanced_questions(scene, told, rng)
                assert len({question.text for question in asked}) == len(asked) == VQA_PER_IMAGE
                continue
            for question in language.questions(scene, VQA_PER_IMAGE, rng):
                told[question.kind][question.short] += 1
        return {kind: max(counts.values()) / counts.total() for kind, counts in told.items()}

    balanced, plain = most_frequent(True), most_frequent(False)
    for kind in ("exist", "exist_pair", "relation", "compare"):
        assert balanced[kind] <= 0.54
    assert balanced["count_by"] <= 0.3 < plain["count_by"]
    assert sum(balanced.values()) < sum(plain.values())


def test_a_wide_scene_is_the_same_with_things_half_as_large() -> None:
    for index in range(40):
        scene = random_scene(8_000_000 + index)
        wide = widened(scene)
        assert render(wide).size == (2 * SIZE, 2 * SIZE)
        for thing, was in zip(wide.things, scene.things, strict=True):
            (x0, y0, x1, y1), (a0, b0, a1, b1) = thing.box, was.box
            assert (x1 - x0, y1 - y0) == (a1 - a0, b1 - b0)
            assert dataclasses.replace(thing, box=was.box) == was
            # In its place, and on one side of the middle, where tiles meet.
            assert (int((y0 + y1) / 2 // 128), int((x0 + x1) / 2 // 128)) == (was.row, was.column)
            assert not x0 < SIZE < x1 and not y0 < SIZE < y1


def test_a_wide_world_says_so_in_its_files(tmp_path: Path) -> None:
    make_world(tmp_path, images=12, eval_images=8, wide=True)
    with Image.open(next((tmp_path / "val2014").iterdir())) as picture:
        assert picture.size == (2 * SIZE, 2 * SIZE)
    assert json.loads((tmp_path / "world.json").read_text())["wide"] is True
    annotations = tmp_path / "coco" / "annotations" / "instances_val2014.json"
    pictures = json.loads(annotations.read_text())["images"]
    assert {(p["width"], p["height"]) for p in pictures} == {(2 * SIZE, 2 * SIZE)}
    rows = json.loads((tmp_path / "llava" / "instruct.json").read_text())
    boxes = re.findall(r"\[([\d., ]+)\]", json.dumps([r["conversations"] for r in rows]))
    numbers = [float(number) for box in boxes for number in box.split(",")]
    assert numbers and max(numbers) <= 1
    with pytest.raises(PumiceError, match="another synthetic world"):
        ensure_world(tmp_path, World(images=12, eval_images=8, seed=0))


def test_sources_are_the_same_questions_in_three_prompts(tmp_path: Path) -> None:
    ensure_world(tmp_path / "plain", World(images=30, eval_images=2, seed=0))
    ensure_world(tmp_path / "more", World(images=30, eval_images=2, seed=0, sources=True))
    plain, more = files(tmp_path / "plain"), files(tmp_path / "more")
    # What other recipes read is what it was.
    assert {name for name in plain if plain[name] != more[name]} == {"world.json"}
    assert set(more) - set(plain) == {
        f"sources/{name}.json"
        for name in ("llava-instruct", "vqav2", "ocrvqa", "aokvqa", "refcoco", "vg", "gqa",
                     "sharegpt", *(f"{name}-{prompt}" for name in ("vqav2", "gqa", "ocrvqa")
                                   for prompt in ("every", "bare", "qa")))
    }  # fmt: skip
    kept = tmp_path / "more" / "sources"
    for path in kept.iterdir():
        source = LlavaJson(path, tmp_path / "more" / "images")
        samples = [source[index] for index in range(len(source))]
        assert len(samples) == (len(source) if path.stem.startswith("ocrvqa") else 30) > 0
        assert {len(sample.images) for sample in samples} == {int(path.stem != "sharegpt")}
    words = "\nAnswer the question using a single word or phrase."
    files_of = [kept / f"gqa{prompt}.json" for prompt in ("-bare", "", "-every", "-qa")]
    for bare, short, every, letters in zip(*map(turns_of, files_of), strict=True):
        assert every == [(f"{text}{words}", answer) for text, answer in bare]
        assert short == [every[0], *bare[1:]]
        assert letters == [
            (re.sub(r"^(<image>\n)?(.*)$", r"\1Q: \2 A:", text), answer) for text, answer in bare
        ]
    with pytest.raises(PumiceError, match="another synthetic world"):
        ensure_world(tmp_path / "plain", World(images=30, eval_images=2, seed=0, sources=True))


def turns_of(path: Path) -> list[list[tuple[str, str]]]:
    rows = [row["conversations"] for row in json.loads(path.read_text())]
    return [
        [(a["value"], b["value"]) for a, b in zip(row[::2], row[1::2], strict=True)] for row in rows
    ]


def test_sources_ask_about_their_own_picture(tmp_path: Path) -> None:
    write_sources(tmp_path, [random_scene(index) for index in range(20)], seed=0)
    for index, turns in enumerate(turns_of(tmp_path / "refcoco.json")):
        boxes = {language.box_text(thing) for thing in random_scene(index).things}
        assert {answer for _, answer in turns} <= boxes
    for index, turns in enumerate(turns_of(tmp_path / "vg.json")):
        named = {
            f"{language.thing_phrase(thing)}.": language.box_text(thing)
            for thing in random_scene(index).things
        }
        assert all(named[answer] in text for text, answer in turns)


def test_a_lower_resolution_takes_detail_and_nothing_else(tmp_path: Path) -> None:
    make_world(tmp_path, images=4, eval_images=4, resolution=48)
    instances = json.loads((tmp_path / "coco/annotations/instances_train2014.json").read_text())
    for index, path in enumerate(sorted((tmp_path / "images" / "train").iterdir())):
        scene = random_scene(index)
        with Image.open(path) as picture:
            soft = np.asarray(picture.convert("L"), float)
        sharp = np.asarray(render(scene).convert("L"), float)
        assert sharp.shape == soft.shape and abs(sharp.mean() - soft.mean()) < 2
        assert np.abs(np.diff(soft)).max() < 0.8 * np.abs(np.diff(sharp)).max()
        boxes = [row["bbox"] for row in instances["annotations"] if row["image_id"] == index + 1]
        assert [box[:2] for box in boxes] == [list(thing.box[:2]) for thing in scene.things]
    assert json.loads((tmp_path / "world.json").read_text())["resolution"] == 48


def test_a_world_of_impossible_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PumiceError, match="images=0 cannot be made.*1 to 40000"):
        make_world(tmp_path, images=0)
