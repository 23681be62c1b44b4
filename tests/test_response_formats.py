"""The sentences that ask for an answer's form are the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumice.core.errors import PumiceError
from pumice.processing.response_formats import (
    LETTER,
    SHORT,
    UNANSWERABLE,
    box_prompt,
    letter_prompt,
    region_prompt,
    with_format,
)

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos" / "images"
WHERE = "sample '7' (train.json, row 3)"


def test_response_formats() -> None:
    assert with_format("Why?", "short") == f"Why?\n{SHORT}"
    assert with_format("Why?", "none") == "Why?"
    assert with_format("Why?", "unanswerable") == f"Why?\n{UNANSWERABLE}\n{SHORT}"
    assert with_format("Why {question}?", "qa") == "Q: Why {question}? A:"
    with pytest.raises(PumiceError, match="Did you mean 'short'"):
        with_format("Why?", "shrt")


def test_letter_prompt_is_the_published_one() -> None:
    asked = letter_prompt("Which  is it?", ["a cat", "a   dog "], hint="Look at it.")
    assert asked == f"Context: Look at it.\nWhich is it?\nA. a cat\nB. a  dog\n{LETTER}"
    assert letter_prompt("Q?", ["x"], hint="") == f"Q?\nA. x\n{LETTER}"
    with pytest.raises(PumiceError, match="0 choices"):
        letter_prompt("Q?", [])


def test_region_prompts() -> None:
    assert "describes: the red cup." in box_prompt("the red cup")
    assert "this region: [0.10, 0.25, 1.00, 0.50]." in region_prompt([0.1, 0.25, 1, 0.5])
