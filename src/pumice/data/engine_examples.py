"""Examples that show the model what is wanted: captions and boxes with the reply to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_jsonl
from pumice.data.engine_filters import fault_of
from pumice.data.engine_prompts import Kind, Pair, asked_text, written_pairs
from pumice.data.engine_scenes import Described, read_described
from pumice.data.row_layouts import SLOT


@dataclass(frozen=True, slots=True)
class Example:
    """An image in words, and the questions and answers that are right for it."""

    scene: Described
    pairs: tuple[Pair, ...]

    def messages(self, kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is asked about the image, and the reply in the form that is asked for."""
        return (
            {"role": "user", "content": asked_text(self.scene, boxes=kind.shows_boxes)},
            {"role": "assistant", "content": written_pairs(kind, self.pairs)},
        )


def read_examples(path: Path, kind: Kind, language: str) -> tuple[Example, ...]:
    """Rows `{"image", "captions", "boxes", "conversations"}`, the last in LLaVA's layout.

    An example that the filters would not let pass is an error: the model would be led astray.
    """
    scenes = {scene.image: scene for scene in read_described(path, path)}
    found = []
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        if row.get("image") not in scenes:
            raise DataError(f"{where}: the example has no captions; add some.")
        pairs = _pairs(row.get("conversations"), where)
        if fault := fault_of(kind, pairs, language):
            raise DataError(
                f"{where}: the example would not be kept as a reply of kind {kind.name} ({fault}). "
                f"Correct it."
            )
        found.append(Example(scenes.pop(row["image"]), pairs))
    return tuple(found)


def _pairs(turns: Any, where: str) -> tuple[Pair, ...]:
    try:
        speakers = [turn["from"] for turn in turns]
        texts = [turn["value"].replace(SLOT, "").strip() for turn in turns]
    except (TypeError, KeyError, AttributeError):
        speakers, texts = [], []
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2) or not all(texts):
        raise DataError(
            f"{where}: 'conversations' must be turns {{'from', 'value'}} of human and gpt in turn, "
            f"none of them empty. Correct the example."
        )
    return tuple(zip(texts[::2], texts[1::2], strict=True))
