"""Small hand-made official files of the benchmarks with a layout of their own."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

from PIL import Image

from eval_files import dump, dump_lines

MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
    "l2-category", "comment", "split",
)  # fmt: skip


def picture() -> str:
    """A small picture in base64, as MMBench's tables hold theirs."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def gqa_files(root: Path, name: str = "gqa/data/testdev_balanced_questions.json") -> Path:
    kinds = ["query", "verify", "query", "choose"]
    truths = ["table", "yes", "chair", "left"]
    questions = {
        f"20{n}": {
            "question": f"What is number {n}?", "imageId": f"n{n // 2}", "answer": truths[n],
            "isBalanced": True, "groups": {"global": "furniture" if n in (0, 2) else None},
            "types": {"structural": kinds[n], "semantic": "obj", "detailed": "x"},
        }
        for n in range(4)
    }  # fmt: skip
    questions["299"] = {**questions["200"], "isBalanced": False}
    dump(root / name, questions)
    return root


def vizwiz_files(root: Path) -> Path:
    said = [
        ["coca cola"] * 7 + ["Coke"] * 3,
        ["unanswerable"] * 10,
        ["1"] * 2 + [f"x{n}" for n in range(8)],
    ]
    asked = ["What IS this Can?", "what  does it say", "Über WAS?"]
    rows = [
        {
            "image": f"VizWiz_val_{n:08d}.jpg", "question": asked[n],
            "answers": [{"answer": text, "answer_confidence": "yes"} for text in said[n]],
            "answer_type": "unanswerable" if n == 1 else "other", "answerable": int(n != 1),
        }
        for n in range(3)
    ]  # fmt: skip
    dump(root / "vizwiz" / "val.json", rows)
    dump(
        root / "vizwiz" / "test.json",
        [
            {"image": row["image"].replace("val", "test"), "question": row["question"]}
            for row in rows
        ],
    )
    return root


def textvqa_files(root: Path, *, ocr: bool = True) -> Path:
    asked = ["what is the Brand?", "who wrote THIS?", "what year?"]
    tokens = ["NIKON, D90", "", "1,999"]
    rows = [
        {
            "question": asked[n], "image_id": f"{n // 2}abc", "question_id": 34602 + n,
            "answers": ["nikon"] * 6 + ["the D90"] * 4, "set_name": "val",
        }
        for n in range(3)
    ]  # fmt: skip
    dump(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": rows})
    if ocr:
        short = "Answer the question using a single word or phrase."
        dump_lines(
            root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl",
            [
                {
                    "question_id": f"{n // 2}abc", "image": f"{n // 2}abc.jpg",
                    "text": f"{asked[n].capitalize()}\nReference OCR token: {tokens[n]}\n{short}",
                }
                for n in range(3)
            ],
        )  # fmt: skip
    return root


def mme_files(root: Path) -> Path:
    release = root / "MME" / "MME_Benchmark_release_version"
    flat, nested = release / "existence", release / "artwork" / "questions_answers_YN"
    for folder in (flat, nested, release / "artwork" / "images"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("0001", "0002"):
        (flat / f"{name}.jpg").write_bytes(b"")
        (flat / f"{name}.txt").write_text(
            f"Is there a dog in {name}? Please answer yes or no.\tYes\n"
            f"Is there a cat in {name}?  Please answer yes or no.\tNo\n",
            encoding="utf-8",
        )
    (release / "artwork" / "images" / "77.png").write_bytes(b"")
    (nested / "77.txt").write_text(
        "Is it by Monet? Please answer yes or no.\tNo\n"
        "Is it by Manet? Please answer yes or no.\tYes",
        encoding="utf-8",
    )
    return root


def mmbench_rows() -> list[dict[str, str]]:
    """Question 7 in three orders that keep its last option, question 9 in two, 12 in one."""
    first = {"question": "Which  one?", "hint": "Look at it.", "D": "All above are not right"}
    two = {"question": "Is it?", "hint": "", "C": "", "D": ""}
    rows = [
        {"index": "7", **first, "A": "cat", "B": "dog", "C": "red car", "answer": "B"},
        {"index": "1000007", **first, "A": "red car", "B": "cat", "C": "dog", "answer": "C"},
        {"index": "2000007", **first, "A": "dog", "B": "red car", "C": "cat", "answer": "A"},
        {"index": "9", **two, "A": "yes it is", "B": "never", "answer": "A"},
        {"index": "1000009", **two, "A": "never", "B": "yes it is", "answer": "B"},
        {"index": "12", "question": "Q?", "hint": "nan", "A": "x", "B": "None", "C": "y", "D": "z",
         "answer": "A"},
    ]  # fmt: skip
    shared = {"source": "s", "comment": "", "split": "dev"}
    for row in rows:
        where = "attribute" if row["index"].endswith("7") else "logic"
        row |= {**shared, "category": f"fine {where}", "l2-category": where, "image": picture()}
    rows[1]["image"] = "7"  # As later releases write it: the row that holds the picture.
    return rows


def mmbench_files(root: Path, name: str = "mmbench_dev_20230712.tsv") -> Path:
    path = root / "mmbench" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, MMBENCH_COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows(mmbench_rows())
    return root


def seed_files(root: Path) -> Path:
    choices = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
    rows = [
        {
            "answer": "ABCD"[n], **choices, "data_id": f"{n // 2}_1", "data_type": "image",
            "question": f"Which {n}?", "question_id": str(101 + n), "question_type_id": 1 + n // 2,
        }
        for n in range(4)
    ]  # fmt: skip
    video = {
        "answer": "B", **choices, "data_id": "7.mp4", "data_type": "video",
        "question": "What next?", "question_id": "v0", "question_type_id": 10,
    }  # fmt: skip
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    dump(
        root / "seed_bench" / "SEED-Bench.json",
        {"question_type": types, "questions": [*rows, video]},
    )
    return root
