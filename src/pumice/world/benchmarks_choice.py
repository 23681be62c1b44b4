"""The held-out scenes as MMBench, MMBench-CN and SEED-Bench: answers that are a letter."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from pathlib import Path
from typing import Any

from pumice.core.files import write_atomic
from pumice.core.log import get_logger
from pumice.world import language
from pumice.world.datasets import eval_name
from pumice.world.scenes import Scene, render
from pumice.world.videos import can_write_videos, write_video

MMBENCH_QUESTIONS = 60
TURN = 1_000_000
NONE_RIGHT = "All above are not right"
VIDEOS_PER_TYPE = 6
# A video shows three scenes, each for so many frames.
SHOT = 8
FPS = 8
_LETTERS = "ABCD"
_COLUMNS = (
    "index", "question", "hint", *_LETTERS, "answer", "category", "image", "source", "l2-category",
    "comment", "split",
)  # fmt: skip
_L2 = {"ocr": "finegrained_perception (instance-level)", "where": "relation_reasoning",
       "background": "coarse_perception"}  # fmt: skip
_CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色",
    "orange": "橙色", "white": "白色", "gray": "灰色", "black": "黑色", "pink": "粉色",
    "cyan": "青色", "plain": "纯色", "striped": "条纹", "dotted": "圆点", "circle": "圆形",
    "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "ring": "圆环",
    "heart": "心形", "diamond": "菱形", "arrow": "箭头", "moon": "月亮",
}  # fmt: skip
_CHINESE_QUESTIONS = {
    "color": "{x}是什么颜色？", "texture": "{x}是什么图案？", "background": "背景是什么颜色？",
}  # fmt: skip
SEED_TYPES = {
    "Scene Understanding": 1, "Instance Identity": 2, "Instance Attributes": 3,
    "Instance Location": 4, "Instances Counting": 5, "Spatial Relation": 6,
    "Instance Interaction": 7, "Visual Reasoning": 8, "Text Understanding": 9,
    "Action Recognition": 10, "Action Prediction": 11, "Procedure Understanding": 12,
}  # fmt: skip
_SEED_KINDS = {
    "background": 1,
    "which": 2,
    "color": 3,
    "where": 4,
    "count": 5,
    "shape": 6,
    "ocr": 9,
}
_VIDEO_FOLDERS = {
    10: "20bn-something-something-v2", 11: "EPIC-KITCHENS", 12: "BreakfastII_15fps_qvga_sync",
}  # fmt: skip

log = get_logger(__name__)


def write_mmbench(folder: Path, scenes: list[Scene], seed: int) -> None:
    """MMBench's dev table, each question with its options turned; the same in Chinese."""
    rng = random.Random(f"mmbench {seed}")
    english: list[dict[str, Any]] = []
    chinese: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes[:MMBENCH_QUESTIONS]):
        picture = _picture(scene)
        kinds = [kind for kind in language.CHOICE_KINDS if kind != "background"]
        rng.shuffle(kinds)
        asked = next(q for kind in kinds if (q := language.ask(scene, kind, rng)))
        english += _turned(index, asked, rng, picture, keep_last=index % 8 == 7)
        kind = rng.choice(tuple(_CHINESE_QUESTIONS))
        told = language.ask(scene, kind, rng)
        assert told is not None
        chinese += _turned(index, _in_chinese(told), rng, picture, keep_last=False)
    _write_table(folder / "mmbench_dev_20230712.tsv", english)
    _write_table(folder / "mmbench_dev_cn_20231003.tsv", chinese)


def _in_chinese(asked: language.Question) -> language.Question:
    named = next((word for word in _CHINESE if f"the {word} " in f"{asked.text[:-1]} "), "")
    text = _CHINESE_QUESTIONS[asked.kind].format(x=_CHINESE.get(named, ""))
    options = tuple(_CHINESE[option] for option in asked.options)
    return language.Question(asked.kind, text, _CHINESE[asked.short], "", options)


def _turned(
    index: int, asked: language.Question, rng: random.Random, picture: str, *, keep_last: bool
) -> list[dict[str, Any]]:
    """The rows of one question; `keep_last` puts an option at the end that stays there."""
    options, _ = language.choices(asked, rng, most=3 if keep_last else 4)
    rows = []
    for turn in range(len(options)):
        turned = options[len(options) - turn :] + options[: len(options) - turn]
        answer = _LETTERS[turned.index(asked.short)]
        shown = [*turned, NONE_RIGHT] if keep_last and len(turned) == 3 else turned
        rows.append(
            {"index": index + turn * TURN, "question": asked.text,
             "hint": "The picture shows shapes." if index % 4 == 0 else "",
             **dict(zip(_LETTERS, shown, strict=False)), "answer": answer,
             "category": asked.kind, "image": picture, "source": "pumice world",
             "l2-category": _L2.get(asked.kind, "attribute_reasoning"), "comment": "",
             "split": "dev"}
        )  # fmt: skip
    return rows


def _picture(scene: Scene) -> str:
    buffer = io.BytesIO()
    render(scene).save(buffer, "JPEG", quality=92)
    return base64.b64encode(buffer.getvalue()).decode()


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    # First all questions in their own order, then the turns, as the official table has them.
    writer.writerows(sorted(rows, key=lambda row: row["index"]))
    write_atomic(path, buffer.getvalue())


def write_seed(folder: Path, scenes: list[Scene], seed: int) -> None:
    """SEED-Bench's questions, one a picture, and short videos where PyAV is installed.

    A video shows three scenes one after the other and is asked about one of them: the middle one of
    a whole video, or that of its segment.
    """
    rng = random.Random(f"seed_bench {seed}")
    questions = []
    for index, scene in enumerate(scenes):
        kind, asked = _choice_of_four(scene, rng)
        ids = {
            "data_id": eval_name(index),
            "data_type": "image",
            "question_id": str(101669 + index),
        }
        questions.append(_seed_row(asked, rng, {**ids, "question_type_id": _SEED_KINDS[kind]}))
    if can_write_videos():
        questions += _video_rows(folder, scenes, rng)
    else:
        log.warning("PyAV is not installed: SEED-Bench is written without its videos")
    content = {"question_type": SEED_TYPES, "questions": questions}
    write_atomic(folder / "SEED-Bench.json", json.dumps(content))


def _choice_of_four(scene: Scene, rng: random.Random) -> tuple[str, language.Question]:
    kinds = list(_SEED_KINDS)
    rng.shuffle(kinds)
    return next((kind, q) for kind in kinds if (q := language.ask(scene, kind, rng)))


def _seed_row(asked: language.Question, rng: random.Random, ids: dict[str, Any]) -> dict[str, Any]:
    options, letter = language.choices(asked, rng)
    names = ("choice_a", "choice_b", "choice_c", "choice_d")
    texts = dict(zip(names, options, strict=True))
    return {"answer": letter, **texts, "question": asked.text, **ids}


def _video_rows(folder: Path, scenes: list[Scene], rng: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind, place in _VIDEO_FOLDERS.items():
        for number in range(VIDEOS_PER_TYPE):
            shown = [rng.choice(scenes) for _ in range(3)]
            name = f"{number + 1}.mp4"
            pictures = [render(scene) for scene in shown for _ in range(SHOT)]
            write_video(folder / "videos" / place / name, pictures, FPS)
            which = 1 if kind == 10 else rng.randrange(3)
            ids: dict[str, Any] = {
                "data_id": f"P01/{name}" if kind == 11 else name, "data_type": "video",
                "question_id": f"v{len(rows)}", "question_type_id": kind,
            }  # fmt: skip
            if kind == 11:
                ids["segment"] = [which * SHOT / FPS, (which + 1) * SHOT / FPS]
            elif kind == 12:
                ids["segment"] = [which * SHOT, (which + 1) * SHOT]
            rows.append(_seed_row(_choice_of_four(shown[which], rng)[1], rng, ids))
    return rows
