"""The shelf: official files in, prompts byte for byte, answers in every layout, official scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eval_files import answers_to, dump, dump_lines, pope_files, science_files, vqa_files
from pumice.core.errors import DataError, PumiceError
from pumice.eval.benchmark import Benchmark, Item
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.choose import choose_benchmark, choose_benchmarks
from pumice.eval.runner import rescore
from pumice.eval.scores import Scores, row_protocol
from pumice.eval.tables import write_sheet
from shelf_files import (
    gqa_files,
    mmbench_files,
    mmbench_rows,
    mme_files,
    seed_files,
    textvqa_files,
    vizwiz_files,
)

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
FILES: dict[str, Callable[[Path], Path]] = {
    "vqav2": vqa_files,
    "gqa": gqa_files,
    "xgqa": lambda root: gqa_files(root, "xgqa/zero_shot/testdev_balanced_questions_de.json"),
    "vizwiz": vizwiz_files,
    "scienceqa": science_files,
    "textvqa": textvqa_files,
    "pope": pope_files,
    "mme": mme_files,
    "mmbench": mmbench_files,
    "mmbench_cn": lambda root: mmbench_files(root, "mmbench_dev_cn_20231003.tsv"),
    "seed_bench": seed_files,
}
HERE = pytest.mark.parametrize("name", FILES)


def prompts(benchmark: Benchmark, root: Path) -> list[str]:
    return [item.prompt for item in benchmark.load(root)]


def scored(benchmark: Benchmark, root: Path, rows: list[dict[str, object]]) -> Scores:
    return rescore(benchmark, root, dump_lines(root / "answers.jsonl", rows), allow_errors=True)


# --- what holds for every benchmark -------------------------------------------------------------


@HERE
def test_the_truth_scores_full_and_its_order_does_not_matter(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    items = benchmark.load(FILES[name](tmp_path))
    rows = answers_to(items, benchmark.truth_text)
    whole = scored(benchmark, tmp_path, rows)
    assert (whole.n, whole.missing, whole.errors, whole.unparsed) == (len(items), 0, 0, 0)
    assert whole.metrics is not None
    assert scored(benchmark, tmp_path, rows[::-1]).to_dict() == whole.to_dict()
    full = {"mme": 400.0, "vizwiz": 90.0}.get(name, 100.0)
    assert whole.metrics[benchmark.headline] == pytest.approx(full, abs=8)


@HERE
def test_a_missing_answer_and_an_error_are_counted_and_never_scored(
    name: str, tmp_path: Path
) -> None:
    benchmark = BENCHMARKS[name]
    items = benchmark.load(FILES[name](tmp_path))
    rows = answers_to(items, benchmark.truth_text)
    del rows[0]
    rows[-1] = {"question_id": rows[-1]["question_id"], "error": "out of memory"}
    path = dump_lines(tmp_path / "answers.jsonl", rows)
    scores = rescore(benchmark, tmp_path, path)
    assert (scores.missing, scores.errors) == (1, 1)
    assert scores.withheld and any("error" in note for note in scores.notes)


@HERE
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(PumiceError, match=f"{name} has no option 'colour'"):
        BENCHMARKS[name].with_options({"colour": "blue"})


def test_options_are_part_of_the_protocol(tmp_path: Path) -> None:
    vqa_files(tmp_path)
    prints = set()
    for option in ("scorer=2021", "scorer=before-2021", "vqav2.scorer=always"):
        benchmark = choose_benchmark("vqav2", [option])
        scores = scored(benchmark, tmp_path, [{"question_id": "1000", "text": "red"}])
        assert scores.protocol["options"]["scorer"] == option.partition("=")[2]
        assert scores.protocol["protocol"] == "paper"
        prints.add(scores.protocol["fingerprint"])
    assert len(prints) == 3


@pytest.mark.parametrize("name", ["vqav2", "gqa", "pope", "mme"])
def test_another_prompt_asks_the_same_and_says_that_it_is_not_the_papers(
    name: str, tmp_path: Path
) -> None:
    root = FILES[name](tmp_path)
    published = BENCHMARKS[name]
    asked = prompts(published, root)
    plain = [text.removesuffix(SHORT) for text in asked]
    assert "prompt" not in published.row_options
    assert row_protocol(published, control=None)["protocol"] == "paper"
    for value, expected in (
        ("short", asked),
        ("none", plain),
        ("qa", [f"Q: {text} A:" for text in plain]),
    ):
        benchmark = choose_benchmark(name, [f"prompt={value}"])
        assert prompts(benchmark, root) == expected
        protocol = row_protocol(benchmark, control=None)
        assert protocol["protocol"] == ("paper" if value == "short" else "own")
        assert (protocol == row_protocol(published, control=None)) == (value == "short")
        assert benchmark.as_recorded(protocol).chosen == benchmark.chosen


def test_benchmarks_are_found_by_their_usual_names() -> None:
    assert [b.name for b in choose_benchmarks(["SEED-Bench", "mmbench-cn", "sqa", "POPE"])] == [
        "seed_bench", "mmbench_cn", "scienceqa", "pope",
    ]  # fmt: skip
    assert [b.name for b in choose_benchmarks(["all"])] == list(BENCHMARKS.names())
    chosen = choose_benchmarks(["vqav2", "pope"], ["pope.labels=2910"])
    assert [b.chosen.get("labels") for b in chosen] == [None, "2910"]
    for option, words in {
        "scorer=2021": "cannot be read",
        "pope.labels": "cannot be read",
        "mme.x=1": "mme, which is not asked for",
        "pope.labels=2901": "pope.labels is '2901'.*Did you mean '2910'",
    }.items():
        with pytest.raises(PumiceError, match=words):
            choose_benchmarks(["vqav2", "pope"], [option])


# --- GQA and VQAv2 ------------------------------------------------------------------------------


def test_gqa_forgives_only_full_stops_and_capitals(tmp_path: Path) -> None:
    gqa = BENCHMARKS["gqa"]
    assert prompts(gqa, gqa_files(tmp_path))[0] == "What is number 0?" + SHORT
    assert gqa.load(tmp_path)[0].image == tmp_path / "val2014" / "n0.jpg"
    said = {"200": "Table..", "201": "Yes, it is", "202": "the chair", "203": "left "}
    rows = [{"questionId": name, "prediction": text} for name, text in said.items()]
    scores = rescore(gqa, tmp_path, dump(tmp_path / "testdev_balanced_predictions.json", rows))
    # Of furniture: table told once as is true, chair never though it is true once: 0 + 1, / 100.
    figures = {"accuracy": 25, "binary": 0, "open": 50, "distribution": 0.01}
    assert scores.metrics == figures | {"answer_words": 1.75}
    assert scores.by_category["query"] == {"accuracy": 50, "n": 2}
    with pytest.raises(DataError, match="no official file"):
        gqa.with_options({"split": "val"}).load(tmp_path)


def test_vqav2_versions_differ_where_all_annotators_agree(tmp_path: Path) -> None:
    answers = [{"answer": "yes", "answer_id": n} for n in range(10)]
    ids = {"question_id": 1000, "image_id": 1}
    dump(
        tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [{**ids, "question": "Is it?"}]},
    )
    dump(
        tmp_path / "v2_mscoco_val2014_annotations.json",
        {"annotations": [{**ids, "answers": answers}]},
    )
    rows = [{"question_id": 1000, "text": "Yes."}]
    for options, expected in {
        ("scorer=2021",): 0,
        ("scorer=before-2021",): 100,
        ("scorer=always",): 100,
        ("scorer=2021", "answers=uploaded"): 100,
    }.items():
        scores = scored(choose_benchmark("vqav2", options), tmp_path, rows)
        assert scores.metrics is not None and scores.metrics["accuracy"] == expected, options


def test_a_split_without_truths_is_asked_and_not_scored(tmp_path: Path) -> None:
    question = {"question_id": 262144000, "image_id": 262144, "question": "Is it?"}
    dump(
        tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        {"data_subtype": "test-dev2015", "questions": [question]},
    )
    benchmark = choose_benchmark("vqav2", ["split=test-dev2015"])
    (item,) = benchmark.load(tmp_path)
    assert item.image is not None and item.image.name == "COCO_test2015_000000262144.jpg"
    scores = scored(benchmark, tmp_path, [{"question_id": 262144000, "text": "yes"}])
    assert scores.withheld and scores.base_rate == {}
    assert any("pumice submit" in note for note in scores.notes)


# --- VizWiz and TextVQA -------------------------------------------------------------------------


def test_vizwiz_prompts_and_both_ids(tmp_path: Path) -> None:
    vizwiz = BENCHMARKS["vizwiz"]
    asked = prompts(vizwiz, vizwiz_files(tmp_path))
    sentence = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert asked[0] == "What is this can?" + sentence + SHORT
    assert asked[1] == "What  does it say" + sentence + SHORT
    assert asked[2] == "Über was?" + sentence + SHORT
    said = ["Coca-Cola", "Unanswerable.", "one"]
    rows = [{"question_id": n, "text": text} for n, text in enumerate(said)]
    upload = [{"image": f"VizWiz_val_{n:08d}.jpg", "answer": text} for n, text in enumerate(said)]
    expected = {"accuracy": round(100 * (1 + 1 + 0.6) / 3, 2), "said_unanswerable": 33.33}
    for name, content in (("rows", rows), ("upload", upload)):
        assert rescore(vizwiz, tmp_path, dump(tmp_path / name, content)).metrics == expected
    assert not vizwiz.with_options({"split": "test"}).judged
    assert prompts(vizwiz.with_options({"split": "test"}), tmp_path) == asked
    bare = vizwiz.with_options({"prompt": "short"})
    assert [text.count("\n") for text in asked] == [2] * len(asked)
    assert prompts(bare, tmp_path) == [f"{text.split(chr(10))[0]}{SHORT}" for text in asked]
    assert row_protocol(bare, control=None)["protocol"] == "own"
    assert row_protocol(vizwiz, control=None)["protocol"] == "paper"


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("vqav2", "llava_vqav2_mscoco_test2015.jsonl", {"split": "test2015", "prompt": "none"}),
        ("vizwiz", "llava_test.jsonl", {"split": "test", "prompt": "short"}),
    ],
)
def test_questions_with_their_prompt_are_not_asked_with_another(
    name: str, file: str, options: dict[str, str], tmp_path: Path
) -> None:
    rows = [{"question_id": 1, "image": "1.jpg", "text": f"What?{SHORT}"}]
    dump_lines(tmp_path / file, rows)
    published = BENCHMARKS[name].with_options({"split": options["split"]})
    assert prompts(published, tmp_path) == [f"What?{SHORT}"]
    with pytest.raises(DataError, match=f"{name}: .*{file} .* prompt={options['prompt']}"):
        BENCHMARKS[name].with_options(options).load(tmp_path)


def test_xgqa_reads_the_file_of_its_language(tmp_path: Path) -> None:
    root = FILES["xgqa"](tmp_path)
    assert prompts(BENCHMARKS["xgqa"], root)[0] == "What is number 0?" + SHORT
    with pytest.raises(DataError, match="testdev_balanced_questions_zh.json"):
        BENCHMARKS["xgqa"].with_options({"language": "zh"}).load(root)
    # The images are GQA's, and may lie where GQA's own file finds them.
    image = tmp_path / "gqa" / "data" / "images" / "n0.jpg"
    image.parent.mkdir(parents=True)
    image.touch()
    assert BENCHMARKS["xgqa"].load(root)[0].image == image


def test_textvqa_asks_with_ocr_and_finds_answers_by_prompt(tmp_path: Path) -> None:
    textvqa = BENCHMARKS["textvqa"]
    items = textvqa.load(textvqa_files(tmp_path))
    assert items[0].prompt == "What is the brand?\nReference OCR token: NIKON, D90" + SHORT
    # An empty list keeps its line and the space at its end.
    assert items[1].prompt == "Who wrote this?\nReference OCR token: " + SHORT
    forms = [
        items[0].prompt,
        f"Reference OCR token: x\nWho wrote this?{SHORT}",
        "OCR tokens: a, b. Question: What year? Short answer:",
    ]
    rows: list[dict[str, object]] = [
        {"question_id": f"{n // 2}abc", "prompt": prompt, "text": text}
        for (n, prompt), text in zip(enumerate(forms), ["Nikon", "D90", "x"], strict=True)
    ]
    scores = scored(textvqa, tmp_path, rows)
    assert scores.metrics == {"accuracy": 66.67} and scores.missing == 0
    by_id: list[dict[str, object]] = [{"question_id": 34602, "text": "nikon"}]
    assert scored(textvqa, tmp_path, by_id).missing == 2


def test_textvqa_without_ocr_tokens_is_scored_but_not_asked(tmp_path: Path) -> None:
    textvqa = BENCHMARKS["textvqa"]
    items = textvqa.load(textvqa_files(tmp_path, ocr=False))
    with pytest.raises(DataError, match="3 of 3 questions have no OCR tokens"):
        textvqa.prepare(items)
    bare = textvqa.with_options({"ocr": "none"})
    bare.prepare(bare.load(tmp_path))
    assert (textvqa.as_published, bare.as_published) == (True, False)
    assert prompts(bare, tmp_path)[0] == "What is the brand?" + SHORT
    dump(
        tmp_path / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json",
        {"data": [{"image_id": "0abc", "ocr_tokens": ["A", "B"]}]},
    )
    assert "token: A, B\n" in prompts(textvqa, tmp_path)[1]


def test_textvqa_says_that_answers_were_asked_otherwise(tmp_path: Path) -> None:
    textvqa = BENCHMARKS["textvqa"]
    bare = textvqa.with_options({"ocr": "none"})
    asked = textvqa.load(textvqa_files(tmp_path)), bare.load(tmp_path)
    for benchmark, own, other in ((textvqa, *asked), (bare, *asked[::-1])):
        rows: list[dict[str, object]] = [
            {"question_id": item.id, "prompt": item.prompt, "text": "x"} for item in own
        ]
        assert scored(benchmark, tmp_path, rows).notes == ()
        rows[0]["prompt"] = other[0].prompt
        scores = scored(benchmark, tmp_path, rows)
        assert scores.metrics is not None and len(scores.notes) == 1
        assert scores.notes[0].startswith("1 of 3 answers were asked with")
        # The question alone, as some write it down, tells nothing of it.
        rows[0]["prompt"] = own[0].prompt.split("\n")[0]
        assert scored(benchmark, tmp_path, rows).notes == ()


# --- MME ----------------------------------------------------------------------------------------


def test_mme_swaps_the_ending_and_pairs_the_questions(tmp_path: Path) -> None:
    mme = BENCHMARKS["mme"]
    items = mme.load(mme_files(tmp_path))
    assert items[0].prompt == "Is there a dog in 0001?" + SHORT
    assert items[1].prompt == "Is there a cat in 0001?" + SHORT
    artwork = [item for item in items if item.category == "artwork"]
    assert artwork[0].image is not None and artwork[0].image.name == "77.png"
    rows: list[dict[str, object]] = [
        {"question_id": f"{item.category}/{'images/' * (item in artwork)}{item.image.name}",
         "prompt": item.prompt, "text": "Yes"}
        for item in reversed(items) if item.image
    ]  # fmt: skip
    scores = scored(mme, tmp_path, rows)
    # Yes to everything: half of the questions, and no image with both.
    assert scores.metrics == {
        **{"perception": 100, "perception_most": 400, "cognition": 0, "cognition_most": 0}
    }
    assert scores.by_category["artwork"] == {"score": 50, "acc": 50, "acc_plus": 0, "n": 2}
    with pytest.raises(DataError, match="two questions under one id"):
        scored(mme, tmp_path, [{"question_id": "existence/0001.jpg", "text": "Yes"}])


def test_mme_takes_the_tools_result_files(tmp_path: Path) -> None:
    mme = BENCHMARKS["mme"]
    mme_files(tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    lines = [
        f"{name}.txt\tIs there a {thing} in {name}?  Please answer yes or no.\t{truth}\t{said}"
        for name, said in (("0001", "Yes"), ("0002", "No, not at all"))
        for thing, truth in (("dog", "Yes"), ("cat", "No"))
    ]
    (results / "existence.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    scores = rescore(mme, tmp_path, results, allow_errors=True)
    assert scores.by_category["existence"] == {"score": 50, "acc": 50, "acc_plus": 0, "n": 4}
    (results / "existence.txt").write_text(lines[0] + "\tno\n", encoding="utf-8")
    with pytest.raises(DataError, match="this line has 5"):
        rescore(mme, tmp_path, results)


def test_mme_reads_the_tools_templates_without_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "eval_tool" / "Your_Results"
    folder.mkdir(parents=True)
    text = "1.jpg\tA dog? Please answer yes or no.\tYes\n1.jpg\tA cat? Please answer yes or no.\tNo"
    (folder / "existence.txt").write_text(text, encoding="utf-8")
    assert [item.truth for item in BENCHMARKS["mme"].load(tmp_path)] == ["yes", "no"]


# --- MMBench ------------------------------------------------------------------------------------


def test_mmbench_prompts_hold_the_hint_and_end_at_the_first_absent_option(tmp_path: Path) -> None:
    mmbench = BENCHMARKS["mmbench"]
    items = mmbench.load(mmbench_files(tmp_path))
    options = "\nA. cat\nB. dog\nC. red car\nD. All above are not right"
    assert items[0].prompt == "Look at it.\nWhich  one?" + options + LETTER
    assert items[3].prompt == "Is it?\nA. yes it is\nB. never" + LETTER
    assert items[5].prompt == "Q?\nA. x" + LETTER
    chinese = BENCHMARKS["mmbench_cn"]
    (tmp_path / "cn").mkdir()
    asked = prompts(chinese, mmbench_files(tmp_path / "cn", "mmbench_dev_cn_20231003.tsv"))
    assert asked[5] == "Q?\nA. x\n请直接回答选项字母。"


def test_mmbench_needs_every_turn_of_a_question(tmp_path: Path) -> None:
    mmbench = BENCHMARKS["mmbench"]
    mmbench_files(tmp_path)
    right = {row["index"]: row["answer"] for row in mmbench_rows()}
    for wrong, circular, first in (
        ({}, 100, 100),
        ({"2000007": "B"}, 66.6667, 100),
        ({"7": "C", "1000009": "(A)"}, 33.3333, 66.6667),
        # What is not read is not right: nothing is guessed.
        ({"1000007": "（C）"}, 66.6667, 100),
    ):
        rows: list[dict[str, object]] = [
            {"question_id": int(index), "text": text} for index, text in (right | wrong).items()
        ]
        scores = scored(mmbench, tmp_path, rows)
        assert scores.metrics is not None
        assert scores.metrics["circular_accuracy"] == circular, wrong
        assert scores.metrics["first_order_accuracy"] == first, wrong
        assert scores.unparsed == ("1000007" in wrong)
    assert set(scores.by_category) >= {"attribute", "category=fine logic"}


def test_mmbench_draws_pictures_and_counts_questions(tmp_path: Path) -> None:
    """Its three questions here are about one picture: of one there is nothing to draw."""
    mmbench = BENCHMARKS["mmbench"]
    items = mmbench.load(mmbench_files(tmp_path))
    assert len({item.group for item in items}) == 1
    rows: list[dict[str, object]] = [
        {"question_id": item.id, "text": "?" if item.id == "7" else item.truth} for item in items
    ]
    scores = scored(mmbench, tmp_path, rows)
    assert scores.metrics is not None and scores.metrics["circular_accuracy"] == 66.6667
    assert scores.interval["circular_accuracy"] == (66.6667, 66.6667)


@pytest.mark.parametrize(
    ("name", "lost", "all_right", "rest_wrong"),
    [
        # Question 7 lacks one of its three orders; the other two questions are right.
        ("mmbench", "2000007", 100, 100),
        # Image 0001 lacks one answer; in "existence" 3 or 2 of 3 are right, and image 0002 is.
        ("mme", "existence/0001/2", 400, 200 + 100 * 2 / 3 + 100),
    ],
)
def test_half_a_group_is_left_out_and_not_half_right(
    name: str, lost: str, all_right: float, rest_wrong: float, tmp_path: Path
) -> None:
    benchmark = BENCHMARKS[name]
    items = benchmark.load(FILES[name](tmp_path))
    groups = {item.id: item.extra.get("question", item.group) for item in items}
    rest = [item for item in items if item.id != lost]
    truths = {item.id: benchmark.truth_text(item) for item in rest}
    wrong = truths | {item.id: "?" for item in rest if groups[item.id] == groups[lost]}
    for said, expected in ((truths, all_right), (wrong, rest_wrong)):
        rows: list[dict[str, object]] = [
            {"question_id": name, "text": text} for name, text in said.items()
        ]
        scores = scored(benchmark, tmp_path, rows)
        assert scores.missing == 1 and scores.metrics is not None
        assert scores.metrics[benchmark.headline] == pytest.approx(expected, abs=1e-4)


def test_mmbench_takes_its_sheets(tmp_path: Path) -> None:
    mmbench = BENCHMARKS["mmbench"]
    mmbench_files(tmp_path)
    rows = [[int(row["index"]), row["answer"], "A"] for row in mmbench_rows()]
    path = tmp_path / "upload.xlsx"
    write_sheet(path, ("index", "prediction", "answer"), rows)
    scores = rescore(mmbench, tmp_path, path)
    assert scores.metrics is not None and scores.metrics["circular_accuracy"] == 100
    write_sheet(path, ("index", "prediction"), [[7, "B"], [9, None]])
    assert rescore(mmbench, tmp_path, path).missing == 5


def test_mmbench_pictures_are_written_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    mmbench = BENCHMARKS["mmbench"]
    items = mmbench.load(mmbench_files(tmp_path))
    assert not (tmp_path / "cache").exists()
    mmbench.prepare(items[1:2])
    # The second row names the picture of the first.
    assert items[0].image == items[1].image
    assert items[0].image is not None and items[0].image.read_bytes()[:2] == b"\xff\xd8"


# --- SEED-Bench and ScienceQA -------------------------------------------------------------------


def test_seed_bench_takes_the_very_letter(tmp_path: Path) -> None:
    seed = BENCHMARKS["seed_bench"]
    items = seed.load(seed_files(tmp_path))
    options = "".join(f"\n{letter}. option {letter.lower()}" for letter in "ABCD")
    assert items[0].prompt == "Which 0?" + options + LETTER
    said = {101: "A", 102: "B.", 103: "c", 104: "D", "v0": "B"}
    rows: list[dict[str, object]] = [
        {"question_id": name, "text": text} for name, text in said.items()
    ]
    scores = scored(seed, tmp_path, rows)
    assert scores.metrics == {"accuracy": 60, "image_accuracy": 50, "video_accuracy": 100}
    assert scores.unparsed == 2
    assert scores.by_category["Instance Identity"] == {"accuracy": 50, "n": 2}
    upload = [{"question_id": str(name), "prediction": text} for name, text in said.items()]
    assert scored(seed, tmp_path, list(upload)).metrics == scores.metrics
    images = seed.with_options({"part": "image"})
    assert scored(images, tmp_path, rows).metrics == {"accuracy": 50, "image_accuracy": 50}


def test_scienceqa_reads_llavas_files(tmp_path: Path) -> None:
    science = BENCHMARKS["scienceqa"]
    asked = "Context: C. is odd\nWhich?\nA. one\nB. two"
    rows = [
        {"id": "3", "image": "3/image.png", "conversations": [
            {"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": "B"}]},
        {"id": "4", "conversations": [
            {"from": "human", "value": "Q?\nA. x\nB. y\nC. z"}, {"from": "gpt", "value": "C"}]},
    ]  # fmt: skip
    dump(tmp_path / "scienceqa" / "llava_test_CQM-A.json", rows)
    items = science.load(tmp_path)
    assert [item.prompt for item in items] == [asked + LETTER, "Q?\nA. x\nB. y\nC. z" + LETTER]
    assert [item.extra["letters"] for item in items] == ["AB", "ABC"]
    result = {"acc": 50, "results": {"3": 1, "4": 0}, "outputs": {"3": "B", "4": "A"}}
    scores = rescore(science, tmp_path, dump(tmp_path / "result.json", result))
    assert scores.metrics == {"img_accuracy": 100, "accuracy": 50}
    answered = {"question_id": "3", "pred": "B", "question": f"<image>\n{asked}"}
    never = {"question_id": "4", "pred": "FAILED", "question": "Unknown"}
    output = {"correct": [answered], "incorrect": [never]}
    scores = rescore(science, tmp_path, dump(tmp_path / "output.jsonl", output))
    assert scores.metrics == {"img_accuracy": 100, "accuracy": 50} and scores.missing == 1


def test_pope_can_ask_for_a_version(tmp_path: Path) -> None:
    labels = pope_files(tmp_path) / "pope"
    labels.rename(tmp_path / "coco")
    assert len(BENCHMARKS["pope"].load(tmp_path)) == 12
    with pytest.raises(DataError, match="has 4 labels, asked for was the version with 2910"):
        BENCHMARKS["pope"].with_options({"labels": "2910"}).load(tmp_path)


def test_an_item_that_is_no_item_is_named(tmp_path: Path) -> None:
    seed_files(tmp_path)
    rows = [{"question_id": 101, "text": "A"}, {"question_id": 101, "text": "B"},
            {"question_id": 999, "text": "A"}]  # fmt: skip
    scores = scored(BENCHMARKS["seed_bench"], tmp_path, list(rows))
    assert scores.missing == 4 and scores.metrics is not None
    assert any("1 answers carry an id" in note for note in scores.notes)
    assert any("answered more than once" in note for note in scores.notes)


def test_truths_are_answers(tmp_path: Path) -> None:
    """The base rate answers with truths, so these must be what a model could have said."""
    for name, files in FILES.items():
        benchmark = BENCHMARKS[name]
        root = tmp_path / name
        root.mkdir()
        item: Item = benchmark.load(files(root))[0]
        assert benchmark.parse(benchmark.truth_text(item), item) is not None
