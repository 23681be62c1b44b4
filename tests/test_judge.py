"""LLaVA-Bench and MM-Vet: what a judge is shown, how its words are read, what they add up to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from eval_files import dump, dump_lines
from judged_files import (
    TABLE,
    ScriptedChat,
    answers_file,
    review,
    vet_files,
    wild_files,
)
from pumice.core.errors import DataError, PumiceError
from pumice.core.llm_types import ChatRequest
from pumice.eval.benchmarks import BENCHMARKS, llava_wild, mmvet
from pumice.eval.benchmarks.llava_wild import OWN_RULE, LlavaWild
from pumice.eval.benchmarks.mmvet import OWN_TABLE, SUFFIX, MMVet
from pumice.eval.judge import Judge
from pumice.eval.judged_benchmark import JudgedBenchmark
from pumice.eval.reviews import rescore_reviews
from pumice.eval.rubric import keyword_share, overlap, plain_truth
from pumice.eval.runner import rescore
from pumice.eval.scores import Scores
from pumice.eval.verdicts import Values, read_values, write_values

Run = Callable[..., tuple[int, str, str]]
WILD, VET = LlavaWild(), MMVet()


def asked_by(benchmark: JudgedBenchmark, chat: ScriptedChat, runs: int = 1) -> JudgedBenchmark:
    return benchmark.judged_by(Judge("endpoint", "judge-1", runs, chat))


# --- what a judge is shown ------------------------------------------------------------------------


def test_llava_bench_is_shown_as_llava_shows_it(tmp_path: Path) -> None:
    item = WILD.load(wild_files(tmp_path))[2]
    system, shown = WILD.messages(item, "three")
    words = "You are a helpful and precise assistant for checking the quality of the answer."
    assert system == {"role": "system", "content": words}
    assert shown["content"] == (
        "[Context]\nA hat.\nA man.\n\n[Question]\nWhat is 2?\n\n"
        "[Assistant 1]\nreference 2\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nthree\n\n[End of Assistant 2]\n\n[System]\nGive two numbers.\n\n"
    )
    chat = ScriptedChat(lambda request: "8 7\nBecause.")
    rescore(asked_by(WILD, chat, runs=2), tmp_path, answers_file(tmp_path))
    assert {(r.model, r.temperature, r.max_tokens) for r in chat.asked} == {("judge-1", 0.2, 1024)}
    assert [r.draw for r in chat.asked] == [0, 1] * 4


def test_mm_vet_is_shown_as_its_evaluator_shows_it(tmp_path: Path) -> None:
    items = VET.load(vet_files(tmp_path))
    (shown,) = VET.messages(items[0], "x = -1")
    assert shown["content"] == f"{TABLE}\nWhat is 0? | -1 <AND> -5 | x = -1 | "
    (shown,) = VET.messages(items[1], "stop")
    assert shown["content"].endswith("\nWhat is 1? | stop <OR> halt | stop | ")
    assert [item.prompt for item in items] == [f"What is {n}?" for n in range(4)]
    # The notebook's cells hold the same code.
    code = (tmp_path / "mm-vet" / "mm-vet_evaluator.py").read_text().splitlines(keepends=True)
    (tmp_path / "mm-vet" / "mm-vet_evaluator.py").unlink()
    cells = [{"cell_type": "markdown", "source": ['prompt = """no"""']}]
    cells.append({"cell_type": "code", "source": code})
    dump(tmp_path / "mm-vet" / "mm-vet_evaluator.ipynb", {"cells": cells})
    assert VET.load(tmp_path)[0].extra["table"] == TABLE


def test_an_unreadable_grade_is_asked_for_again_as_officially(tmp_path: Path) -> None:
    def say(request: ChatRequest) -> str:
        first = not request.messages[-1]["content"].endswith(SUFFIX)
        number = request.messages[-1]["content"].count("What is 1?")
        return "0.5" if not first and not number else "Well,"

    chat = ScriptedChat(say)
    scores = rescore(asked_by(VET, chat), vet_files(tmp_path), answers_file(tmp_path))
    ladder = [
        (r.temperature, r.messages[-1]["content"].endswith(SUFFIX))
        for r in chat.asked
        if "What is 1?" in r.messages[-1]["content"]
    ]
    assert ladder == [(0.0, False), (0.0, True), (0.5, True), (1.0, True), (1.5, True)]
    assert {r.max_tokens for r in chat.asked} == {3}
    assert (scores.metrics, scores.unparsed, scores.n) == ({"total": 50.0}, 1, 4)
    assert scores.judge["unparsed"] == 1 and "left out" in scores.notes[-1]
    official = asked_by(MMVet(unparsed="official"), ScriptedChat(say))
    scores = rescore(official, tmp_path, answers_file(tmp_path))
    assert scores.metrics == {"total": 37.5} and scores.judge["unparsed"] == 1
    assert "they count as 0, as in the official code" in scores.notes[-1]


# --- how its words are read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "apart", "official"),
    [
        ("8 7\nBecause.", (8, 7), (8, 7)),
        ("8 7", (8, 7), (8, 7)),
        ("8,7", (8, 7), (8, 7)),
        ("8.5 7", (8.5, 7), (8.5, 7)),
        ("8, 7", None, None),
        ("8  7", None, None),
        ("8 7 ", None, None),
        ("8", None, None),
        ("8 7 6", None, None),
        ("", None, None),
        ("\n8 7", None, None),
        ("Assistant 1: 8", None, None),
        ("8/10 7/10", None, None),
        ("8\t7", None, None),
        ("0 10", (0, 10), (0, 10)),
        ("80 70", None, (80, 70)),
        ("-1 7", None, (-1, 7)),
        ("8 inf", None, (8, float("inf"))),
        ("٨ ٧", (8, 7), (8, 7)),
    ],
)
def test_reviews_are_read_by_llavas_rule(said: str, apart: Values, official: Values) -> None:
    assert WILD.read(said, cut=False) == apart
    assert LlavaWild(unparsed="official").read(said, cut=False) == official


def test_a_review_that_was_cut_in_its_first_line_is_no_score() -> None:
    # Of "8 10" the limit left "8 1".
    assert WILD.read("8 1", cut=True) is None
    assert WILD.read("8 10\nThe sec", cut=True) == (8, 10)
    assert WILD.read("nan nan", cut=False) is None


@pytest.mark.parametrize(
    ("said", "apart", "official"),
    [
        ("0.5", 0.5, 0.5),
        ("1.0", 1.0, 1.0),
        ("0", 0.0, 0.0),
        ("0.5 because", 0.5, 0.5),
        ("0.5\n", 0.5, 0.5),
        ("0.", None, 0.0),
        (".5", None, 0.5),
        ("1e-1", None, 0.1),
        ("+0.5", None, 0.5),
        ("1.1", None, None),
        ("-0.1", None, None),
        ("0,5", None, None),
        (" 0.5", None, None),
        ("", None, None),
        ("Correct", None, None),
        ("0.5/1", None, None),
        ("50%", None, None),
    ],
)
def test_grades_are_read_by_mm_vets_rule(
    said: str, apart: float | None, official: float | None
) -> None:
    for benchmark, expected in ((VET, apart), (MMVet(unparsed="official"), official)):
        assert benchmark.read(said, cut=True) == (None if expected is None else (expected,))


def test_nan_passes_only_the_official_reading() -> None:
    assert VET.read("nan", cut=False) is None
    (grade,) = MMVet(unparsed="official").read("nan", cut=False) or ()
    assert grade != grade


def test_values_travel_through_a_text() -> None:
    runs: list[Values | None] = [(8.0, 6.5), None, (0.1 + 0.2, -1.0)]
    assert write_values(runs) == "8 6.5; -; 0.30000000000000004 -1"
    assert read_values(write_values(runs)) == runs
    assert write_values([None, None]) is None and read_values(None) == []
    assert write_values([(0.0,)]) == "0"


# --- published verdicts ---------------------------------------------------------------------------


def reviews(root: Path, rows: list[tuple[str, tuple[float, float]]], name: str) -> Path:
    return dump_lines(root / name, [review(n, *row) for n, row in enumerate(rows)])


def test_reviews_add_up_as_llavas_summary_has_it(tmp_path: Path) -> None:
    wild_files(tmp_path)
    first = [
        ("8 4\nx", (8.0, 4.0)),
        ("9 6", (9.0, 6.0)),
        ("7 7", (7.0, 7.0)),
        ("10 5", (10.0, 5.0)),
    ]
    second = [*first[:3], ("oops", (-1.0, -1.0))]
    files = [reviews(tmp_path, first, "1.jsonl"), reviews(tmp_path, second, "2.jsonl")]
    scores = rescore_reviews(WILD, tmp_path, files, answers_file(tmp_path))
    # Run 1: 22/34, run 2 without its last review: 17/24; each rounded as LLaVA rounds.
    assert scores.judge["by_run"] == [64.7, 70.8]
    assert scores.metrics is not None and scores.metrics["relative"] == 67.75
    assert scores.metrics["model"] == pytest.approx(10 * (5.5 + 17 / 3) / 2, abs=1e-4)
    assert (scores.judge["verdicts"], scores.judge["unparsed"], scores.unparsed) == (8, 1, 0)
    assert scores.by_category["conv"] == {
        "relative": 50.0, "model": 42.5, "reference": 85.0, "n": 2,
    }  # fmt: skip
    official = rescore_reviews(
        LlavaWild(unparsed="official"), tmp_path, files, answers_file(tmp_path)
    )
    # (4 + 6 + 7 - 1) / (8 + 9 + 7 - 1)
    assert official.judge["by_run"] == [64.7, 69.6]
    assert official.protocol["fingerprint"] != scores.protocol["fingerprint"]


def grades(root: Path, scores: dict[str, list[float]]) -> Path:
    content = {
        name: {
            "model": ["gpt-4-0613"] * len(runs), "content": [*map(str, runs)], "score": runs,
        }
        for name, runs in scores.items()
    }  # fmt: skip
    return dump(root / "grades.json", content)


def test_grades_add_up_over_runs_capabilities_and_their_sets(tmp_path: Path, run: Run) -> None:
    given = {"v1_0": [0.5, 0.7], "v1_1": [1.0, 1.0], "v1_2": [0.0, 0.2], "v1_3": [0.1, 0.1]}
    file = grades(vet_files(tmp_path), given)
    scores = rescore_reviews(VET, tmp_path, [file], answers_file(tmp_path))
    assert scores.metrics == {"total": 45.0}
    assert scores.judge["by_run"] == [40.0, 50.0] and scores.judge["spread"] == 5.0
    totals = {name: own["total"] for name, own in scores.by_category.items()}
    assert totals == {
        "ocr": pytest.approx(100 * (0.6 + 1.0 + 0.1) / 3, abs=1e-4),
        "math": 35.0, "ocr+math": 35.0, "only ocr": 100.0, "rec": 10.0, "only rec": 10.0,
    }  # fmt: skip
    assert scores.label == "mmvet (judge gpt-4-0613, 2 runs)"
    # Without the answers it says so, also when the grades stand in their place.
    code, out, err = run("score", "mmvet", "--data", tmp_path, "--answers", file, "--json")
    assert code == 0 and json.loads(out)["metrics"] == scores.metrics and "only the reviews" in err
    # Without one of the grades there is no score.
    alone = rescore_reviews(VET, tmp_path, [file])
    assert alone.metrics == scores.metrics and "only the reviews" in alone.notes[0]
    content = json.loads(file.read_text())
    del content["v1_2"]
    content["v1_1"]["content"].pop(), content["v1_1"]["score"].pop()
    short = rescore_reviews(VET, tmp_path, [dump(file, content)], answers_file(tmp_path))
    assert short.metrics is None and (short.errors, short.missing) == (2, 0)
    assert "run 2 of the reviews has none of it" in short.notes[0]
    short = rescore_reviews(VET, tmp_path, [file])
    assert short.metrics is None and (short.errors, short.missing) == (1, 1)


def test_a_zero_after_the_last_attempt_is_no_grade(tmp_path: Path) -> None:
    file = grades(vet_files(tmp_path), {f"v1_{n}": [1.0] for n in range(4)})
    content = json.loads(file.read_text())
    content["v1_3"] |= {"content": ["0.8"], "score": [0.0]}
    scores = rescore_reviews(VET, tmp_path, [dump(file, content)])
    assert scores.metrics == {"total": 100.0} and scores.judge["unparsed"] == 1
    official = rescore_reviews(MMVet(unparsed="official"), tmp_path, [file])
    assert official.metrics == {"total": 75.0}


def test_reviews_of_other_questions_are_refused(tmp_path: Path) -> None:
    file = grades(vet_files(tmp_path), {"v2_0": [1.0]})
    with pytest.raises(DataError, match="1 reviews are of questions"):
        rescore_reviews(VET, tmp_path, [file])
    with pytest.raises(PumiceError, match="pope is scored by rule"):
        rescore_reviews(BENCHMARKS["pope"], tmp_path, [file])


# --- without a judge ------------------------------------------------------------------------------


def test_the_rubric_says_that_it_is_not_comparable(tmp_path: Path, run: Run) -> None:
    texts = ("reference 0", "reference 1 and more", "nothing", "reference 3")
    path = answers_file(wild_files(tmp_path), texts)
    code, out, err = run("score", "llava_bench", "--data", tmp_path, "--answers", path)
    assert code == 0 and "llava_wild (rubric)" in out and "NOT COMPARABLE" in err
    code, out, _ = run("score", "llava_wild", "--data", tmp_path, "--answers", path, "--json")
    told = json.loads(out)
    assert told["judge"] == {"name": "rubric", "comparable": "no other"}
    assert told["protocol"]["judge"]["by"] == "rubric"
    assert told["metrics"]["relative"] == 70.0
    assert told["base_rate"]["relative"] > 0


@pytest.mark.parametrize(
    ("text", "truth", "share"),
    [
        ("x = -1 or x = -5", "-1<AND>-5", 1.0),
        ("x = -1", "-1<AND>-5", 0.5),
        ("1 and 5", "-1<AND>-5", 0.0),
        ("It says HALT!", "stop<OR>halt", 1.0),
        ("No, nothing", "stop<OR>halt", 0.0),
        ("a small dog", "dog", 1.0),
        ("dogs", "dog", 0.0),
        ("The cat sleeps on a red mat", "A red cat sleeps on a mat", 1.0),
        ("A red cat", "A red cat sleeps on a mat", 0.5),
        ("", "cat", 0.0),
        ("$3.99", "3.99", 1.0),
        ("", "the", 0.0),
    ],
)
def test_keywords(text: str, truth: str, share: float) -> None:
    assert keyword_share(text, truth) == share


def test_overlap_is_f1_of_the_words_with_a_meaning() -> None:
    assert overlap("The cat is on a mat", "a mat and the cat") == 1.0
    assert overlap("cat", "cat dog") == pytest.approx(2 / 3)
    assert overlap("", "cat") == 0.0 and overlap("", "") == 1.0
    assert plain_truth("-1<AND>-5<OR>6") == "-1 and -5"


# --- the judge's instruction, and what a score may be compared with -------------------------------


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_score_says_whose_instruction_judged_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, say = wild_files(vet_files(tmp_path)), ScriptedChat(lambda request: "0.5")
    published = MMVet().judged_by(Judge("endpoint", "gpt-4-0613", 5, say))
    items = published.load(data)
    told = published.judging(items)
    assert told["comparable"] == "same judge" and told["instruction"] not in ("official", "own")
    monkeypatch.setattr(mmvet, "_OFFICIAL_TABLE", digest(TABLE))
    monkeypatch.setattr(llava_wild, "_OFFICIAL_RULE", digest("Give two numbers."))
    assert published.judging(items)["comparable"] == "published"
    assert published.judging(items)["instruction"] == "official"
    other = MMVet().judged_by(Judge("endpoint", "another", 5, say))
    assert other.judging(items)["comparable"] == "same judge"
    local = MMVet().judged_by(Judge("local model", "gpt-4-0613"))
    assert local.judging(items)["comparable"] == "no other" and local.judging(items)["runs"] == 1
    wild = LlavaWild().judged_by(Judge("endpoint", "gpt-4-0314"))
    assert wild.judging(wild.load(data))["comparable"] == "published"
    assert wild.judging(wild.load(data))["runs"] == 3


def test_the_instruction_can_be_ours_and_the_published_one_asked_for(tmp_path: Path) -> None:
    data = wild_files(vet_files(tmp_path, table=None), rule=None)
    for benchmark, own in ((LlavaWild(), OWN_RULE), (MMVet(), OWN_TABLE)):
        judge = Judge("endpoint", "judge-1", 1)
        judged = benchmark.judged_by(judge)
        items = judged.load(data)
        assert judged.instruction(items[0]) == own
        assert judged.judging(items)["instruction"] == "pumice's own"
        with pytest.raises(DataError, match="published instruction is not at hand"):
            benchmark.with_options({"instruction": "official"}).load(data)
    with pytest.raises(DataError, match="instruction is not at hand"):
        MMVet(instruction="official").load(vet_files(tmp_path))
    assert MMVet(instruction="own").load(data)[0].extra["table"] == OWN_TABLE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category": "chat"}, "the category is 'chat'"),
        ({"image": "009.jpg"}, "context.jsonl holds no caption of '009.jpg'"),
        ({"question_id": 9}, "answers_gpt4.jsonl holds no answer to '9'"),
        ({"text": None}, ""),
    ],
)
def test_files_that_do_not_belong_together_are_named(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    file = wild_files(tmp_path) / "llava-bench-in-the-wild" / "questions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= change
    if change == {"text": None}:
        del rows[1]["text"]
        said = "text absent"
    dump_lines(file, rows)
    with pytest.raises(DataError, match=r"line 2: .*" + said.replace("(", r"\(")):
        WILD.load(tmp_path)


def test_an_unknown_capability_is_named(tmp_path: Path) -> None:
    file = vet_files(tmp_path) / "mm-vet" / "mm-vet.json"
    content = json.loads(file.read_text())
    content["v1_2"]["capability"] = ["recognition"]
    dump(file, content)
    with pytest.raises(DataError, match="v1_2: the capabilities are .*recognition"):
        VET.load(tmp_path)


def test_mm_vets_server_takes_an_object(tmp_path: Path, run: Run) -> None:
    vet_files(tmp_path)
    out = tmp_path / "upload.json"
    code, _, _ = run(
        "submit", "mm-vet", "--data", tmp_path, "--answers", answers_file(tmp_path), "--out", out
    )
    expected = {"v1_0": "one", "v1_1": "two", "v1_2": "three", "v1_3": "four"}
    assert code == 0 and out.read_text() == json.dumps(expected, indent=2)


def test_scores_with_a_judge_come_back_from_their_file(tmp_path: Path) -> None:
    chat = ScriptedChat(lambda request: "0.5")
    scores = rescore(asked_by(VET, chat, 2), vet_files(tmp_path), answers_file(tmp_path))
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
    assert scores.judge["by_run"] == [50.0, 50.0] and scores.base_rate == {}
