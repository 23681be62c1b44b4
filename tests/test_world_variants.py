"""Training files that say less, or teach single skills: what they leave out is not in them."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from pumice.cli.world import ensure_world
from pumice.processing.response_formats import SHORT, with_format
from pumice.recipe.schema import World
from pumice.world import german, language
from pumice.world.less_detail import large_instruct_rows, large_part, large_pretrain_rows
from pumice.world.scenes import SHAPES, Scene, random_scene
from pumice.world.skills import write_skills

SCENES = [random_scene(index) for index in range(300)]
SIGN = re.compile(r"\bsigns?\b")


def turns(row: dict) -> list[tuple[str, str]]:
    said = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def scene_of(row: dict) -> Scene:
    return SCENES[int(Path(row["image"]).stem) - 1]


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("skills")
    write_skills(folder, SCENES, 0)
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


def test_the_files_are_made_when_asked_for_and_change_no_other(tmp_path: Path) -> None:
    def made(name: str, **more: bool) -> dict[str, bytes]:
        ensure_world(tmp_path / name, World(images=9, eval_images=2, seed=0, **more))
        found = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in found}

    plain, more = made("plain"), made("more", variants=True)
    assert {name for name in plain if plain[name] != more[name]} == {"world.json"}
    assert set(more) - set(plain) == {
        "llava/pretrain_large.json", "llava/instruct_large.json",
        *(f"skills/{name}.json" for name in
          ("pictures", "yes_no", "dialogues", "german", "unanswerable")),
    }  # fmt: skip


def test_less_detail_names_large_shapes_alone() -> None:
    instruct = large_instruct_rows(SCENES, 0)
    assert len(instruct) == 450 and len(large_pretrain_rows(SCENES, 0)) == sum(
        large_part(scene) is not None for scene in SCENES
    )
    for row in [*large_pretrain_rows(SCENES, 0), *instruct]:
        if "image" not in row:
            continue
        scene = scene_of(row)
        small = {thing.shape for thing in scene.shapes if thing.size == "small"}
        for question, answer in turns(row):
            text = f"{question} {answer}".lower()
            assert not SIGN.search(text) and "how many" not in text and "small" not in text
            # An option may be wrong; nothing else speaks of a shape that is small.
            told = answer if "\nA. " in question else text
            assert not small & set(re.findall(r"[a-z]+", told)), (question, answer)


def test_less_detail_is_true_of_the_whole_picture() -> None:
    kinds: Counter[str] = Counter()
    for row in large_instruct_rows(SCENES, 0):
        if "image" not in row:
            continue
        scene = scene_of(row)
        attributes = [{t.color, t.texture, t.size} for t in scene.shapes]
        shapes = {thing.shape for thing in scene.shapes}
        for question, answer in turns(row):
            words = set(re.findall(r"[a-z]+", question.split("\n")[0].lower()))
            if question.startswith("Which") and "shape" in words | {"shapes"} and "in" not in words:
                value = words & set().union(*attributes)
                if len(value) == 1:
                    kinds["which"] += 1
                    assert sum(value <= own for own in attributes) == 1
            if answer.lower().startswith("no") and question.startswith(("Is there", "Can you see")):
                kinds["no"] += 1
                asked = words & set(SHAPES)
                (name,) = asked
                there = {(t.color, t.shape) for t in scene.shapes}
                assert name not in shapes or not any((w, name) in there for w in words)
    assert kinds["which"] > 20 and kinds["no"] > 20


def test_each_skill_is_in_its_file_alone(skills: dict[str, list[dict]]) -> None:
    pictured = {name: [row for row in rows if "image" in row] for name, rows in skills.items()}
    assert {name: len(rows) for name, rows in pictured.items() if rows} == {
        "pictures": 300, "yes_no": 300,
    }  # fmt: skip
    assert len(skills["german"]) == len(skills["unanswerable"]) == 300
    answers = {name: Counter(a for row in rows for _, a in turns(row))
               for name, rows in skills.items()}  # fmt: skip
    # Yes and no: in sentences with pictures, and shortly in the file of their own.
    assert not {"yes", "no"} & set(answers["pictures"])
    assert any(answer.startswith("Yes, ") for answer in answers["pictures"])
    assert set(answers["yes_no"]) == {"yes", "no"}
    everything = {name: json.dumps(rows, ensure_ascii=False) for name, rows in skills.items()}
    for word, home in (("nanswerable", "unanswerable"), ("Farbe", "german")):
        assert [name for name, text in everything.items() if word in text] == [home]


def test_rows_with_pictures_are_about_their_picture(skills: dict[str, list[dict]]) -> None:
    checked = 0
    for row in [*skills["pictures"], *skills["yes_no"]]:
        scene = scene_of(row)
        for question, answer in turns(row):
            found = re.match(r"(?:Is there|Can you see) an? (\w+)(?: in the image)?\?", question)
            if found and found[1] in SHAPES:
                checked += 1
                there = found[1] in {thing.shape for thing in scene.shapes}
                assert answer.lower().startswith("yes" if there else "no")
    assert checked > 50


def test_unanswerable_questions_are_those_of_absent_shapes(skills: dict[str, list[dict]]) -> None:
    told: Counter[bool] = Counter()
    for row in skills["unanswerable"]:
        pairs = turns(row)
        text, ending = pairs[0][0].split("\n", 1)
        assert with_format("", "unanswerable") == f"\n{ending}" and ending.endswith(SHORT)
        story, first = re.fullmatch(r"(.*\.) ([^.]*\?)", text).groups()  # type: ignore[union-attr]
        present = set(re.findall(r"[a-z]+", story)) & set(SHAPES)
        for question, answer in [(first, pairs[0][1]), *pairs[1:]]:
            asked = set(re.findall(r"[a-z]+", question)) & set(SHAPES)
            told[answer == "unanswerable"] += 1
            if answer == "unanswerable":
                assert asked and not asked & present
    assert 0.8 < told[True] / told[False] < 1.3


def test_german_says_what_the_english_question_asks() -> None:
    seen: Counter[str] = Counter()
    for scene in SCENES:
        for asked in german.german_questions(scene, 4, random.Random(scene.seed)):
            english = asked.english
            seen[english.kind] += 1
            shape = next((w for w in re.findall(r"[a-z]+", english.text) if w in SHAPES), None)
            assert shape is None or german._SHAPES[shape][0].split()[1] in asked.text
            assert english.short in ("yes", "no") or german._VALUES[english.short] in asked.long
            assert ("kein" in asked.long) == (english.short == "no")
    assert set(seen) == set(german.KINDS)
    assert german.german(
        language.exist_question("diamond", False, random.Random(0))
    ).long == "Nein, es gibt keine Raute."  # fmt: skip
