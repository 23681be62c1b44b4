"""`pumice data verify`: every planted defect is found, sound rows raise no alarm, policies hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import planted as planting
from conftest import Run
from pumice.core.errors import DataError, PumiceError
from pumice.data.findings import KINDS
from pumice.data.open_source import open_source
from pumice.data.picture_hash import PictureHash, hash_picture, same_pictures, stack
from pumice.data.sources import LlavaJson
from pumice.data.verify import VerifySpec, verify
from pumice.data.verify_files import manifest_path, read_summary, write_clean
from pumice.train.data_card import card_text, data_card
from pumice.train.stages import DataSpec
from source_files import bytes_of, write_parquet

COUNT, DEFECTS = 240, 72


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> planting.Planted:
    return planting.plant(tmp_path_factory.mktemp("planted") / "data", COUNT, DEFECTS)


def found(lines: list[dict[str, Any]]) -> set[tuple[int, str]]:
    return {(line["row"], line["kind"]) for line in lines}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verify_command(run: Run, planted: planting.Planted, *more: object) -> tuple[int, str, str]:
    return run(
        *("data", "verify", planted.file, "--images", planted.images),
        *("--evaluation", planted.evaluation, "--recipe", "pocket", *more),
    )


def test_every_planted_defect_is_found_and_nothing_else(
    planted: planting.Planted, run: Run
) -> None:
    code, out, _ = verify_command(run, planted)
    summary, *lines = read_lines(manifest_path(planted.file))
    assert found(lines) == planted.expected
    assert {kind for _, kind in planted.expected} == set(KINDS)
    assert code == 1 and summary["rows"] == COUNT
    assert summary["counts"] == {k: Counter(kind for _, kind in planted.expected)[k] for k in KINDS}
    for line in lines:
        assert line["reason"] and f"line {line['row'] + 1}" in line["place"]
        assert line["id"] and line["severity"] == KINDS[line["kind"]].severity
    assert all(kind in out for kind in KINDS)


def test_drop_leaves_the_good_rows_as_they_are(
    planted: planting.Planted, run: Run, tmp_path: Path
) -> None:
    clean = tmp_path / "clean.jsonl"
    more = ("--policy", "drop", "--out", clean, "--manifest", tmp_path / "m.jsonl", "--json")
    code, out, _ = verify_command(run, planted, *more)
    bad = {row for row, kind in planted.expected if KINDS[kind].severity == "error"}
    lines = planted.file.read_text().splitlines()
    assert clean.read_text().splitlines() == [t for k, t in enumerate(lines) if k not in bad]
    summary = json.loads(out)
    assert code == 0 and summary["clean_rows"] == COUNT - len(bad)
    assert summary["rows_with_errors"] == len(bad)
    (made,) = read_lines(manifest_path(clean))
    assert made["dropped"]["rows"] == len(bad) and made["dropped"]["counts"]["leak"] == 4
    assert made["rows_with_errors"] == 0 and set(made["counts"]) == {
        kind for kind in KINDS if KINDS[kind].severity == "note"
    }
    spec = DataSpec(path=clean, images=planted.images)
    (card,) = data_card([spec], tmp_path)
    assert card["rows"] == COUNT - len(bad) and card["verified"]["counts"] == made["counts"]
    assert f"no errors; {len(bad)} bad rows were dropped (" in card_text(card)
    clean.write_text(clean.read_text() + lines[0] + "\n")
    assert "not verified" in card_text(data_card([spec], tmp_path)[0])
    clean.write_text("".join(t + "\n" for k, t in enumerate(lines) if k not in bad))
    again = verify(open_source(clean, planted.images), VerifySpec())
    assert not again.bad_rows


def test_drop_writes_rows_with_their_pictures_where_these_are_inside(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    file, clean = write_parquet(tmp_path / "in"), tmp_path / "clean.jsonl"
    table = pa.Table.from_pylist([{"id": "bad", "image": {"bytes": b"no"}, "caption": "A cat."}])
    pq.write_table(table, tmp_path / "in" / "c.parquet")
    # The pictures of the shared rows are 9 x 7; small ones are a fault by default.
    more = ("--ignore", "image_size", "--ignore", "duplicate_row")
    code, out, err = run("data", "verify", file, "--policy", "drop", "--out", clean, *more)
    assert code == 0 and "the 12 rows without errors" in out, out + err
    left, whole = open_source(clean), open_source(file)
    assert len(whole) == 13
    assert [bytes_of(left[k]) for k in range(12)] == [bytes_of(whole[k]) for k in range(12)]


def test_report_and_ignored_kinds(planted: planting.Planted, run: Run, tmp_path: Path) -> None:
    ignore = [part for kind in KINDS if kind != "box" for part in ("--ignore", kind)]
    manifest = ("--manifest", tmp_path / "m.jsonl")
    code, _, _ = verify_command(run, planted, "--policy", "report", *ignore, *manifest)
    _, *lines = read_lines(tmp_path / "m.jsonl")
    assert code == 0 and {line["kind"] for line in lines} == {"box"}
    code, _, err = run("data", "verify", planted.file, "--ignore", "boxes")
    assert code == 2 and "Did you mean 'box'?" in err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--policy", "drop"), "without --out"),
        (("--out", "x.json"), "--policy error was given with --out"),
        (("--evaluation", "nowhere"), "nowhere does not exist"),
        (("--max-tokens", "5"), "needs a tokenizer"),
        (("--model", "pocket", "--recipe", "pocket"), "one is allowed"),
        (("--stage", "tune"), "none is given"),
        (("--recipe", "pocket", "--stage", "tone"), "has no stage 'tone'"),
        (("--images", "nowhere"), "--images nowhere is no directory"),
        (("--policy", "drop", "--out", "."), "--out . is a directory"),
    ],
)
def test_options_that_make_no_sense(
    planted: planting.Planted, run: Run, more: tuple[str, ...], expected: str
) -> None:
    code, _, err = run("data", "verify", planted.file, "--images", planted.images, *more)
    assert code == 2 and expected in err


def test_a_list_stays_a_list(tmp_path: Path) -> None:
    rows = [planting.sound_row(7), {"id": "bad"}, planting.sound_row(17) | {"id": "é"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    source = open_source(tmp_path / "a.json")
    report = verify(source, VerifySpec())
    assert write_clean(source, report.bad_rows, tmp_path / "b.json") == 2
    assert json.loads((tmp_path / "b.json").read_text()) == [rows[0], rows[2]]
    with pytest.raises(DataError, match="every row"):
        write_clean(source, {0, 1, 2}, tmp_path / "c.json")
    with pytest.raises(PumiceError, match="the data file itself"):
        write_clean(source, set(), tmp_path / "a.json")


def test_where_no_row_is_left_the_manifest_says_why(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"id": "bad"}]')
    code, _, err = run("data", "verify", file, "--policy", "drop", "--out", tmp_path / "b.json")
    assert code == 2 and "See the manifest" in err and not (tmp_path / "b.json").exists()
    summary, finding = (json.loads(line) for line in manifest_path(file).open())
    assert summary["policy"] == "drop" and finding["id"] == "bad"


def test_the_data_itself_is_no_copy(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.json").write_text("[]")
    out = tmp_path / "." / "a.json"
    code, _, err = run("data", "verify", tmp_path / "a.json", "--policy", "drop", "--out", out)
    assert code == 2 and "the data file itself" in err


def test_a_summary_belongs_to_its_data(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([planting.sound_row(7)]))
    assert read_summary(path, LlavaJson(path, tmp_path).fingerprint()) is None
    assert run("data", "verify", path)[0] == 0
    summary = read_summary(path, LlavaJson(path, tmp_path).fingerprint())
    assert summary is not None and summary["rows"] == 1 and summary["policy"] == "error"
    path.write_text(json.dumps([planting.sound_row(17)]))
    assert read_summary(path, LlavaJson(path, tmp_path).fingerprint()) is None


def test_the_number_of_threads_changes_nothing(planted: planting.Planted) -> None:
    source = open_source(planted.file, planted.images)
    one, many = (verify(source, VerifySpec(workers=n)) for n in (1, 4))
    assert one.findings == many.findings


# Perceptual hashes


def test_proposed_pairs_are_all_pairs_within_the_tolerance() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**63, (60, 2), dtype=np.uint64)
    near = bits.copy()
    for row in range(60):
        # Any seven bits of the 128.
        for bit in generator.choice(128, row % 12, replace=False).tolist():
            near[row, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    small = np.zeros((120, 8, 8, 3), np.uint8)
    both = PictureHash(np.concatenate([bits, near]), small, np.zeros((120, 24, 24), np.uint8))
    wanted = [[k, 60 + k] for k in range(60) if k % 12 <= 7]
    assert same_pictures(both).tolist() == wanted
    assert same_pictures(both, first=60).tolist() == wanted
    assert len(same_pictures(stack([]))) == 0


def test_a_picture_is_known_again_in_another_size_and_quality() -> None:
    for seed in range(20):
        picture = planting.scene(seed, 200)
        variants = [
            picture.resize((90, 70)),
            picture.resize((336, 250)),
            planting.PIL.Image.open(planting.io.BytesIO(planting._jpeg(picture, quality=35))),
        ]
        others = [planting.scene(100 + seed, 200), picture.rotate(180)]
        hashes = stack([hash_picture(p.convert("RGB")) for p in [picture, *variants, *others]])
        pairs = same_pictures(hashes).tolist()
        assert [pair for pair in pairs if pair[0] == 0] == [[0, 1], [0, 2], [0, 3]]
        assert not any({4, 5} & set(pair) for pair in pairs)


def page(seed: int) -> PIL.Image.Image:
    """A page with five lines of text, of words that say nothing."""
    rng = np.random.default_rng(seed)
    picture = PIL.Image.new("RGB", (600, 800), "white")
    draw = PIL.ImageDraw.Draw(picture)
    for top in range(40, 150, 22):
        letters = rng.choice(list("abcdefghijklm   "), int(rng.integers(36, 90)))
        draw.text((40, top), "".join(letters), fill="black")
    return picture


def test_pages_of_text_are_told_apart_and_known_again() -> None:
    pages = [page(seed) for seed in range(30)]
    smaller = [one.resize((300, 400)) for one in pages]
    saved = [
        planting.PIL.Image.open(planting.io.BytesIO(planting._jpeg(p, quality=35))) for p in pages
    ]
    hashes = stack([hash_picture(p.convert("RGB")) for p in [*pages, *smaller, *saved]])
    found = same_pictures(hashes).tolist()
    assert {(a % 30, b % 30) for a, b in found} == {(k, k) for k in range(30)}
    assert len(found) == 90


def test_of_pictures_with_next_to_nothing_only_copies_are_the_same() -> None:
    blank = np.full((300, 400, 3), 255, np.uint8)
    dots = [blank.copy() for _ in range(10)]
    for number, levels in enumerate(dots):
        levels[140:150, 40 + 20 * number : 60 + 20 * number] = 0
    pictures = [PIL.Image.fromarray(levels) for levels in (blank, blank, *dots, dots[3])]
    assert same_pictures(stack([hash_picture(p) for p in pictures])).tolist() == [[0, 1], [5, 12]]


@pytest.mark.parametrize("quality", [30, 50, 90])
def test_even_pictures_are_known_again_as_jpeg(quality: int) -> None:
    colors = [(200, 30, 40), (12, 200, 90), (90, 90, 91), (255, 254, 250)]
    even = [PIL.Image.new("RGB", (320, 240), color) for color in colors]
    saved = [PIL.Image.open(planting.io.BytesIO(planting._jpeg(p, quality=quality))) for p in even]
    found = same_pictures(stack([hash_picture(p.convert("RGB")) for p in [*even, *saved]]))
    assert found.tolist() == [[k, 4 + k] for k in range(4)]
