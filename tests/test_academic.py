"""data/academic: each source's rules on small official files, and every source on the world's."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from academic_files import TOKENIZER, WORLD, annotations, make
from conftest import Run
from eval_files import dump
from pumice.core.errors import DataError, PumiceError
from pumice.core.files import sha256_file
from pumice.data.academic import CONVERTERS
from pumice.data.academic.convert import convert, report_path
from pumice.data.academic.regions import framed_box
from pumice.data.sources import LlavaJson
from pumice.processing.response_formats import BRIEF_INSTRUCTIONS, CAPTION, LETTER, SHORT

Turns = list[str]


def made(
    tmp_path: Path, source: str, *contents: Any, **rules: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and report of official contents."""
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / f"{number}.json")
        dump(files[-1], content)
    out = tmp_path / "rows.json"
    report = convert(source, files, out, rules={k: str(v) for k, v in rules.items()})
    return json.loads(out.read_text("utf-8")), report


def turns(row: dict[str, Any]) -> Turns:
    return [turn["value"] for turn in row["conversations"]]


# Questions with ten annotators


def vqa(*asked: tuple[int, str, list[str], str | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    questions, told = [], []
    for number, (image, text, answers, official) in enumerate(asked):
        ids = {"image_id": image, "question_id": number}
        questions.append({**ids, "question": text})
        told.append({**ids, "answers": [{"answer": answer} for answer in answers]})
        if official is not None:
            told[-1]["multiple_choice_answer"] = official
    return {"questions": questions}, {"annotations": told}


def test_questions_of_an_image_are_one_row_and_the_first_asks_for_the_format(
    tmp_path: Path,
) -> None:
    files = vqa(
        (9, "What is it? ", ["cat"] * 7 + ["dog"] * 3, None),
        (33471, "Is it red?", ["no"] * 10, "no"),
        (9, "Where?", ["on the mat"] * 10, None),
    )
    rows, report = made(tmp_path, "vqav2", *files)
    assert rows == [
        {
            "id": "000000000009",
            "image": "coco/train2017/000000000009.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is it?\n{SHORT}"},
                {"from": "gpt", "value": "Cat"},
                {"from": "human", "value": "Where?"},
                {"from": "gpt", "value": "On the mat"},
            ],
        },
        {
            "id": "000000033471",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\nIs it red?\n{SHORT}"},
                {"from": "gpt", "value": "No"},
            ],
        },
    ]
    assert (report["read"], report["rows"], report["rounds"]) == (3, 2, 3)
    assert (report["dropped"], report["changed"]) == ({}, {})


@pytest.mark.parametrize(
    ("answers", "official", "wanted", "ties"),
    [
        (["b", "a", "a", "b"], None, "b", 1),
        (["b", "a", "a", "b"], "a", "a", 1),
        # The official choice has no say where the annotators are clear.
        (["b", "b", "a"], "a", "b", 0),
        (["no", "yes", "no", "yes"], "yes", "yes", 1),
        (["unanswerable"] * 6 + ["cat"] * 4, None, "unanswerable", 0),
        (["", "", "", "cat", "cat"], None, "cat", 0),
        (["2", "two"], "maybe", "2", 1),
    ],
)
def test_most_annotators_win_and_ties_go_as_the_set_says(
    tmp_path: Path, answers: list[str], official: str | None, wanted: str, ties: int
) -> None:
    rows, report = made(tmp_path, "vqav2", *vqa((1, "?", answers, official)), capitalise="false")
    assert turns(rows[0])[1] == wanted
    assert report["changed"].get("answers drawn level; one was taken", 0) == ties


def test_rules_of_questions(tmp_path: Path) -> None:
    files = vqa(*((1, f"q{n}?", ["a"], None) for n in range(3)))
    assert made(tmp_path, "okvqa", *files)[1]["rows"] == 1
    rows, _ = made(tmp_path, "okvqa", *files, rounds=2, format_place="every", format="none")
    assert [(row["id"], turns(row)) for row in rows] == [
        ("000000000001-1", ["<image>\nq0?", "A", "q1?", "A"]),
        ("000000000001-2", ["<image>\nq2?", "A"]),
    ]
    rows, _ = made(tmp_path, "okvqa", *files, merge="no", image="{image_id}.png")
    assert [(row["id"], row["image"]) for row in rows] == [(str(n), "1.png") for n in range(3)]
    rows, _ = made(tmp_path, "okvqa", *files, format_place="every")
    assert turns(rows[0])[2] == f"q1?\n{SHORT}"


def test_nothing_is_left_out_unsaid(tmp_path: Path) -> None:
    asked, told = vqa(
        (1, "ok?", ["a"], None), (1, "", ["a"], None), (1, "?", [""], None), (1, "?", ["a"], None)
    )
    told["annotations"][3]["question_id"] = 77
    rows, report = made(tmp_path, "vqav2", asked, told)
    assert len(rows) == 1 and report["read"] == 5
    assert report["dropped"] == {
        "question without text": 1,
        "question without answer": 1,
        "question without annotation": 1,
        "annotation without question": 1,
    }


def test_gqa_asks_balanced_questions(tmp_path: Path) -> None:
    entry = {"question": "Is it?", "imageId": "n1", "answer": "no", "fullAnswer": "No, it is not."}
    content = {"1": {**entry, "isBalanced": True}, "2": {**entry, "isBalanced": False}}
    rows, report = made(tmp_path, "gqa", content)
    assert rows[0]["image"] == "gqa/images/n1.jpg" and report["rounds"] == 1
    assert report["dropped"] == {"question that is not balanced": 1}
    rows, report = made(tmp_path, "gqa", content, balanced="false", answer="fullAnswer")
    assert turns(rows[0])[1::2] == ["No, it is not."] * 2


def test_choices_are_rotated_and_the_letter_moves_along(tmp_path: Path) -> None:
    problem = {"image_id": 5, "question_id": "x", "question": "Which?", "choices": list("wxyz"),
               "correct_choice_idx": 1}  # fmt: skip
    rows, report = made(tmp_path, "aokvqa", [problem])
    assert report["rows"] == 4 and len({row["id"] for row in rows}) == 4
    assert turns(rows[0]) == [f"<image>\nWhich?\nA. w\nB. x\nC. y\nD. z\n{LETTER}", "B"]
    assert [turns(row)[1] for row in rows] == ["B", "A", "D", "C"]
    for row in rows:
        asked, letter = turns(row)
        assert f"{letter}. x" in asked.split("\n")
    assert len({turns(row)[0] for row in rows}) == 4
    assert made(tmp_path, "aokvqa", [problem], rotations=2)[1]["rows"] == 2
    # Two choices have two orders; asking the other two again would only repeat them.
    few = {**problem, "image_id": 6, "choices": ["yes", "no"], "correct_choice_idx": 0}
    assert made(tmp_path, "aokvqa", [problem, few])[1]["rows"] == 6


def test_covers_are_drawn_by_the_seed(tmp_path: Path) -> None:
    cover = {"questions": ["Who?", "Is it?"], "answers": ["Donna", "No"], "split": 1}
    content = {f"{n:03}": cover for n in range(50)} | {"x": {**cover, "split": 2}}
    rows, report = made(tmp_path, "ocrvqa", content, sample=20)
    assert report["rows"] == 20 and rows[0]["image"].startswith("ocr_vqa/images/0")
    assert report["dropped"] == {
        "question of another split": 2, "row not among the 20 drawn": 30,
    }  # fmt: skip
    assert turns(rows[0]) == [f"<image>\nWho?\n{SHORT}", "Donna", "Is it?", "No"]
    assert made(tmp_path, "ocrvqa", content, sample=20)[0] == rows
    assert made(tmp_path, "ocrvqa", content, sample=20, seed=1)[0] != rows
    assert made(tmp_path, "ocrvqa", content)[1]["rows"] == 50


def test_textcaps_shows_the_words_that_were_read(tmp_path: Path) -> None:
    captions = {"data": [{"image_id": i, "caption_str": c} for i, c in
                         (("a", "one "), ("a", "two"), ("b", "three"), ("c", ""))]}  # fmt: skip
    words = {"data": [{"image_id": "a", "ocr_tokens": ["STOP", "10"]}]}
    rows, report = made(tmp_path, "textcaps", captions, words)
    assert [turns(row) for row in rows] == [
        [f"<image>\n{CAPTION}\nReference OCR token: STOP, 10", "one"],
        [f"<image>\n{CAPTION}\nReference OCR token: ", "three"],
    ]
    assert rows[0]["image"] == "textvqa/train_images/a.jpg"
    assert report["dropped"] == {"further caption of an image": 1, "empty caption": 1}
    assert report["changed"] == {"image without OCR tokens": 2}
    rows, _ = made(tmp_path, "textcaps", captions, ocr="false", captions="each")
    assert [row["id"] for row in rows] == ["a-1", "a-2", "b"]
    assert turns(rows[0])[0] == f"<image>\n{CAPTION}"
    with pytest.raises(DataError, match="Rosetta"):
        made(tmp_path, "textcaps", captions)


# Regions


@pytest.mark.parametrize(
    ("size", "box", "wanted"),
    [
        # Twice as wide as high: a quarter of the square lies above.
        ((200, 100), (0, 0, 200, 100), (0, 0.25, 1, 0.75)),
        ((100, 200), (50, 100, 50, 100), (0.5, 0.5, 0.75, 1)),
        ((100, 100), (10, 20, 30, 40), (0.1, 0.2, 0.4, 0.6)),
        # An odd rest: the padding is whole pixels, as `pad_square` puts it.
        ((5, 2), (0, 0, 5, 2), (0, 0.2, 1, 0.6)),
    ],
)
def test_boxes_lie_in_the_padded_square(
    size: tuple[int, int], box: tuple[int, ...], wanted: tuple[float, ...]
) -> None:
    assert framed_box(box, size, "padded") == pytest.approx(wanted)
    x, y, width, height = box
    inside = (x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1])
    assert framed_box(box, size, "image") == pytest.approx(inside)


def genome(*regions: tuple[str, int, int, int, int]) -> tuple[list[Any], list[Any]]:
    told = [dict(zip(("phrase", "x", "y", "width", "height"), r, strict=True)) for r in regions]
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/7.jpg"
    return (
        [{"id": 7, "regions": told}],
        [{"image_id": 7, "width": 200, "height": 100, "url": url}],
    )


def test_genome_draws_ten_regions_and_asks_both_ways(tmp_path: Path) -> None:
    files = genome(*((f"thing {n}.", n, n, 50, 50) for n in range(40)))
    rows, report = made(tmp_path, "vg", *files)
    assert len(rows) == 1 and rows[0]["image"] == "vg/VG_100K_2/7.jpg"
    assert report["rounds"] == 10
    assert report["dropped"] == {"region beyond the 10 drawn of an image": 30}
    assert made(tmp_path, "vg", *files)[0] == rows
    assert made(tmp_path, "vg", *files, seed=1)[0] != rows
    rows, report = made(tmp_path, "vg", *files, over="segment", rounds=30)
    assert [len(row["conversations"]) for row in rows] == [60, 20]
    kinds: Counter[str] = Counter()
    for row in rows:
        for asked, answer in zip(turns(row)[::2], turns(row)[1::2], strict=True):
            kinds["phrase" if "short description" in asked else "box"] += 1
            box, phrase = (asked, answer) if "short description" in asked else (answer, asked)
            number = int(phrase.rsplit("thing ", 1)[1].strip("."))
            corners = (number, number + 50, number + 50, number + 100)
            assert ", ".join(f"{corner / 200:.2f}" for corner in corners) in box
            assert ".." not in phrase
    assert min(kinds.values()) > 8
    one_way, _ = made(tmp_path, "vg", *files, direction="box")
    assert all("bounding box" in text for text in turns(one_way[0])[::2])


def test_boxes_outside_are_cut_or_dropped_and_counted(tmp_path: Path) -> None:
    files = genome(("in", 0, 0, 9, 9), ("over", 190, 0, 30, 50), ("gone", 200, 0, 9, 9),
                   ("flat", 5, 5, 0, 9), ("", 0, 0, 9, 9))  # fmt: skip
    rows, report = made(tmp_path, "vg", *files, direction="box")
    assert turns(rows[0])[3] == "[0.95, 0.25, 1.00, 0.50]"
    assert report["changed"] == {"box reached out of the picture and was cut": 1}
    assert report["dropped"] == {
        "box without area in the picture": 2, "region without phrase": 1,
    }  # fmt: skip


def refs(count: int) -> tuple[list[Any], dict[str, Any]]:
    said = [
        {"ann_id": n, "image_id": 1, "split": "train" if n else "val",
         "sentences": [{"sent": f"left {n}"}, {"sent": f"the one {n}"}]}
        for n in range(count)
    ]  # fmt: skip
    boxes = [{"id": n, "image_id": 1, "bbox": [n, 0.5, 10, 10]} for n in range(count)]
    return said, {"annotations": boxes, "images": [{"id": 1, "width": 64, "height": 64}]}


def test_refcoco_reads_its_pickle_and_cuts_long_rows(tmp_path: Path) -> None:
    said, boxes = refs(11)
    rows, report = made(tmp_path, "refcoco", said, boxes)
    assert [len(row["conversations"]) // 2 for row in rows] == [9, 9, 2]
    assert [row["id"] for row in rows] == [f"000000000001-{n}" for n in (1, 2, 3)]
    assert all(turns(row)[0].startswith("<image>\nPlease provide") for row in rows)
    assert report["dropped"] == {"phrase of another split": 2}
    pickled = tmp_path / "refs(unc).p"
    for protocol in (0, 2):
        pickled.write_bytes(pickle.dumps(said, protocol=protocol))
        convert("refcoco", [tmp_path / "1.json", pickled], tmp_path / "p.json")
        assert json.loads((tmp_path / "p.json").read_text()) == rows
    # Written by Python 2: texts are bytes.
    pickled.write_bytes(b"(lp0\n(dp1\nS'split'\np2\nS'train'\np3\nsS'ann_id'\np4\nI1\nsS'image_id'"
                        b"\np5\nI1\nsS'sentences'\np6\n(lp7\n(dp8\nS'sent'\np9\nS'caf\\xe9'\np10"
                        b"\nsasa.")  # fmt: skip
    convert("refcoco", [tmp_path / "1.json", pickled], tmp_path / "p.json",
            rules={"direction": "phrase"})  # fmt: skip
    assert turns(json.loads((tmp_path / "p.json").read_text("utf-8"))[0])[1] == "café"


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="nothing else is read from a pickle"):
        convert("refcoco", [path], tmp_path / "out.json")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.json").exists()


# Text


def dialogue(*texts: str, first: str = "human", name: str = "d") -> dict[str, Any]:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return {
        "id": name,
        "conversations": [
            {"from": speakers[number % 2], "value": text} for number, text in enumerate(texts)
        ],
    }


def test_dialogues_are_cleaned_and_every_fault_is_counted(tmp_path: Path) -> None:
    twice = dialogue("a", "b", "c", "d")
    twice["conversations"].insert(1, {"from": "human", "value": "again"})
    stranger = dialogue("a", "b")
    stranger["conversations"][1]["from"] = "alien"
    code = "<pre><span>bash</span><button>Copy code</button><code>ls -l\n</code></pre>"
    page = f"<div class='x'><p>Use <code>ls</code>:</p>{code}<p>1 / 2</p></div>"
    rows, report = made(
        tmp_path, "sharegpt", [
            dialogue("hi", "ho"),
            dialogue("welcome", "hi", "ho", first="gpt"),
            dialogue("hi", "ho", "and?"),
            dialogue("only a question"),
            twice,
            stranger,
            dialogue("hi", " "),
            dialogue("hi", "1111111111"),
            dialogue("hi", "so:\n1. one\n1. one again"),
            dialogue("how?", page),
        ], max_tokens="null",
    )  # fmt: skip
    assert [turns(row) for row in rows[:3]] == [["hi", "ho"]] * 3
    assert turns(rows[3])[1] == "Use `ls`:\n\n```bash\nls -l\n```"
    assert "image" not in rows[0] and report["read"] == 10 == len(rows) + sum(
        report["dropped"].values()
    )
    assert report["dropped"] == {
        "dialogue without a round": 1,
        "dialogue whose turns do not alternate": 1,
        "dialogue with an unknown speaker": 1,
        "dialogue with an empty turn": 1,
        "dialogue with a digit nine times in a row": 1,
        "dialogue whose lists lost their numbers": 1,
    }
    assert report["changed"] == {
        "turns before the first question were left out": 1,
        "last question had no answer and was left out": 1,
        "web page became Markdown": 1,
    }


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({}, ["en", "ko", "mixed"]),
        ({"keep_scripts": "latin"}, ["en", "mixed"]),
        ({"keep_scripts": "latin", "script_share": "0.9"}, ["en"]),
        ({"keep_scripts": "hangul,latin", "script_share": "0.9"}, ["en", "ko", "mixed"]),
        ({"skip_scripts": "hangul"}, ["en", "mixed"]),
        ({"skip_scripts": "hangul", "script_share": "0.1"}, ["en"]),
    ],
)
def test_dialogues_are_kept_and_skipped_by_script(
    tmp_path: Path, rules: dict[str, str], left: list[str]
) -> None:
    content = [
        dialogue("Who are you?", "A cat.", name="en"),
        dialogue("누구세요?", "저는 고양이입니다.", name="ko"),
        dialogue("Print hello, please", "print('안녕하세요')", name="mixed"),
    ]
    rows, report = made(tmp_path, "sharegpt", content, max_tokens="null", **rules)
    assert [row["id"] for row in rows] == left
    assert sum(report["dropped"].values()) == 3 - len(left)
    with pytest.raises(PumiceError, match="script 'korean' is unknown"):
        made(tmp_path, "sharegpt", content, max_tokens="null", skip_scripts="korean")


def test_long_dialogues_are_cut_and_not_split(tmp_path: Path) -> None:
    words = " ".join(["the shape is red."] * 12)
    content = [
        dialogue(*["What is it?", words] * 4, name="long"),
        dialogue("What is it?", " ".join([words] * 9), name="wide"),
        dialogue(" ".join([words] * 9), "Red.", name="asked"),
    ]
    settings = {"tokenizer": TOKENIZER, "max_tokens": 200}
    rows, report = made(tmp_path, "sharegpt", content, **settings)
    assert [row["id"] for row in rows] == ["long", "wide"]
    long, wide = (turns(row) for row in rows)
    assert long == ["What is it?", words] * (len(long) // 2) and 2 <= len(long) < 8
    assert " ".join([words] * 9).startswith(wide[1]) and len(wide[1]) > 100
    assert report["changed"] == {
        "dialogue cut after the last round that fits": 1, "dialogue cut inside an answer": 1,
    }  # fmt: skip
    assert report["dropped"] == {"dialogue whose first question alone is too long": 1}
    # As training counts: what is written fits, one word more does not.
    more = dialogue("What is it?", wide[1] + " the shape")
    assert made(tmp_path, "sharegpt", [dialogue(*wide)], **settings)[1]["changed"] == {}
    assert made(tmp_path, "sharegpt", [more], **settings)[1]["changed"] != {}
    inside, _ = made(tmp_path, "sharegpt", content[:1], **settings, cut="token")
    cut = turns(inside[0])
    assert cut[: len(long)] == long and len(cut) == len(long) + 2 and words.startswith(cut[-1])
    with pytest.raises(PumiceError, match="tokenizer=DIR"):
        made(tmp_path, "sharegpt", content)


def test_scienceqa_is_written_as_the_reference_writes_it(tmp_path: Path) -> None:
    problem = {"question": "Which one?", "hint": "", "choices": ["a  b", "c"], "answer": 1,
               "image": None, "lecture": "A lecture.", "solution": ""}  # fmt: skip
    shown = {**problem, "hint": "Look.", "image": "image.png", "solution": "So."}
    problems = {"1": problem, "2": shown, "3": problem}
    splits = {"train": ["2", "1"], "val": [], "test": ["3"]}
    rows, report = made(tmp_path, "scienceqa", problems, splits)
    assert turns(rows[1]) == [
        "Which one?\nContext: N/A\nOptions: (A) a b (B) c", "A lecture. The answer is B.",
    ]  # fmt: skip
    assert rows[0]["image"] == "train/2/image.png" and "image" not in rows[1]
    assert turns(rows[0]) == [
        "Which one?\nContext: Look.\nOptions: (A) a b (B) c\n<image>",
        "A lecture. So. The answer is B.",
    ]
    assert report["dropped"] == {"problem of another split": 1}
    rows, _ = made(tmp_path, "scienceqa", problems, splits, style="letter")
    assert turns(rows[0]) == [f"<image>\nContext: Look.\nWhich one?\nA. a b\nB. c\n{LETTER}", "B"]


def test_llava_files_keep_their_words_and_lose_empty_answers(tmp_path: Path) -> None:
    row = {**dialogue("<image>\nWhat?", "", "And?", "A cat."), "image": "000000033471.jpg"}
    late = {**dialogue("What?\n<image>", "A dog."), "image": "2.jpg"}
    rows, report = made(tmp_path, "llava-instruct", [row, late, dialogue("Hi", "")])
    assert rows[0]["image"] == "coco/train2017/000000033471.jpg"
    assert [turns(entry) for entry in rows] == [
        ["<image>\nAnd?", "A cat."], ["What?\n<image>", "A dog."],
    ]  # fmt: skip
    assert report["changed"] == {"round without answer was left out": 2}
    assert report["dropped"] == {"row without any answer": 1}


def test_lcs_from_its_table_and_as_published(tmp_path: Path) -> None:
    table = [{"id": f"{n}", "image": f"00453/{n}.jpg", "blip_caption": f"cat {n}"}
             for n in range(60)]  # fmt: skip
    rows, report = made(tmp_path, "lcs558k", [*table, {**table[0], "blip_caption": " "}])
    assert report["dropped"] == {"empty caption": 1} and rows[3]["image"] == "00453/3.jpg"
    asked = [turns(row)[0] for row in rows]
    fronts = sum(text.startswith("<image>\n") for text in asked)
    assert 15 < fronts < 45 and all(text.count("<image>") == 1 for text in asked)
    said = {text.replace("<image>", "").strip() for text in asked}
    assert said <= set(BRIEF_INSTRUCTIONS) and len(said) > 8
    assert made(tmp_path, "lcs558k", rows)[0] == rows


def test_what_is_drawn_of_an_image_does_not_depend_on_the_others(tmp_path: Path) -> None:
    table = [{"id": f"{n}", "image": f"{n}.jpg", "blip_caption": f"cat {n}"} for n in range(40)]
    assert made(tmp_path, "lcs558k", table)[0][1::2] == made(tmp_path, "lcs558k", table[1::2])[0]
    notes = [{"image_id": n % 40, "id": n, "caption": f"cat {n}"} for n in range(120)]
    some = [note for note in notes if note["image_id"] % 2]
    every, half = (
        made(tmp_path, "coco-captions", {"annotations": part}, captions="random")[0]
        for part in (notes, some)
    )
    assert (
        every[1::2] == half and every != made(tmp_path, "coco-captions", {"annotations": notes})[0]
    )


# Faults


@pytest.mark.parametrize(
    ("source", "contents", "told"),
    [
        ("vqav2", [{"questions": [{"image_id": 1}]}, {"annotations": []}],
         r"0\.json, question 0: 'question_id' is needed, given \['image_id'\]"),
        ("vqav2", [{"questions": []}], "none of the files .* has 'annotations'"),
        ("vqav2", list(vqa((1, "?", ["a"], None))) + [{"questions": []}], "2 of the files"),
        ("gqa", [[1]], "an object .* is needed"),
        ("gqa", [{"7": {"question": 3, "imageId": "a", "answer": "b"}}],
         "question 7: 'question' is 3; str is needed"),
        ("aokvqa", [[{"image_id": 1, "question_id": "x", "question": "?", "choices": ["a"],
                      "correct_choice_idx": 1}]], "1 of 1 choices"),
        ("ocrvqa", [{"a": {"questions": ["?"], "answers": [], "split": 1}}],
         "1 questions and 0 answers"),
        ("refcoco", [refs(2)[0]], "instances.json is missing"),
        ("refcoco", [refs(3)[0], refs(2)[1]], r"box \(2\) or its image"),
        ("vg", [genome(("a", 0, 0, 1, 1))[0]], "image_data.json"),
        ("scienceqa", [{"train": ["1"]}, {}], "problem 1 of train is not in"),
        ("llava-instruct", [[dialogue("<image>\nhi", "ho")]], "1 <image> and 0 images"),
        ("llava-instruct", [[dialogue("hi", "ho", first="gpt")]], "must alternate"),
        ("lcs558k", [[{"id": "1"}]], "'image' is needed"),
        ("sharegpt", [[{"id": "1", "conversations": "x"}]], "list is needed"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path: Path, source: str, contents: Any, told: str) -> None:
    rules = {"max_tokens": "null"} if source == "sharegpt" else {}
    with pytest.raises(DataError, match=told):
        made(tmp_path, source, *contents, **rules)
    assert not (tmp_path / "rows.json").exists()


def test_answers_of_another_release_are_refused(tmp_path: Path) -> None:
    asked, told = vqa((1, "?", ["a"], None))
    told["annotations"][0]["image_id"] = 2
    with pytest.raises(DataError, match="of one release"):
        made(tmp_path, "vqav2", asked, told)
    told["annotations"] *= 2
    with pytest.raises(DataError, match="answered before"):
        made(tmp_path, "vqav2", asked, told)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"ruonds": "5"}, "'ruonds' is unknown.*Did you mean 'rounds'"),
        ({"rounds": "0"}, "rule rounds of vqav2 is '0'"),
        ({"format_place": "last"}, "'first' or 'every'"),
        ({"format": "shrt"}, "Did you mean 'short'"),
        ({"image": "{name}.jpg"}, r"\{image_id\}"),
    ],
)
def test_wrong_rules_are_named(tmp_path: Path, rules: dict[str, str], told: str) -> None:
    with pytest.raises(PumiceError, match=told):
        made(tmp_path, "vqav2", *vqa((1, "?", ["a"], None)), **rules)


def test_missing_images(tmp_path: Path) -> None:
    asked, told = vqa((1, "?", ["a"], None), (2, "?", ["a"], None))
    made(tmp_path, "vqav2", asked, told, image="{image_id}.jpg")
    files, images = [tmp_path / "0.json", tmp_path / "1.json"], tmp_path / "images"
    images.mkdir()
    (images / "1.jpg").touch()
    out, rules = tmp_path / "out.jsonl", {"image": "{image_id}.jpg"}
    with pytest.raises(DataError, match=r"1 rows name an image .*2\.jpg"):
        convert("vqav2", files, out, images=images, rules=rules)
    report = convert("vqav2", files, out, images=images, rules=rules, missing_images="drop")
    assert report["rows"] == 1 and report["dropped"] == {"row whose image is missing": 1}
    assert len(out.read_text().splitlines()) == 1
    (images / "1.jpg").unlink()
    with pytest.raises(DataError, match="nothing is left of 2 entries"):
        convert("vqav2", files, out, images=images, rules=rules, missing_images="drop")


# The world's files


def test_the_world_writes_files_of_every_source() -> None:
    assert set(WORLD) == set(CONVERTERS.names())


@pytest.mark.parametrize("source", WORLD)
def test_every_source_is_made_of_the_worlds_files(source: str, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    report = make(world, source, out)
    assert report["rows"] == len(rows := LlavaJson(out, world / "images" / "train"))
    samples = [rows[number] for number in range(len(rows))]
    assert len({sample.id for sample in samples}) == len(samples)
    images = [part.image for sample in samples for part in sample.images]
    assert all(isinstance(image, Path) and image.is_file() for image in images)
    assert bool(images) == (source != "sharegpt")
    if WORLD[source].whole:
        assert report["read"] == report["rounds"] + sum(report["dropped"].values())
    assert report == json.loads(report_path(out).read_text()) and report["sha256"] == sha256_file(
        out
    )
    assert make(world, source, tmp_path / "again.json")["sha256"] == report["sha256"]


def test_the_command_lists_and_makes(world: Path, tmp_path: Path, run: Run) -> None:
    code, out, _ = run("data", "convert", "--list", "--json")
    assert code == 0 and set(json.loads(out)["sources"]) == set(CONVERTERS.names())
    _, out, _ = run("data", "convert", "vg", "--list")
    assert "rounds" in out and "padded" in out
    given = [word for file in annotations(world, "vg") for word in ("--annotations", file)]
    out_file = tmp_path / "vg.json"
    images = ("--images", world / "images" / "train")
    code, out, err = run("data", "convert", "vg", "image={image_id:012d}.jpg", "rounds=2", *given,
                         *images, "--out", out_file, "--json")  # fmt: skip
    assert (code, err) == (0, "") and json.loads(out)["rules"]["rounds"] == 2
    code, _, err = run("data", "convert", "vgg", *given, "--out", out_file)
    assert code == 2 and "Did you mean 'vg'" in err
    assert run("data", "convert", "vg", *given)[0] == 2
    code, _, err = run("data", "convert", "vg", *given, "--out", tmp_path / "vg.txt")
    assert code == 2 and "allowed: .json, .jsonl" in err
