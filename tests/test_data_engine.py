"""The data engine: prompts, filters, provenance; and that a killed run loses and repays nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import read_jsonl
from pumice.core.llm_client import Endpoint, LLMClient
from pumice.data.engine import Order, generate
from pumice.data.engine_filters import fault_of, is_english, leaks
from pumice.data.engine_prompts import KINDS, asked_text, custom_kind, read_pairs
from pumice.data.engine_scenes import read_described
from pumice.data.row_layouts import read_sample
from pumice.world.teacher import LASTING, Teacher, teaching

Run = Callable[..., tuple[int, str, str]]
NAMES = ("cat", "dog", "horse", "boat", "chair", "kite", "bus", "clock")


def scene_rows(n: int) -> list[dict[str, Any]]:
    rows = []
    for k in range(n):
        first, second = NAMES[k % 8], NAMES[(k // 8 + k + 1) % 8]
        captions = [
            f"A {first} stands near a {second} at the gate number {k}.",
            f"There is a {first} in front of house {k} and it is sunny.",
        ]
        box = {"category": first, "box": [0.1, 0.2, 0.4, 0.9]}
        rows.append({"image": f"{k}.jpg", "captions": captions, "boxes": [box]})
    return rows


def write_rows(path: Path, n: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in scene_rows(n)))
    return path


def command(kind: str, scenes: Path, url: str, out: Path, *more: object) -> list[str]:
    words = ["data", "generate", kind, "--captions", scenes, "--boxes", scenes]
    return [str(word) for word in [*words, "--endpoint", url, "--out", out, *more]]


# --- what is read and asked -----------------------------------------------------------------------


def test_coco_files_and_rows_say_the_same(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}]
    notes = [{"id": 1, "image_id": 7, "caption": " A cat\nsits. "}]
    boxes = [
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [20, 10, 100, 40], "iscrowd": 0},
        {"id": 4, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    ]
    names = [{"id": 2, "name": "cat"}]
    coco, instances = tmp_path / "captions.json", tmp_path / "instances.json"
    coco.write_text(json.dumps({"images": images, "annotations": notes}))
    instances.write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    rows = tmp_path / "rows.jsonl"
    box = {"category": "cat", "box": [0.1, 0.1, 0.6, 0.5]}
    rows.write_text(json.dumps({"image": "7.jpg", "captions": ["A cat sits."], "boxes": [box]}))
    (a,), (b,) = read_described(coco, instances), read_described(rows, rows)
    assert asked_text(a, boxes=True) == asked_text(b, boxes=True)
    assert asked_text(a, boxes=True) == "A cat sits.\n\ncat: [0.100, 0.100, 0.600, 0.500]"
    assert a.sources == ("captions:1", "instances:3")
    rows.write_text(
        json.dumps({"image": "7.jpg", "captions": ["A."], "boxes": [box | {"box": [3, 0, 4, 1]}]})
    )  # noqa: E501
    with pytest.raises(DataError, match="line 1: the box"):
        read_described(rows, rows)
    with pytest.raises(DataError, match="no COCO file"):
        read_described(instances.with_name("captions.json"), _broken(tmp_path))


def _broken(folder: Path) -> Path:
    (folder / "x.json").write_text('{"images": [{"id": 1}]}')
    return folder / "x.json"


def test_only_the_asked_form_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 1)
    (scene,) = read_described(tmp_path / "rows.jsonl")
    kind = KINDS["conversation"]
    form = "Question:\nWho?\n===\nAnswer:\nA man.\n===\nQuestion:\nWhy?\n===\nAnswer:\nTo rest."
    assert read_pairs(kind, scene, form) == [("Who?", "A man."), ("Why?", "To rest.")]
    for wrong in (
        "Sure!",
        form.replace("Answer:", "A:"),
        form[: form.rfind("===")],
        "",
        "===\n===",
    ):
        assert read_pairs(kind, scene, wrong) is None
    assert read_pairs(KINDS["detail"], scene, form) is None
    assert read_pairs(KINDS["detail"], scene, " A cat. ") == [(ANY, "A cat.")]
    (tmp_path / "p.txt").write_text("Write a poem.")
    with pytest.raises(DataError, match="does not ask for the form"):
        custom_kind(tmp_path / "p.txt")


# --- filters --------------------------------------------------------------------------------------

GOOD = ("Where is the cat?", "It sits on the wall next to the gate.")


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        ([GOOD, ("Who is it?", "I'm sorry, but I can't tell.")], "refusal"),
        ([GOOD, ("Who is it?", "As the captions say, a man.")], "mention"),
        ([GOOD, ("Where?", "The bounding box is on the left.")], "mention"),
        ([GOOD, ("Where?", "At [0.2, 0.3, 0.4, 0.5].")], "mention"),
        ([GOOD], "count"),
        ([GOOD, ("Tell me all.", "word " * 201)], "length"),
        ([GOOD, ("where is the cat ?", "On a wall.")], "duplicate_question"),
        ([GOOD, ("What does the red bus do?", "A red bus.")], "leak"),
        (
            [GOOD, ("¿Qué hace?", "El hombre come una manzana mientras mira el mar azul.")],
            "language",
        ),  # noqa: E501
        ([GOOD, ("What?", "猫坐在墙上，旁边有一扇门，门前站着一个人。")], "language"),
        ([GOOD, ("What?", "Two city buses traveling down a rain covered road way.")], None),
        ([GOOD, ("Is it a dog or a cat?", "A cat.")], None),
        ([GOOD, ("Is the sign's caption in red?", "Yes, the sign is red.")], None),
    ],
)
def test_each_filter(pairs: list[tuple[str, str]], fault: str | None) -> None:
    found = fault_of(KINDS["conversation"], pairs, "en")
    assert (found and found.partition(":")[0]) == fault


def test_leaks_and_languages_at_their_edges() -> None:
    assert leaks("Why is the tall man eating a green apple?", "The tall man is eating an apple.")
    assert not leaks("Is the man eating?", "Yes, the man is eating.")
    assert is_english("Yes.") and is_english("") and not is_english("Это кошка")


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conversation", "detail", "reasoning"])
def test_rows_are_read_as_training_data(kind: str, run: Run, tmp_path: Path) -> None:
    scenes, out = write_rows(tmp_path / "s.jsonl", 20), tmp_path / "o.jsonl"
    # The scripted teacher repeats itself where it reasons.
    more = ("--price-in", 1, "--price-out", 2, "--near", 1, "--json")
    with teaching(Teacher()) as url:
        code, said, err = run(*command(kind, scenes, url, out, *more))
        assert (code, json.loads(said)["kept"]) == (0, 20), said
        assert "20 images, 0 with a reply kept; the rest costs about" in err
    for number, row in read_jsonl(out):
        sample = read_sample(row, number=number, place="o", find_image=lambda name, _: Path(name))
        assert [m.role for m in sample.messages][:2] == ["user", "assistant"]
        assert len(sample.images) == 1
        texts = [turn["value"] for turn in row["conversations"]]
        assert not any("===" in text or "Question:" in text for text in texts)
        assert (len(texts) > 2) == (kind == "conversation")
        given = row["provenance"]
        assert len(set(given["sources"])) == len(given["sources"])
        assert given["kind"] == kind and given["cost"] > 0 and given["sources"]
        assert given["model"] == "pumice-teacher" and len(given["prompt_hash"]) == 16


@pytest.mark.parametrize("fault", LASTING)
@pytest.mark.parametrize("kind", ["conversation", "reasoning"])
def test_a_flawed_reply_is_set_aside_with_its_reason(
    kind: str, fault: str, run: Run, tmp_path: Path
) -> None:
    scenes, out = write_rows(tmp_path / "s.jsonl", 8), tmp_path / "o.jsonl"
    with teaching(Teacher(faults={fault: 1.0})) as url:
        code, said, _ = run(*command(kind, scenes, url, out, "--json"))
    found = json.loads(said)
    assert code == 0 and found["kept"] == 0 and found["rejected"] == {fault: 8}
    rows = [row for _, row in read_jsonl(tmp_path / "o.jsonl.rejected.jsonl")]
    assert [row["image"] for row in rows] == [f"{k}.jpg" for k in range(8)]
    assert all(row["reason"].startswith(fault) and row["text"] for row in rows)


def test_a_cap_stops_and_a_later_run_goes_on(run: Run, tmp_path: Path) -> None:
    scenes, out = write_rows(tmp_path / "s.jsonl", 20), tmp_path / "o.jsonl"
    money = ("--price-in", 1, "--price-out", 1, "--json")
    teacher = Teacher()
    with teaching(teacher) as url:
        line = command("detail", scenes, url, out, *money)
        assert run(*line, "--estimate")[:2] == (0, "") and teacher.calls == 0
        code, said, err = run(*line, "--cost-cap", 0.004)
        found = json.loads(said)
        assert code == 1 and found["failed"]["cost_cap"] == 20 - found["kept"] > 0
        assert found["kept"] > 0 and found["cost"] <= 0.004 and "first failure" in err
        assert json.loads(run(*line)[1])["kept"] == 20
        assert teacher.stats()["paid"] == 20


def test_a_wrong_address_ends_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    scenes = read_described(write_rows(tmp_path / "scenes.jsonl", 60), None)
    out = tmp_path / "out" / "rows.jsonl"
    order, nobody = Order(kind=KINDS["detail"], model="m"), "http://127.0.0.1:9/v1"
    with LLMClient(Endpoint(url=nobody, attempts=1)) as client:
        with pytest.raises(PumiceError, match=r"first 16 images .* cannot be reached .* goes on"):
            generate(client, order, scenes, out, tmp_path / "bad")
    assert not list(out.parent.iterdir())
    # Fewer images than that are counted.
    with LLMClient(Endpoint(url=nobody, attempts=1)) as client:
        outcome = generate(client, order, scenes[:3], out, tmp_path / "bad")
    assert outcome.failed == {"connection": 3} and out.read_text() == ""


def test_the_engine_starts_without_torch() -> None:
    code = "import sys, pumice.data.engine; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
