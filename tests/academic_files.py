"""Which of the world's official files each source is made from, and how its images are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pumice.data.academic.convert import convert

BY_NUMBER = {"image": "{image_id:012d}.jpg"}
BY_NAME = {"image": "{image_id}.jpg"}


class Made(NamedTuple):
    """The files of a source, its rules on the world's names, and what must be true of its count."""

    files: tuple[str, ...]
    rules: dict[str, str]
    whole: bool = True
    """Every entry that was read is a round of a row, or was dropped."""


TOKENIZER = str(Path(__file__).parents[1] / "src/pumice/shipped/pocket-language")
WORLD: dict[str, Made] = {
    "llava-instruct": Made(("llava_instruct_150k.json",), {"image": "{image}"}, whole=False),
    "sharegpt": Made(("sg_90k_part1.json",), {"tokenizer": TOKENIZER}, whole=False),
    "vqav2": Made(
        ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),
        BY_NUMBER,
    ),
    "gqa": Made(("train_balanced_questions.json",), BY_NAME),
    "okvqa": Made(
        ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"),
        BY_NUMBER,
    ),
    "ocrvqa": Made(("dataset.json",), BY_NAME),
    "aokvqa": Made(("aokvqa_v1p0_train.json",), {**BY_NUMBER, "rotations": "1"}),
    "textcaps": Made(("TextCaps_0.1_train.json", "TextVQA_Rosetta_OCR_v0.2_train.json"), BY_NAME),
    "refcoco": Made(("refs(unc).p", "instances.json"), BY_NUMBER),
    "vg": Made(("region_descriptions.json", "image_data.json"), BY_NUMBER),
    "scienceqa": Made(("problems.json", "pid_splits.json"), {"image": "{image}"}),
    "coco-captions": Made(("captions_train2014.json",), BY_NUMBER),
    "lcs558k": Made(("blip_laion_cc_sbu_558k_meta.json",), {}),
}


def annotations(world: Path, source: str) -> list[Path]:
    folder = world / "academic" / source
    if source == "coco-captions":
        folder = world / "coco" / "annotations"
    return [folder / name for name in WORLD[source].files]


def make(world: Path, source: str, out: Path, **rules: str) -> dict[str, Any]:
    """The world's files of a source made into rows, with its images checked."""
    chosen = {**WORLD[source].rules, **rules}
    return convert(
        source, annotations(world, source), out, images=world / "images" / "train", rules=chosen
    )
