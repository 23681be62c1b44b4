"""Pictures with captions: TextCaps (with OCR tokens), COCO, and LCS-558K from its table."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pumice.core.errors import DataError, PumiceError
from pumice.data.academic.base import (
    COCO_IMAGE,
    Row,
    Rules,
    Tally,
    Task,
    clean,
    grouped,
    image_name,
    llava_row,
    stem,
    take,
)
from pumice.data.academic.llava_files import checked_row
from pumice.data.row_layouts import SLOT
from pumice.processing.response_formats import BRIEF_INSTRUCTIONS, FORMATS, OCR_TOKENS


class CaptionRules(Rules):
    """The rules of captions."""

    image: str = Field(COCO_IMAGE, description="How a row names its image, below --images.")
    format: str = Field("caption", description="The response format that asks for a caption.")
    captions: Literal["first", "random", "each"] = Field(
        "first", description="Of several captions of an image the first, one by the seed, or each."
    )
    seed: int = Field(0, description="Draws captions.")


class TextCapsRules(CaptionRules):
    """The rules of TextCaps."""

    image: str = Field(
        "textvqa/train_images/{image_id}.jpg",
        description="How a row names its image, below --images.",
    )
    ocr: bool = Field(True, description="The words that were read in the picture stand below.")


class LcsRules(Rules):
    """The rules of LCS-558K."""

    image: str = Field("{image}", description="How a row names its image, below --images.")
    seed: int = Field(0, description="Draws the instruction and whether it stands first.")


def coco_caption_rows(task: Task[CaptionRules]) -> Iterator[Row]:
    """One row an image (or a caption)."""
    file, content = task.official.with_key("annotations", "captions_train2017.json")
    pairs = []
    for number, entry in enumerate(take(content, "annotations", list, str(file))):
        where = f"{file}, annotation {number}"
        image = image_name(task.rules.image, image_id=take(entry, "image_id", int, where))
        pairs.append((image, clean(take(entry, "caption", str, where))))
    return _caption_rows(pairs, {}, task.rules, task.tally)


def textcaps_rows(task: Task[TextCapsRules]) -> Iterator[Row]:
    """One row an image (or a caption), the OCR tokens of the picture in its question."""
    rules, tally = task.rules, task.tally
    file, entries = _textcaps(task.official.mappings("TextCaps_0.1_train.json"))
    words = _ocr_words(task) if rules.ocr else {}
    pairs, notes = [], {}
    for number, entry in enumerate(entries):
        where = f"{file}, caption {number}"
        name = take(entry, "image_id", str, where)
        image = image_name(rules.image, image_id=name)
        pairs.append((image, clean(take(entry, "caption_str", str, where))))
        if rules.ocr and image not in notes:
            tally.changed["image without OCR tokens"] += not words.get(name)
            notes[image] = OCR_TOKENS + ", ".join(words.get(name, []))
    return _caption_rows(pairs, notes, rules, tally)


def lcs_rows(task: Task[LcsRules]) -> Iterator[Row]:
    """Rows as published, or made from the table of captions (`..._meta.json`)."""
    for file, entries in task.official.lists("blip_laion_cc_sbu_558k.json"):
        for number, entry in enumerate(entries):
            where = f"{file}, row {number + 1}"
            task.tally.read += 1
            if isinstance(entry, dict) and "conversations" in entry:
                row = checked_row(entry, task.rules.image, where, task.tally)
            else:
                row = _brief_row(entry, task, where)
            if row is not None:
                yield row


def _brief_row(entry: Any, task: Task[LcsRules], where: str) -> Row | None:
    image = image_name(task.rules.image, image=take(entry, "image", str, where))
    caption = clean(take(entry, "blip_caption", str, where))
    # The image names the draw, so that no row depends on the others.
    rng = random.Random(f"lcs {task.rules.seed} {image}")
    instruction = rng.choice(BRIEF_INSTRUCTIONS)
    asked = rng.choice((f"{SLOT}\n{instruction}", f"{instruction}\n{SLOT}"))
    if not caption:
        task.tally.dropped["empty caption"] += 1
        return None
    row = llava_row(take(entry, "id", str, where), image, [(asked, caption)])
    row["conversations"][0]["value"] = asked
    return row


def _textcaps(files: Iterable[tuple[Path, dict[str, Any]]]) -> tuple[Path, list[Any]]:
    for file, content in files:
        entries = take(content, "data", list, str(file))
        if entries and isinstance(entries[0], dict) and "caption_str" in entries[0]:
            return file, entries
    raise DataError(
        "none of the files has captions ('caption_str'); TextCaps_0.1_train.json is needed. Give "
        "it with --annotations."
    )


def _ocr_words(task: Task[TextCapsRules]) -> dict[str, list[str]]:
    for file, content in task.official.mappings("TextVQA_Rosetta_OCR_v0.2_train.json"):
        entries = take(content, "data", list, str(file))
        if entries and isinstance(entries[0], dict) and "ocr_tokens" in entries[0]:
            return {
                take(entry, "image_id", str, f"{file}, image {number}"): take(
                    entry, "ocr_tokens", list, f"{file}, image {number}"
                )
                for number, entry in enumerate(entries)
            }
    raise DataError(
        "none of the files has 'ocr_tokens'; TextVQA_Rosetta_OCR_v0.2_train.json has them. Give it "
        "with a second --annotations, or ask without them: ocr=false."
    )


def _caption_rows(
    pairs: Iterable[tuple[str, str]], notes: Mapping[str, str], rules: CaptionRules, tally: Tally
) -> Iterator[Row]:
    if "{question}" in FORMATS[rules.format]:
        raise PumiceError(
            f"format={rules.format} is a form of questions, and captions answer none; choose "
            "another, such as caption, or none."
        )
    for image, captions in grouped(pairs).items():
        tally.read += len(captions)
        kept = [caption for caption in captions if caption]
        tally.dropped["empty caption"] += len(captions) - len(kept)
        if not kept:
            continue
        if rules.captions != "each":
            tally.dropped["further caption of an image"] += len(kept) - 1
            rng = random.Random(f"captions {rules.seed} {image}")
            kept = [kept[0] if rules.captions == "first" else rng.choice(kept)]
        asked = "\n".join(part for part in (FORMATS[rules.format], notes.get(image)) if part)
        for number, caption in enumerate(kept):
            name = stem(image) if len(kept) == 1 else f"{stem(image)}-{number + 1}"
            yield llava_row(name, image, [(asked, caption)])
