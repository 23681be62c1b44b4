"""Training samples as the model reads them: every token, learnt or not, and every image.

What is told comes from the ids and labels of the processor itself, so a token shown as learnt is
one the loss counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import PIL.Image

from pumice.core.images import open_image
from pumice.core.types import Sample
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.processing.processor import Processor


class Piece(NamedTuple):
    """A token's text, or (`image` from 1) the positions of an image."""

    text: str
    learned: bool
    tokens: int = 1
    image: int | None = None


class Shown(NamedTuple):
    """A sample: its pieces in order, and its images as they are opened, upright RGB."""

    id: str
    source: str
    pieces: list[Piece]
    images: list[PIL.Image.Image]

    @property
    def tokens(self) -> int:
        """All positions, those of images counted."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def learned(self) -> int:
        """How many tokens are learnt."""
        return sum(piece.tokens for piece in self.pieces if piece.learned)

    def runs(self) -> Iterator[Piece]:
        """Neighbouring tokens of one kind joined: a text the eye can follow."""
        joined: Piece | None = None
        for piece in self.pieces:
            same = joined and joined.image is None and piece.image is None
            if joined and same and joined.learned == piece.learned:
                text, tokens = joined.text + piece.text, joined.tokens + piece.tokens
                joined = Piece(text, piece.learned, tokens)
                continue
            if joined:
                yield joined
            joined = piece
        if joined:
            yield joined

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: runs of text and images."""
        return {
            "id": self.id,
            "source": self.source,
            "tokens": self.tokens,
            "learned": self.learned,
            "pieces": [run._asdict() for run in self.runs()],
            "images": [list(image.size) for image in self.images],
        }


def shown(sample: Sample, processor: Processor) -> Shown:
    """What the processor makes of a sample; raises DataError as training would."""
    encoded = processor.encode(sample)
    positions = [processor.image_positions(processor.plan(size)) for size in encoded.image_sizes]
    pieces: list[Piece] = []
    number, at = 0, 0
    ids, labels = encoded.input_ids, encoded.labels
    while at < len(ids):
        if ids[at] == IMAGE_ID:
            pieces.append(Piece("", False, positions[number], number + 1))
            at += positions[number]
            number += 1
            continue
        end = next((k for k in range(at, len(ids)) if ids[k] == IMAGE_ID), len(ids))
        texts = _texts(processor, [token for token in ids[:at] if token != IMAGE_ID], ids[at:end])
        learned = [label != IGNORE for label in labels[at:end]]
        pieces += map(Piece, texts, learned)
        at = end
    where = f"sample {sample.id!r} ({sample.source})"
    transparency = processor.image_spec.transparency
    images = [
        open_image(part.image, where=where, transparency=transparency) for part in sample.images
    ]
    return Shown(sample.id, sample.source, pieces, images)


def spread_rows(count: int, rows: int) -> list[int]:
    """`rows` numbers below `count`, evenly spread; all of them when there are fewer."""
    rows = min(rows, count)
    return [k * count // rows for k in range(rows)]


def _texts(processor: Processor, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text each token adds; of a character made of several tokens the last one has it."""

    def decode(ids: Sequence[int]) -> str:
        return str(
            processor.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    texts, done = [], decode(before)
    for k in range(1, len(ids) + 1):
        text = decode([*before, *ids[:k]])
        # An unfinished character is shown as a replacement mark, unless nothing follows.
        whole = not text.endswith("\ufffd") or k == len(ids)
        texts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return texts
