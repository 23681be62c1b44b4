"""Official files and answers in which something is not as it should be: named, never scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval_files import dump, dump_lines, pope_files, science_files, vqa_files
from pumice.core.errors import DataError
from pumice.core.types import Request, Result
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.choose import choose_benchmark
from pumice.eval.locate import load_items
from pumice.eval.runner import rescore, run_benchmark
from pumice.eval.submit import write_submission
from shelf_files import (
    gqa_files,
    mmbench_files,
    mme_files,
    seed_files,
    textvqa_files,
    vizwiz_files,
)

VQA = "v2_mscoco_val2014_annotations.json"


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Changes what a JSON or JSONL file holds."""
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError:
        rows = [json.loads(line) for line in text.splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# --- official files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files", "file", "rows"),
    [
        ("vqav2", vqa_files, "v2_OpenEnded_mscoco_val2014_questions.json", "questions"),
        ("pope", pope_files, "pope/coco_pope_random.json", None),
        ("scienceqa", science_files, "scienceqa/pid_splits.json", "test"),
        ("textvqa", textvqa_files, "textvqa/TextVQA_0.5.1_val.json", "data"),
    ],
)
def test_an_id_of_two_questions_is_refused(
    name: str, files: Callable[[Path], Path], file: str, rows: str | None, tmp_path: Path
) -> None:
    """One answer would count twice, and the metric move with nothing said."""

    def again(content: Any) -> None:
        held = content if rows is None else content[rows]
        held.append(held[0])

    edit(files(tmp_path) / file, again)
    with pytest.raises(DataError, match=f"{name}: 1 ids in .* belong to more than one question"):
        load_items(BENCHMARKS[name], tmp_path)


def test_an_order_of_options_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = mmbench_files(tmp_path) / "mmbench" / "mmbench_dev_20230712.tsv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    table.write_text("".join([*lines, lines[-1]]), encoding="utf-8")
    with pytest.raises(DataError, match="the first: '12'"):
        load_items(BENCHMARKS["mmbench"], tmp_path)


def test_a_question_with_two_annotations_is_refused(tmp_path: Path) -> None:
    file = vqa_files(tmp_path) / VQA
    edit(file, lambda content: content["annotations"].append(content["annotations"][0]))
    with pytest.raises(DataError, match="13 annotations of 12 questions"):
        load_items(BENCHMARKS["vqav2"], tmp_path)


def place(*keys: str | int) -> Callable[[object], Callable[[Any], None]]:
    """Puts a value where these keys lead to."""

    def given(value: object) -> Callable[[Any], None]:
        def change(content: Any) -> None:
            for key in keys[:-1]:
                content = content[key]
            content[keys[-1]] = value

        return change

    return given


@pytest.mark.parametrize(
    ("name", "files", "file", "put", "value"),
    [
        ("vqav2", vqa_files, VQA, place("annotations", 0, "answers", 3, "answer"), 2),
        ("vqav2", vqa_files, "v2_OpenEnded_mscoco_val2014_questions.json",
         place("questions", 0, "question"), None),
        ("gqa", gqa_files, "gqa/data/testdev_balanced_questions.json", place("200", "answer"), 3),
        ("gqa", gqa_files, "gqa/data/testdev_balanced_questions.json",
         place("200", "types", "structural"), ["query"]),
        ("vizwiz", vizwiz_files, "vizwiz/val.json", place(0, "answers", 1, "answer"), {"a": 1}),
        ("textvqa", textvqa_files, "textvqa/TextVQA_0.5.1_val.json",
         place("data", 0, "answers", 1), False),
        ("scienceqa", science_files, "scienceqa/problems.json", place("3", "choices"), "abc"),
        ("scienceqa", science_files, "scienceqa/problems.json", place("3", "hint"), ["x"]),
        ("pope", pope_files, "pope/coco_pope_popular.json", place(0, "text"), 1.5),
        ("pope", pope_files, "pope/coco_pope_popular.json", place(0, "question_id"), True),
        ("seed_bench", seed_files, "seed_bench/SEED-Bench.json", place("questions", 1, "answer"),
         "AB"),
        ("seed_bench", seed_files, "seed_bench/SEED-Bench.json", place("questions", 1, "answer"),
         ""),
        ("seed_bench", seed_files, "seed_bench/SEED-Bench.json",
         place("questions", 1, "question_id"), None),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_named(
    name: str,
    files: Callable[[Path], Path],
    file: str,
    put: Callable[[object], Callable[[Any], None]],
    value: object,
    tmp_path: Path,
) -> None:
    """Python would make a text of a number, and no answer would ever be equal to a list."""
    load_items(BENCHMARKS[name], files(tmp_path))
    edit(tmp_path / file, put(value))
    with pytest.raises(DataError, match="Take the.* official file"):
        load_items(BENCHMARKS[name], tmp_path)


@pytest.mark.parametrize(("count", "lines"), [(0, 0), (1, 1), (3, 3)])
def test_an_image_of_mme_has_two_questions(count: int, lines: int, tmp_path: Path) -> None:
    """The published tool pairs lines two by two; acc+ of one question would be acc again."""
    mme = BENCHMARKS["mme"]
    release = mme_files(tmp_path) / "MME" / "MME_Benchmark_release_version"
    asked = (release / "existence" / "0001.txt").read_text(encoding="utf-8").splitlines()
    text = "\n".join([*asked, *asked][:lines])
    (release / "existence" / "0001.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"0001.txt, questions: MME asks 2 .*, found {count}"):
        load_items(mme, tmp_path)
    templates = tmp_path / "tool" / "Your_Results"
    templates.mkdir(parents=True)
    (templates / "existence.txt").write_text("1.jpg\tA dog? Please answer yes or no.\tYes\n")
    with pytest.raises(DataError, match="1.jpg, questions: MME asks 2 .*, found 1"):
        load_items(mme, templates.parent)


# --- the id that SEED-Bench's file gives to two questions ---------------------------------------


def twice_named(root: Path) -> Path:
    def rename(content: Any) -> None:
        content["questions"][3]["question_id"] = "101"

    edit(seed_files(root) / "seed_bench" / "SEED-Bench.json", rename)
    return root


def test_questions_of_one_id_are_asked_and_scored_each(tmp_path: Path) -> None:
    seed = choose_benchmark("seed_bench", ["part=image"])
    items = load_items(seed, twice_named(tmp_path))
    assert [item.id for item in items] == ["101", "102", "103", "101#2"]
    for item in items:
        assert item.image is not None
        item.image.parent.mkdir(parents=True, exist_ok=True)
        item.image.write_bytes(b"x")
    truths = {item.id: item.truth for item in items}

    def answer(requests: Sequence[Request], keep: object) -> list[Result]:
        return [Result(id=request.id, text=truths[request.id]) for request in requests]

    scores = run_benchmark(answer, seed, tmp_path, tmp_path / "out")
    assert scores.metrics is not None and scores.metrics["accuracy"] == 100
    own = rescore(seed, tmp_path, tmp_path / "out" / "predictions.jsonl")
    assert own.metrics == scores.metrics and own.notes == ()
    upload = tmp_path / "upload.jsonl"
    write_submission(seed, tmp_path, tmp_path / "out" / "predictions.jsonl", upload)
    sent = [json.loads(line) for line in upload.read_text().splitlines()]
    assert [row["question_id"] for row in sent] == ["101", "102", "103", "101"]
    assert rescore(seed, tmp_path, upload).metrics == scores.metrics


def test_one_answer_to_questions_of_one_id_counts_for_both(tmp_path: Path) -> None:
    seed = choose_benchmark("seed_bench", ["part=image"])
    items = load_items(seed, twice_named(tmp_path))
    rows = [
        {"question_id": int(item.id), "text": item.truth, "prompt": item.prompt}
        for item in items[:3]
    ]
    scores = rescore(seed, tmp_path, dump_lines(tmp_path / "a.jsonl", list(rows)))
    assert scores.metrics == {"accuracy": 75, "image_accuracy": 75} and scores.notes == ()


# --- answers ------------------------------------------------------------------------------------


def answered(root: Path, **more: object) -> list[dict[str, object]]:
    """Right answers to all of VQAv2's questions, the first row with `more`."""
    items = BENCHMARKS["vqav2"].load(vqa_files(root))
    rows: list[dict[str, object]] = [
        {"question_id": item.id, "text": item.extra["most_frequent"]} for item in items
    ]
    rows[0] |= more
    return rows


@pytest.mark.parametrize("error", ["", False, None])
def test_an_error_that_says_nothing_is_none(error: object, tmp_path: Path) -> None:
    rows = answered(tmp_path, error=error)
    scores = rescore(BENCHMARKS["vqav2"], tmp_path, dump_lines(tmp_path / "a.jsonl", rows))
    assert scores.errors == 0 and scores.metrics is not None
    assert scores.metrics["accuracy"] == 100 and scores.notes == ()


def test_an_error_without_words_is_no_score(tmp_path: Path) -> None:
    items = load_items(BENCHMARKS["vqav2"], vqa_files(tmp_path))
    truths = {item.id: item.extra["most_frequent"] for item in items}

    def answer(requests: Sequence[Request], keep: object) -> list[Result]:
        told = [Result(id=request.id, text=truths[request.id]) for request in requests]
        return [Result(id=told[0].id, text="", error=""), *told[1:]]

    scores = run_benchmark(answer, BENCHMARKS["vqav2"], tmp_path, tmp_path / "out")
    assert scores.metrics is None and scores.errors == 1


@pytest.mark.parametrize("key", ["prompt", "prompt_hash"])
def test_what_was_asked_must_be_a_text(key: str, tmp_path: Path) -> None:
    rows = answered(tmp_path, **{key: ["Is it?"]})
    with pytest.raises(DataError, match=rf"row 1: {key} is \['Is it\?'\]"):
        rescore(BENCHMARKS["vqav2"], tmp_path, dump_lines(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("name", [True, [1], {"a": 1}, 1.5])
def test_ids_are_texts_or_whole_numbers(name: object, tmp_path: Path) -> None:
    rows = answered(tmp_path)
    for row in rows:
        row["question_id"] = float(str(row["question_id"]))
    path = dump_lines(tmp_path / "a.jsonl", rows)
    assert rescore(BENCHMARKS["vqav2"], tmp_path, path).metrics is not None
    rows[0]["question_id"] = name
    with pytest.raises(DataError, match="row 1: an answer needs an id"):
        rescore(BENCHMARKS["vqav2"], tmp_path, dump_lines(path, rows))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"qid": 1, "out": "B"}, "row 1: an answer needs an id"),
        ([1, "B"], "line 1: a row must be a JSON object .* given list"),
    ],
)
def test_rows_without_an_id_are_not_called_broken_json(
    row: object, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2)
    with pytest.raises(DataError, match=told):
        rescore(BENCHMARKS["vqav2"], vqa_files(tmp_path), path)


@pytest.mark.parametrize(
    "content", [{"correct": [1], "incorrect": []}, {"outputs": 3}, {"outputs": [1]}]
)
def test_results_of_another_form_are_named(content: object, tmp_path: Path) -> None:
    path = dump(tmp_path / "result.json", content)
    with pytest.raises(DataError, match="result.json: a file is not in the official format"):
        rescore(BENCHMARKS["scienceqa"], science_files(tmp_path), path)


@pytest.mark.parametrize("code", ["gbk", "utf-16"])
def test_a_table_in_another_encoding_is_named(code: str, tmp_path: Path) -> None:
    """As a spreadsheet saves it where Chinese is written."""
    path = tmp_path / "answers.csv"
    path.write_bytes("index,question,prediction\n7,哪一个？,A\n".encode(code))
    with pytest.raises(DataError, match="answers.csv, after line 0: this is no table of UTF-8"):
        rescore(BENCHMARKS["mmbench"], mmbench_files(tmp_path), path)


def test_pope_takes_ids_and_categories_for_what_they_are(tmp_path: Path) -> None:
    items = load_items(BENCHMARKS["pope"], pope_files(tmp_path))
    rows: list[dict[str, object]] = [
        {"question_id": item.id, "text": item.truth, "category": ["x"]} for item in items
    ]
    path = dump_lines(tmp_path / "a.jsonl", rows)
    assert rescore(BENCHMARKS["pope"], tmp_path, path).metrics is not None
    # A digit for Python, and no number.
    path = dump_lines(path, [*rows, {"question_id": "²", "text": "yes"}])
    scores = rescore(BENCHMARKS["pope"], tmp_path, path)
    assert scores.metrics is None and "1 answers have no label" in scores.notes[0]


def test_unanswered_questions_of_scienceqa_leave_the_image_part(tmp_path: Path) -> None:
    """As officially; so the note must not say that they are wrong in the headline."""
    data = science_files(tmp_path)
    path = dump_lines(tmp_path / "a.jsonl", [{"question_id": "3", "text": "B"}])
    scores = rescore(BENCHMARKS["scienceqa"], data, path)
    assert scores.metrics == {"img_accuracy": 100, "accuracy": 33.3333}
    assert "wrong in accuracy, and not at all in img_accuracy" in scores.notes[0]
