"""`pumice submit`: every question, the server's columns, and nothing missing unsaid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from eval_files import dump, dump_lines
from pumice.core.errors import DataError, PumiceError
from pumice.eval.answer_files import read_answers
from pumice.eval.choose import choose_benchmark
from pumice.eval.submit import write_submission
from pumice.eval.tables import read_sheet
from shelf_files import gqa_files, mmbench_files, mmbench_rows, seed_files, vizwiz_files


def vqa_test_files(root: Path) -> Path:
    rows = [
        {
            "question_id": 262144000 + n,
            "image": "COCO_test2015_000000262144.jpg",
            "text": f"Is it {n}?\nAnswer the question using a single word or phrase.",
            "category": "default",
        }
        for n in range(3)
    ]
    dump_lines(root / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", rows)
    return root


def test_vqav2_takes_every_test_id_and_missing_ones_only_when_told(tmp_path: Path) -> None:
    vqav2 = choose_benchmark("vqav2", server=True)
    assert vqav2.chosen["split"] == "test2015"
    rows = [
        {"question_id": 262144002, "text": "Old"},
        {"question_id": 262144002, "text": "The men's, Two."},
        {"question_id": 262144000, "text": "", "error": "out of memory"},
        {"question_id": 5, "text": "stray"},
    ]
    answers = dump_lines(vqa_test_files(tmp_path) / "answers.jsonl", rows)
    out = tmp_path / "upload.json"
    with pytest.raises(DataError, match="2 of 3 questions.*262144000, 262144001.*1 answers carry"):
        write_submission(vqav2, tmp_path, answers, out)
    assert not out.exists()
    done = write_submission(vqav2, tmp_path, answers, out, empty_missing=True)
    assert (done.rows, done.empty, len(done.notes)) == (3, 2, 2)
    assert json.loads(out.read_text()) == [
        {"question_id": 262144000, "answer": ""},
        {"question_id": 262144001, "answer": ""},
        {"question_id": 262144002, "answer": "men 's 2"},
    ]


def test_answers_of_which_nothing_is_left_are_counted_as_empty(tmp_path: Path) -> None:
    vqav2 = choose_benchmark("vqav2", server=True)
    rows = [
        {"question_id": 262144000 + n, "text": text} for n, text in enumerate(("The", "", "Yes"))
    ]
    answers = dump_lines(vqa_test_files(tmp_path) / "answers.jsonl", rows)
    done = write_submission(vqav2, tmp_path, answers, tmp_path / "upload.json")
    assert (done.rows, done.empty) == (3, 2)


def test_vizwiz_names_images_in_the_files_order(tmp_path: Path) -> None:
    vizwiz = choose_benchmark("vizwiz", server=True)
    said = ["Unanswerable", "A Can.", "One"]
    rows = [{"question_id": n, "text": said[n]} for n in (2, 0, 1)]
    answers = dump_lines(vizwiz_files(tmp_path) / "answers.jsonl", rows)
    write_submission(vizwiz, tmp_path, answers, tmp_path / "u.json")
    expected = ["unanswerable", "can", "1"]
    assert json.loads((tmp_path / "u.json").read_text()) == [
        {"image": f"VizWiz_test_{n:08d}.jpg", "answer": text} for n, text in enumerate(expected)
    ]


def test_answers_to_another_split_are_no_upload(tmp_path: Path) -> None:
    vizwiz = choose_benchmark("vizwiz", server=True)
    rows = [{"question_id": n, "text": "can", "prompt": f"What now, {n}?"} for n in range(3)]
    answers = dump_lines(vizwiz_files(tmp_path) / "answers.jsonl", rows)
    with pytest.raises(DataError, match="3 of 3 answers were given to another question"):
        write_submission(vizwiz, tmp_path, answers, tmp_path / "u.json", empty_missing=True)
    assert not (tmp_path / "u.json").exists()


def test_mmbench_writes_the_sheet_which_score_reads_again(tmp_path: Path) -> None:
    mmbench = choose_benchmark("mmbench", server=True)
    said = {row["index"]: f"{row['answer']}." for row in mmbench_rows()}
    rows = [{"question_id": int(index), "text": text} for index, text in said.items()]
    answers = dump_lines(mmbench_files(tmp_path) / "answers.jsonl", rows)
    out = tmp_path / "u.xlsx"
    write_submission(mmbench, tmp_path, answers, out)
    sheet = list(read_sheet(out))
    assert list(sheet[0]) == [
        "index", "question", "A", "B", "C", "D", "prediction", "answer", "split",
    ]  # fmt: skip
    assert sheet[3]["C"] is None and sheet[5]["B"] is None and sheet[0]["answer"] == "B"
    assert {answer.id: answer.text for answer in read_answers(out)} == said


def test_a_sheet_holds_answers_letter_by_letter(tmp_path: Path) -> None:
    mmbench_files(tmp_path)
    said = ["=A", "+1", "'B", "A\nB\tC", "\U0001f600", "007"]
    rows: list[dict[str, object]] = [
        {"question_id": int(row["index"]), "text": text}
        for row, text in zip(mmbench_rows(), said, strict=True)
    ]
    answers = dump_lines(tmp_path / "answers.jsonl", rows)
    sheet = tmp_path / "upload.xlsx"
    write_submission(choose_benchmark("mmbench"), tmp_path, answers, sheet)
    assert [answer.text for answer in read_answers(sheet)] == said
    rows[2]["text"] = "A\x01"
    dump_lines(answers, rows)
    with pytest.raises(DataError, match=r"upload\.xlsx, row 4: .*control character"):
        write_submission(choose_benchmark("mmbench"), tmp_path, answers, sheet)


@pytest.mark.parametrize(
    ("name", "files", "rows", "written"),
    [
        (
            "gqa", gqa_files, {"200": "Table.", "201": "yes", "202": "chair", "203": "left"},
            {"questionId": "200", "prediction": "table"},
        ),
        (
            "seed_bench", seed_files, {"101": "A.", "102": "B", "103": "C", "104": "D", "v0": "A"},
            {"question_id": "101", "prediction": "A."},
        ),
    ],
)  # fmt: skip
def test_the_scorers_of_others_get_their_files(
    name: str,
    files: Callable[[Path], Path],
    rows: dict[str, str],
    written: dict[str, str],
    tmp_path: Path,
) -> None:
    answers = dump(files(tmp_path) / "answers.json", rows)
    out = tmp_path / ("u.json" if name == "gqa" else "u.jsonl")
    write_submission(choose_benchmark(name, server=True), tmp_path, answers, out)
    text = out.read_text()
    assert (json.loads(text)[0] if name == "gqa" else json.loads(text.splitlines()[0])) == written


def test_what_cannot_be_submitted_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        PumiceError, match="benchmark with a server 'pope' is unknown; known: vqav2"
    ):
        choose_benchmark("pope", server=True)
    answers = dump_lines(vizwiz_files(tmp_path) / "a.jsonl", [{"question_id": 0, "text": "x"}])
    with pytest.raises(DataError, match="takes a .json file"):
        write_submission(
            choose_benchmark("vizwiz", server=True), tmp_path, answers, tmp_path / "u.xlsx"
        )
