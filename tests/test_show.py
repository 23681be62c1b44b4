"""`pumice data show`: what is coloured is what the labels learn, and every position is told."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

import tiny
from conftest import Run
from pumice.core.types import Message, Sample, TextPart, assistant, user
from pumice.data.show import Shown, shown, spread_rows
from pumice.data.show_html import samples_page
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.processing.processor import Processor

ANSWER = "Größe 猫 😀 & <b>two</b>\nlines."


@pytest.fixture
def sample(pictures: Path) -> Sample:
    parts = user("What?", pictures / "0.png", pictures / "1.png").content
    more = (TextPart("And <image> here:"), *user("", pictures / "2.png").content)
    return Sample(
        "a&b", (Message("user", parts), assistant(ANSWER), Message("user", more), assistant("Yes"))
    )


@pytest.fixture
def seen(sample: Sample, processor: Processor) -> Shown:
    return shown(sample, processor)


def test_learnt_pieces_are_the_learnt_labels(
    sample: Sample, seen: Shown, processor: Processor
) -> None:
    encoded = processor.encode(sample)
    assert seen.tokens == len(encoded.input_ids) and seen.learned == encoded.num_supervised
    flags = [piece.learned for piece in seen.pieces for _ in range(piece.tokens)]
    assert flags == [label != IGNORE for label in encoded.labels]
    images = [piece.image is not None for piece in seen.pieces for _ in range(piece.tokens)]
    assert images == [token == IMAGE_ID for token in encoded.input_ids]
    # Two images beside each other are two.
    assert [(p.image, p.tokens) for p in seen.pieces if p.image] == [(k, 16) for k in (1, 2, 3)]
    assert [image.size for image in seen.images] == [(40, 24)] * 3


def test_no_character_is_lost_or_told_twice(seen: Shown) -> None:
    learned = "".join(piece.text for piece in seen.pieces if piece.learned)
    assert learned.replace(" ", "") == (ANSWER + "</s>" + "Yes</s>").replace(" ", "")
    rest = "".join(piece.text for piece in seen.pieces if not piece.learned)
    assert "What?" in rest and "And <image> here:" in rest and rest.startswith("<s>")
    learned_runs = [run.text.strip() for run in seen.runs() if run.learned]
    assert learned_runs == [f"{ANSWER}</s>", "Yes</s>"]


def test_the_page_stands_alone_and_colours_the_same(seen: Shown) -> None:
    page = samples_page("train & more", [seen], "pocket")
    assert page.count("data:image/jpeg;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    learned = re.findall(r'<span class="learned">(.*?)</span>', page, re.DOTALL)
    told = unescape("".join(learned)).replace("\u21b5", "")
    assert told == "".join(piece.text for piece in seen.pieces if piece.learned)
    assert "<b>" not in page and "a&amp;b" in page and "train &amp; more" in page


def test_rows_are_spread_evenly() -> None:
    assert spread_rows(100, 5) == [0, 20, 40, 60, 80]
    assert spread_rows(3, 5) == [0, 1, 2]


def test_the_command_shows_marks_json_and_a_page(run: Run, tmp_path: Path) -> None:
    tiny.noise(1).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"id": f"r{k}", "image": "a.png", "conversations": turns} for k in range(4)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    code, out, _ = run("data", "show", tmp_path / "t.json", "--n", 2)
    assert code == 0 and out.count("« A cat.</s>»") == 2 and "r0 (" in out and "r2 (" in out
    assert "[image 1: 36 tokens]" in out
    options = ("--row", 4, "--recipe", "pocket", "--stage", "align")
    code, out, _ = run("data", "show", tmp_path / "t.json", *options, "--json")
    (only,) = json.loads(out)["samples"]
    assert code == 0 and only["id"] == "r3" and only["images"] == [[40, 24]]
    # The align stage reads the image and its caption, and no question.
    assert "What?" not in out and only["learned"] < only["tokens"]
    page = tmp_path / "page.html"
    assert run("data", "show", tmp_path / "t.json", "--html", page)[1].strip() == str(page)
    assert page.read_text().count("<article>") == 4
    code, _, err = run("data", "show", tmp_path / "t.json", "--row", 5)
    assert code == 2 and "has 4 rows" in err


def test_tiled_images_show_all_their_positions(run: Run, tmp_path: Path) -> None:
    tiny.noise(1, (400, 200)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "t.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    code, out, _ = run("data", "show", tmp_path / "t.json", "--recipe", "pocket-hd", "--json")
    (only,) = json.loads(out)["samples"]
    (image,) = [piece for piece in only["pieces"] if piece["image"]]
    assert code == 0 and image["tokens"] > 36
