"""Scorers and parsers against hand-computed values of the official code, benchmark by benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_files import answers_to, dump, dump_lines, pope_files, science_files, vqa_files
from pumice.core.errors import DataError
from pumice.eval.answers import CONTRACTIONS, normalise, prepare, vqa_accuracy
from pumice.eval.benchmark import Item
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.benchmarks.detail import Mentions
from pumice.eval.benchmarks.refcoco import iou, padded_square_box
from pumice.eval.runner import rescore

SHORT = "\nAnswer the question using a single word or phrase."


# --- the VQA scorer -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("a,b", "b"),
        ("1,000", "1000"),
        ("1,000 red/blue", "1000 redblue"),
        ("3.", "3"),
        ("2.0", "2.0"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("." * 34, ".."),
        ("mcdonald's", "mcdonald's"),
        ("10:30", "10:30"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
        ("yes\nit is", "yes it is"),
        ("red\u00a0the car", "red car"),
        ("hot-dog", "hot dog"),
        ("hot -dog", "hot dog"),
    ],
)
def test_normalise_keeps_the_official_quirks(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_the_contraction_table_is_whole() -> None:
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["ow's'at"] == "'ow's'at"


@pytest.mark.parametrize(("votes", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_each_annotator_is_left_out_in_turn(votes: int, expected: float) -> None:
    truths = ["red"] * votes + [f"other {n}" for n in range(10 - votes)]
    assert vqa_accuracy(prepare("red", truths), truths) == pytest.approx(expected)


@pytest.mark.parametrize("answer", ["Yes", "yes.", "the yes", "yes,"])
def test_unanimous_annotators_switch_normalisation_off(answer: str) -> None:
    agreed = ["yes"] * 10
    assert vqa_accuracy(prepare(answer, agreed), agreed) == 0
    divided = ["yes"] * 9 + ["no"]
    assert vqa_accuracy(prepare(answer, divided), divided) == 1


# --- POPE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No", "no"),
        ("no.", "no"),
        (" No", "no"),
        ("Yes, it is not", "no"),
        ("Yes; not hidden", "no"),
        ("Yes. There is no dog", "yes"),
        ("NO", "yes"),
        ("no!", "yes"),
        ("None", "yes"),
        ("nope", "yes"),
        ("There isn't", "yes"),
        ("", "yes"),
        ("no\nthing", "yes"),
    ],
)
def test_pope_reads_answers_as_llava_does(text: str, expected: str) -> None:
    item = Item("random/1", None, "", "yes", "image", "random")
    assert BENCHMARKS["pope"].parse(text, item) == expected


def test_pope_asks_and_scores_per_category(tmp_path: Path) -> None:
    pope = BENCHMARKS["pope"]
    items = pope.load(pope_files(tmp_path))
    assert items[0].prompt == "Is there a adversarial thing 1 in the image?" + SHORT
    # An absent image is no reason to stop: the item keeps its place and fails alone.
    assert items[0].image == tmp_path / "val2014" / "COCO_val2014_000000000000.jpg"
    wrong = {"random/1", "random/2"}
    rows = answers_to(
        items,
        lambda item: {"yes": "No", "no": "Yes"}[item.truth] if item.id in wrong else item.truth,
    )
    scores = rescore(pope, tmp_path, dump_lines(tmp_path / "answers.jsonl", rows))
    assert scores.by_category["random"] == {
        **{"f1": 50, "accuracy": 50, "precision": 50, "recall": 50, "yes_ratio": 50},
        **{"tp": 1, "fp": 1, "tn": 1, "fn": 1, "n": 4},
    }
    assert scores.metrics is not None
    assert scores.metrics["mean_f1"] == pytest.approx((100 + 100 + 50) / 3, abs=1e-4)
    assert scores.base_rate["mean_f1"] == pytest.approx(200 / 3, abs=1e-4)
    assert (scores.n, scores.missing, scores.errors, scores.unparsed) == (12, 0, 0, 0)


def test_pope_takes_llavas_ids_in_any_order(tmp_path: Path) -> None:
    pope = BENCHMARKS["pope"]
    items = pope.load(pope_files(tmp_path))
    offsets = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
    rows = [
        {
            "question_id": offsets[item.category] + int(item.extra["question_id"]),
            "text": item.truth,
            "prompt": item.prompt,
        }
        for item in reversed(items)
    ]
    scores = rescore(pope, tmp_path, dump_lines(tmp_path / "merge.jsonl", rows))
    assert scores.metrics is not None
    assert scores.metrics["mean_f1"] == 100


def test_pope_takes_plain_ids_of_one_category(tmp_path: Path) -> None:
    pope = BENCHMARKS["pope"]
    rows = [{"question_id": n, "text": "yes" if n % 2 else "no"} for n in range(1, 5)]
    alone = pope_files(tmp_path / "alone", {"random": 4})
    scores = rescore(pope, alone, dump_lines(tmp_path / "answers.jsonl", rows))
    assert scores.metrics is not None and scores.metrics["mean_f1"] == 100
    # With all three label files the category column says which one is meant.
    every = pope_files(tmp_path / "every")
    for row in rows:
        row["category"] = "popular"
    scores = rescore(pope, every, dump_lines(tmp_path / "answers.jsonl", rows), allow_errors=True)
    assert list(scores.by_category) == ["popular"] and scores.missing == 8


def test_a_category_of_pope_that_is_not_there_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The mean of two categories is no POPE score, though it looks like one."""
    BENCHMARKS["pope"].load(pope_files(tmp_path))
    assert not caplog.records
    (tmp_path / "pope" / "coco_pope_adversarial.json").unlink()
    BENCHMARKS["pope"].load(tmp_path)
    assert "no label file of adversarial" in caplog.text


def test_pope_refuses_ids_that_could_be_any_category(tmp_path: Path) -> None:
    rows = [{"question_id": n % 4 + 1, "text": "yes"} for n in range(12)]
    with pytest.raises(DataError, match="category"):
        rescore(BENCHMARKS["pope"], pope_files(tmp_path), dump_lines(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("with_prompts", [True, False])
def test_pope_never_scores_answers_against_another_label_version(
    tmp_path: Path, with_prompts: bool
) -> None:
    """2,910 answers against 3,000 labels: equal ids, shifted questions."""
    pope = BENCHMARKS["pope"]
    items = pope.load(pope_files(tmp_path, {"random": 10}))
    rows: list[dict[str, object]] = []
    for number, item in enumerate(items[1:], start=1):
        row: dict[str, object] = {"question_id": 10_000_000 + number, "text": item.truth}
        rows.append({**row, "prompt": item.prompt} if with_prompts else row)
    scores = rescore(pope, tmp_path, dump_lines(tmp_path / "merge.jsonl", rows))
    assert scores.withheld and scores.missing == (10 if with_prompts else 1)
    assert any("10 labels" in note for note in scores.notes)
    assert with_prompts == any("another question" in note for note in scores.notes)


# --- VQAv2 and ScienceQA ------------------------------------------------------------------------


def test_vqav2_scores_per_question_type_beside_its_base_rate(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    items = vqa.load(vqa_files(tmp_path))
    assert items[0].prompt == "what color 0?" + SHORT
    assert items[0].image == tmp_path / "val2014" / "COCO_val2014_000000000001.jpg"
    rows = answers_to(items, lambda item: "It is red" if "color" in item.prompt else "Two.")
    scores = rescore(vqa, tmp_path, dump_lines(tmp_path / "answers.jsonl", rows))
    assert scores.metrics == {
        "accuracy": 33.33,
        "mean_over_question_types": 33.33,
        "answer_words": 1.67,
    }
    assert scores.by_category["how many"]["accuracy"] == 100
    assert scores.by_category["answer_type=yes/no"]["accuracy"] == 0
    assert scores.base_rate["accuracy"] == 100


def test_vqav2_counts_missing_answers_as_wrong(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    items = vqa.load(vqa_files(tmp_path))
    official = [
        {"question_id": int(item.id), "answer": item.extra["most_frequent"]} for item in items[:6]
    ]
    scores = rescore(vqa, tmp_path, dump(tmp_path / "results.json", official))
    assert scores.metrics is not None and scores.metrics["accuracy"] == 50
    assert scores.missing == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B. b", "B"),
        ("The answer is B.", "B"),
        ("The answer is B, since", "B"),
        ("The answer is B", None),
        ("The answer is B. The answer is A.", None),
        ("D", None),
        ("A.", None),
        ("(A)", None),
        ("a", None),
        ("A: x", None),
        ("A) x", None),
        ("", None),
        ("AB", None),
    ],
)
def test_scienceqa_reads_letters_as_llava_does(text: str, expected: str | None) -> None:
    item = Item("1", None, "", "B", "1", extra={"letters": "ABC"})
    assert BENCHMARKS["scienceqa"].parse(text, item) == expected


def test_scienceqa_prompt_and_image_share(tmp_path: Path) -> None:
    science = BENCHMARKS["scienceqa"]
    items = science.load(science_files(tmp_path))
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert items[0].prompt == "Context: Look.\nWhich one?\nA. a\nB. b\nC. c" + letter
    assert items[1].prompt == "Which one?\nA. a\nB. b\nC. c" + letter and items[1].image is None
    rows = [
        {"question_id": "3", "text": "B", "prompt": "<image>\n" + items[0].prompt},
        {"question_id": "7", "text": "no idea", "prompt": items[1].prompt},
    ]
    scores = rescore(science, tmp_path, dump_lines(tmp_path / "answers.jsonl", rows))
    # The missing one has an image: wrong in the total, absent from the image share.
    assert scores.metrics == {"img_accuracy": 100, "accuracy": 33.3333}
    assert (scores.unparsed, scores.missing) == (1, 1)


# --- boxes and descriptions ---------------------------------------------------------------------


def test_boxes_move_to_the_padded_square() -> None:
    assert padded_square_box([10, 20, 30, 40], 100, 50) == pytest.approx((0.1, 0.45, 0.4, 0.85))
    assert padded_square_box([0, 0, 50, 100], 50, 100) == pytest.approx((0.25, 0, 0.75, 1))
    assert iou((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert iou((0.5, 0.5, 0.2, 0.2), (0, 0, 1, 1)) == 0


def test_refcoco_counts_an_answer_without_a_box_as_zero(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}],
        "annotations": [
            {"id": n, "image_id": 1, "bbox": [0, 0, 50, 50], "caption": f"the left one {n}"}
            for n in range(4)
        ],
    }
    dump(tmp_path / "refcoco" / "refcoco_val.json", content)
    said = [
        "It is at [0.00, 0.25, 0.50, 0.75].",
        "[0, 1, 2] and [0.0, 0.25, 0.25, 0.75]",
        "on the left",
        "[12, 40, 30, 80]",
    ]
    rows = [{"question_id": n, "text": text} for n, text in enumerate(said)]
    refcoco = BENCHMARKS["refcoco"]
    scores = rescore(refcoco, tmp_path, dump_lines(tmp_path / "answers.jsonl", rows))
    assert scores.metrics == {"acc@0.5": 50, "mean_iou": 37.5}
    assert scores.unparsed == 2
    assert refcoco.load(tmp_path)[0].prompt == (
        "Please provide the bounding box coordinate of the region this sentence describes: "
        "the left one 0."
    )


def test_object_names_are_whole_words_and_longest_first() -> None:
    mentions = Mentions(["dog", "hot dog", "bus", "car", "person"])
    assert mentions("Two hot dogs; buses, and a Car's carpet.") == ["bus", "car", "hot dog"]
    assert Mentions(["fire", "fire hydrant"])("a fire hydrant") == ["fire hydrant"]
    assert mentions("a DOG, dogs and a doghouse") == ["dog"]


def test_detail_counts_each_category_once(tmp_path: Path) -> None:
    names = ["dog", "car", "cat"]
    instances = {
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "images": [{"id": 5, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 5, "category_id": c} for c in (0, 0, 2)],
    }
    dump(tmp_path / "coco" / "annotations" / "instances_val2014.json", instances)
    questions = [{"question_id": 1, "image": "a.jpg", "text": "Describe the image."}]
    dump_lines(tmp_path / "detail" / "questions.jsonl", questions)
    rows = [{"question_id": 1, "text": "A dog, another dog and a car."}]
    detail = BENCHMARKS["detail"]
    scores = rescore(detail, tmp_path, dump_lines(tmp_path / "answers.jsonl", rows))
    assert scores.metrics == {
        **{"f1": 50, "precision": 50, "recall": 50, "chair_i": 50, "chair_s": 100},
        "words": 7,
    }
