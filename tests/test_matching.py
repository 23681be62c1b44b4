"""Answers to questions that the files do not ask, and files that are not what they should be."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval_files import Scripted, dump, dump_lines, pope_files, science_files, vqa_files
from pumice.core.errors import DataError, PumiceError
from pumice.core.types import Request, Result
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.choose import choose_benchmark
from pumice.eval.eval_report import report_eval
from pumice.eval.runner import rescore, run_benchmark
from shelf_files import gqa_files, mmbench_files, textvqa_files, vizwiz_files


def test_answers_to_another_split_give_no_number(tmp_path: Path) -> None:
    vizwiz = BENCHMARKS["vizwiz"]
    items = vizwiz.load(vizwiz_files(tmp_path))
    rows = [{"question_id": item.id, "text": "1", "prompt": item.prompt} for item in items]
    path = dump_lines(tmp_path / "own.jsonl", rows)
    assert rescore(vizwiz, tmp_path, path).metrics is not None
    rows[1]["prompt"] = "Is this milk fresh?\nAnswer the question using a single word or phrase."
    path = dump_lines(tmp_path / "other.jsonl", rows)
    scores = rescore(vizwiz, tmp_path, path)
    assert scores.metrics is None
    assert scores.notes[0].startswith("1 of 3 answers were given to another question")
    assert rescore(vizwiz, tmp_path, path, allow_errors=True).metrics is not None


def test_the_same_question_in_another_form_is_the_same(tmp_path: Path) -> None:
    mmbench = BENCHMARKS["mmbench"]
    items = mmbench.load(mmbench_files(tmp_path))
    for form in ("<image>\n{}", "USER: {} ASSISTANT:", "{}\nThink first."):
        rows = [
            {"index": item.id, "prediction": "A", "prompt": form.format(item.prompt.upper())}
            for item in items
        ]
        scores = rescore(mmbench, tmp_path, dump_lines(tmp_path / "a.jsonl", rows))
        assert scores.metrics is not None, scores.notes


def test_slips_of_the_pen_ask_the_same(tmp_path: Path) -> None:
    """Label files are corrected after answers were published; POPE's "imange" was in LLaVA's."""
    vizwiz = BENCHMARKS["vizwiz"]
    items = vizwiz.load(vizwiz_files(tmp_path))
    rows = [{"question_id": item.id, "text": "1", "prompt": item.prompt} for item in items]
    for row in rows:
        first, _, rest = str(row["prompt"]).partition("\n")
        row["prompt"] = f"{first[:3]}x{first[3:]}\n{rest}"
    path = dump_lines(tmp_path / "slips.jsonl", rows)
    assert rescore(vizwiz, tmp_path, path).metrics is not None
    rows[0]["prompt"] = ""
    path = dump_lines(tmp_path / "empty.jsonl", rows)
    assert rescore(vizwiz, tmp_path, path).metrics is not None


def test_a_question_that_is_a_shared_sentence_is_asked(tmp_path: Path) -> None:
    vizwiz = BENCHMARKS["vizwiz"].with_options({"prompt": "short"})
    data = vizwiz_files(tmp_path)
    path = next(data.rglob("val.json"))
    path.write_text(path.read_text().replace("What IS this Can?", "Answer in detail."))
    items = vizwiz.load(data)
    rows = [{"question_id": item.id, "text": "1", "prompt": item.prompt} for item in items]
    assert "Answer in detail." in str(rows[0]["prompt"])
    assert rescore(vizwiz, data, dump_lines(tmp_path / "a.jsonl", rows)).metrics is not None


def test_own_predictions_score_as_they_were_asked(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    data = vqa_files(tmp_path)
    model = Scripted(vqa.load(data))
    own = run_benchmark(model, vqa, data, tmp_path / "own")
    run_benchmark(model, vqa, data, tmp_path / "own-shuffled", control="shuffled")
    bare = vqa.with_options({"prompt": "none"})
    run_benchmark(model, bare, data, tmp_path / "bare")
    assert rescore(vqa, data, tmp_path / "own" / "predictions.jsonl").metrics == own.metrics
    for name in ("own-shuffled", "bare"):
        scores = rescore(vqa, data, tmp_path / name / "predictions.jsonl")
        assert scores.metrics is None and "prompt or image" in scores.notes[-1], name
    assert rescore(bare, data, tmp_path / "bare" / "predictions.jsonl").metrics is not None


def test_own_predictions_tell_what_was_asked_where_no_image_is(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    data = vqa_files(tmp_path / "data")
    model = Scripted(vqa.load(data))
    own = run_benchmark(model, vqa, data, tmp_path / "own")
    run_benchmark(model, vqa, data, tmp_path / "own-shuffled", control="shuffled")
    run_benchmark(model, vqa.with_options({"prompt": "none"}), data, tmp_path / "bare")
    for image in (data / "val2014").iterdir():
        image.unlink()
    assert rescore(vqa, data, tmp_path / "own" / "predictions.jsonl").metrics == own.metrics
    for name in ("own-shuffled", "bare"):
        scores = rescore(vqa, data, tmp_path / name / "predictions.jsonl")
        assert scores.metrics is None and "12 of 12 answers" in scores.notes[-1], name


@pytest.mark.parametrize("form", ["USER: <image>\n{} ASSISTANT:", "<image>\nQ: {} A:", "{}"])
def test_pope_knows_its_question_in_any_form(form: str, tmp_path: Path) -> None:
    pope = BENCHMARKS["pope"]
    items = pope.load(pope_files(tmp_path))
    rows: list[dict[str, object]] = [
        {"question_id": item.id, "text": item.truth, "prompt": form.format(item.extra["text"])}
        for item in items
    ]
    path = dump_lines(tmp_path / "a.jsonl", rows)
    assert rescore(pope, tmp_path, path).metrics is not None
    # A car for a cat is one letter, and another question.
    rows[0]["prompt"] = form.format(items[0].extra["text"].replace("thing 1", "thing 7"))
    scores = rescore(pope, tmp_path, dump_lines(path, rows))
    assert scores.metrics is None and "another question" in scores.notes[0]


def test_equal_options_are_no_equal_question(tmp_path: Path) -> None:
    mmbench = BENCHMARKS["mmbench"]
    items = mmbench.load(mmbench_files(tmp_path))
    rows = [{"index": item.id, "prediction": "A", "prompt": item.prompt} for item in items]
    asked, hint = "Which one?", "Look at it."
    assert f"{hint}\nWhich  one?\nA. cat" in str(rows[0]["prompt"])
    rows[0]["prompt"] = str(rows[0]["prompt"]).replace("Which  one?", "What colour has the car?")
    scores = rescore(mmbench, tmp_path, dump_lines(tmp_path / "a.jsonl", list(rows)))
    assert scores.metrics is None and "1 of 6 answers" in scores.notes[0]
    rows[0]["prompt"] = f"Question: {asked}\nOptions: (A) cat (B) dog"
    path = dump_lines(tmp_path / "a.jsonl", list(rows))
    assert rescore(mmbench, tmp_path, path).metrics is not None


def test_options_of_several_lines_do_not_ask(tmp_path: Path) -> None:
    """MMBench has such: tweets, and programs."""
    mmbench = BENCHMARKS["mmbench"]
    table = next(mmbench_files(tmp_path).rglob("*.tsv"))
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace("\tcat\tdog\t", '\t"cat\nx = 1"\tdog\t'), encoding="utf-8")
    items = mmbench.load(tmp_path)
    assert "A. cat\nx = 1\nB. dog" in items[0].prompt
    rows: list[dict[str, object]] = [
        {"index": item.id, "prediction": "A", "question": item.extra["cells"]["question"]}
        for item in items
    ]
    path = dump_lines(tmp_path / "a.jsonl", rows)
    assert rescore(mmbench, tmp_path, path).metrics is not None


def test_a_sheet_tells_what_was_asked_by_its_questions(tmp_path: Path) -> None:
    """MMBench in Chinese has the indices of the English one, and sheets hold no prompts."""
    mmbench = BENCHMARKS["mmbench"]
    mmbench_files(tmp_path)
    answers = tmp_path / "answers.tsv"
    rows = [("7", "Which  one?"), ("1000007", "Which  one?"), ("2000007", "哪一个？")]
    lines = [f"{index}\t{question}\tA" for index, question in rows]
    answers.write_text("\n".join(["index\tquestion\tprediction", *lines]), encoding="utf-8")
    scores = rescore(mmbench, tmp_path, answers)
    assert scores.notes[0].startswith("1 of 3 answers were given to another question")


def test_textvqa_is_scored_without_the_tokens_it_was_asked_with(tmp_path: Path) -> None:
    textvqa = BENCHMARKS["textvqa"]
    data = textvqa_files(tmp_path)
    for item in textvqa.load(data):
        assert item.image is not None
        item.image.parent.mkdir(parents=True, exist_ok=True)
        item.image.write_bytes(b"x")

    def answer(requests: Sequence[Request], keep: object) -> list[Result]:
        return [Result(id=request.id, text="a") for request in requests]

    own = run_benchmark(answer, textvqa, data, tmp_path / "own")
    for file in data.rglob("*.json*"):
        if "ocr" in file.name.lower():
            file.unlink()
    assert rescore(textvqa, data, tmp_path / "own" / "predictions.jsonl").metrics == own.metrics


def test_a_control_leaves_the_page_of_the_scores(tmp_path: Path) -> None:
    vqa, data, out = BENCHMARKS["vqav2"], vqa_files(tmp_path), tmp_path / "out"
    model = Scripted(vqa.load(data))
    for control, name in ((None, "report.html"), ("shuffled", "report-shuffled.html")):
        folder = out / ("vqav2" if control is None else f"vqav2-{control}")
        scores = run_benchmark(model, vqa, data, folder, control=control)
        assert report_eval("m", [(vqa, folder, scores)], out) == out / name
    assert "A control" not in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("gqa", "gqa/data/testdev_balanced_questions.json", [1]),
        ("vqav2", "v2_mscoco_val2014_annotations.json", {"annotations": None}),
        ("vizwiz", "vizwiz/val.json", [{"image": "a", "question": "b", "answers": ["c"]}]),
        ("textvqa", "TextVQA_0.5.1_val.json", {"data": 3}),
        ("textvqa", "TextVQA_0.5.1_val.json", {"data": []}),
        ("scienceqa", "scienceqa/pid_splits.json", {"test": []}),
        ("scienceqa", "scienceqa/problems.json", {"3": {"question": 1, "choices": 2, "answer": 3}}),
    ],
)
def test_files_of_another_form_are_named(
    name: str, file: str, content: Any, tmp_path: Path
) -> None:
    for make in (gqa_files, vqa_files, vizwiz_files, science_files):
        make(tmp_path)
    dump(tmp_path / file, content)
    answers = dump_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x"}])
    with pytest.raises(DataError, match=f"{name}.*Take the.* official file"):
        rescore(BENCHMARKS[name], tmp_path, answers)


def test_an_error_that_says_more_is_kept(tmp_path: Path) -> None:
    content = {"a": {"question": "x"}}
    dump(tmp_path / "testdev_balanced_questions.json", content)
    answers = dump_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x"}])
    with pytest.raises(DataError, match="question a: this is not the official format: imageId"):
        rescore(BENCHMARKS["gqa"], tmp_path, answers)


def test_reviews_of_another_form_are_named(world: Path, tmp_path: Path, run: Any) -> None:
    row = {"question_id": 0, "content": "8 7", "tuple": ["a", "b"]}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    args = ("score", "llava_wild", "--data", world, "--reviews", tmp_path / "r.jsonl")
    code, _, err = run(*args)
    assert code == 2 and "r.jsonl: a file is not in the official format" in err


def test_an_option_given_twice_is_refused() -> None:
    same = ["scorer=always", "vqav2.scorer=always"]
    assert choose_benchmark("vqav2", same).chosen["scorer"] == "always"
    with pytest.raises(PumiceError, match="vqav2.scorer was given twice, as always and 2021"):
        choose_benchmark("vqav2", ["scorer=always", "scorer=2021"])


def test_a_sheet_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.xlsx"
    path.write_text("index,prediction")
    with pytest.raises(DataError, match="answers.xlsx: this is no Excel workbook"):
        rescore(BENCHMARKS["mmbench"], mmbench_files(tmp_path), path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b")
    with pytest.raises(DataError, match="answers.xlsx: this is no Excel workbook"):
        rescore(BENCHMARKS["mmbench"], mmbench_files(tmp_path), path)
