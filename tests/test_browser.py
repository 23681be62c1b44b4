"""The browser of predictions: everything is in the page, nothing is cut without a word."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from eval_files import Scripted, vqa_files
from pumice.eval import browser
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.categories import category_rows
from pumice.eval.eval_report import report_eval
from pumice.eval.published import PUBLISHED, published_section
from pumice.eval.runner import run_benchmark
from pumice.eval.scores import Scores

VQA = BENCHMARKS["vqav2"]


def evaluated(tmp_path: Path, **truth: str) -> tuple[Path, Scores]:
    data = vqa_files(tmp_path / "data")
    for number, file in enumerate(sorted((data / "val2014").iterdir())):
        if number:
            tiny.noise(number).save(file, "JPEG")
    items = VQA.load(data)
    answer = Scripted(items, fail=items[5].id)
    answer.truth |= truth
    folder = tmp_path / "out" / "vqav2"
    return folder, run_benchmark(answer, VQA, data, folder, allow_errors=True)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="predictions">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_every_prediction_is_in_the_page_and_cannot_break_out_of_it(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--"
    folder, scores = evaluated(tmp_path, **{"1000": evil})
    page = report_eval("m", [(VQA, folder, scores)], tmp_path / "out").read_text("utf-8")
    rows = data_of(page)["rows"]
    assert [row["id"] for row in rows][:2] == ["1000", "1001"] and len(rows) == 12
    assert rows[0]["answer"] == evil and rows[0]["verdict"] == "wrong"
    assert rows[1]["verdict"] == "right" and rows[1]["truth"] == "2"
    assert rows[5]["verdict"] == "error" and rows[5]["error"] == "cannot read the image"
    # One JSON block and one script, whose hash is all that the page's policy lets run.
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    [script] = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert not re.search(r"https?://|@import|fetch\(", page)


def test_an_image_is_there_once_and_a_broken_one_is_not(tmp_path: Path) -> None:
    folder, scores = evaluated(tmp_path)
    page = browser.browse([(VQA, folder, scores)])
    assert [row["image"] for row in page.rows[::3]] == [None, 0, 1, 2]
    assert len(page.images) == 3 and page.images[0].startswith("data:image/png;base64,")
    assert "All 12 predictions, with 3 of their 4 images" in page.counts()


def test_what_does_not_fit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scores = evaluated(tmp_path)
    monkeypatch.setattr(browser, "MOST_PREDICTIONS", 5)
    monkeypatch.setattr(browser, "MOST_IMAGE_BYTES", 1)
    page = browser.browse([(VQA, folder, scores)])
    assert len(page.rows) == 5 and len(page.images) == 1
    told = "5 of 12 predictions, drawn evenly after the errors, with 1 of their "
    assert page.counts().startswith(told) and page.counts() in page.section()


@pytest.mark.parametrize("most", [1, 2, 5])
def test_errors_are_not_lost_among_many(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scores = evaluated(tmp_path)
    monkeypatch.setattr(browser, "MOST_PREDICTIONS", most)
    rows = browser.browse([(VQA, folder, scores)]).rows
    assert len(rows) == most and [row["verdict"] for row in rows].count("error") == 1
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)


def test_what_a_small_run_leaves_free_goes_to_a_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scores = evaluated(tmp_path)
    data, small_folder = tmp_path / "data", tmp_path / "small"
    limited = run_benchmark(Scripted(VQA.load(data)), VQA, data, small_folder, limit=2)
    monkeypatch.setattr(browser, "MOST_PREDICTIONS", 14)
    large = (VQA, folder, scores)
    small = (VQA, small_folder, limited)
    for runs in ([large, small], [small, large]):
        page = browser.browse(runs)
        assert len(page.rows) == page.total == 14


def test_categories_and_counts_are_on_the_page(tmp_path: Path) -> None:
    folder, scores = evaluated(tmp_path)
    page = report_eval("m", [(VQA, folder, scores)], tmp_path / "out").read_text("utf-8")
    assert "n = 12, 1 errors" in page
    rows = category_rows(scores)
    assert rows[0] == ["category", "n", "accuracy", "answer_words"]
    # Question types first, and then answer types.
    assert [row[0] for row in rows[1:]] == [
        "what color", "how many", "is the",
        "answer_type=other", "answer_type=number", "answer_type=yes/no",
    ]  # fmt: skip
    assert rows[1][:3] == ["what color", "4", "100.00"] and rows[3][1] == "3"
    cells = "".join(f"<td>{cell}</td>" for cell in rows[1])
    assert cells in page and "6 categories" in page


def test_the_shuffled_control_of_the_same_run_stands_beside(tmp_path: Path) -> None:
    data, out = vqa_files(tmp_path / "data"), tmp_path / "out"
    items = VQA.load(data)

    def other_image(weights: str) -> str:
        """What the page shows after a control of a model with these weights."""
        wrong = Scripted(items)
        wrong.truth = dict.fromkeys(wrong.truth, "no")
        folder = out / "vqav2-shuffled"
        run_benchmark(wrong, VQA, data, folder, weights=weights, control="shuffled")
        page = report_eval("m", [(VQA, out / "vqav2", own)], out).read_text("utf-8")
        [cell] = re.findall(r'data-name="Other image">(.*?)</td>', page)
        return str(cell)

    own = run_benchmark(Scripted(items), VQA, data, out / "vqav2", weights="w")
    assert other_image("another") == "–"
    assert other_image("w") == "33.3"


def test_published_scores_stand_beside_and_other_questions_are_told(tmp_path: Path) -> None:
    _, scores = evaluated(tmp_path)
    section = published_section([scores])
    assert "LLaVA-1.5 13B" in section and "<td>80.0</td>" in section
    assert "107,394 questions, here 12" in section
    assert published_section([]) == ""
    # Hollow, since these were other questions; a withheld score has no mark.
    assert section.count('class="own other"') == 1 and section.count('class="published"') > 4
    withheld = published_section([replace(scores, metrics=None)])
    assert "score is withheld" in withheld and 'class="own' not in withheld.split("<table")[0]
    same = published_section([replace(scores, n=107_394)])
    assert 'class="own"' in same.split("<table")[0]
    otherwise = replace(scores, n=107_394, protocol=scores.protocol | {"protocol": "own"})
    section = published_section([otherwise])
    assert 'class="own other"' in section and "another prompt</span>" in section
    # The paper's rows, where a slip of a column would be seen.
    assert PUBLISHED["mme"].scores["LLaVA-1.5 7B"] == 1510.7
    assert PUBLISHED["mmbench_cn"].scores["Qwen-VL-Chat"] == 56.7
    assert PUBLISHED["vqav2"].scores["IDEFICS 9B"] == 50.9
    assert PUBLISHED["textvqa"].scores["LLaVA-1.5-HD 13B"] == 62.5
