"""Rows, names and boxes as people's files hold them: each is told of, and none ends the command."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import Run
from pumice.core.errors import DataError, PumiceError
from pumice.core.images import open_image
from pumice.data.academic.convert import convert
from pumice.data.open_source import open_source
from pumice.data.verify import VerifySpec, verify
from pumice.recipe.mixture import load_mixture
from tiny import smooth as picture


def row(name: str, answer: str = "yes", image: str | None = None) -> dict[str, Any]:
    slot = "" if image is None else "<image>\n"
    turns = [{"from": "human", "value": f"{slot}{name}?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({} if image is None else {"image": image})


def lines(path: Path, *rows: dict[str, Any] | str) -> Path:
    texts = (entry if isinstance(entry, str) else json.dumps(entry) for entry in rows)
    path.write_text("\n".join(texts) + "\n")
    return path


def kinds(path: Path) -> dict[str, str]:
    """The kind that was found of each row, by its id."""
    report = verify(open_source(path), VerifySpec(workers=1))
    return {finding.id: finding.kind for finding in report.findings}


DEEP = '{"id": "deep", "conversations": ' + "[" * 50_000 + "]" * 50_000 + "}"
DIGITS = '{"id": "digits", "image": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("broken", [DEEP, DIGITS])
def test_json_that_is_more_than_can_be_read_is_a_bad_row(tmp_path: Path, broken: str) -> None:
    assert kinds(lines(tmp_path / "rows.jsonl", row("a"), broken, row("b"))) == {"1": "row"}
    listed = tmp_path / "rows.json"
    listed.write_text(f"[{json.dumps(row('a'))},\n{broken}]")
    with pytest.raises(DataError, match=r"rows\.json, line 2, column 1: this is not valid JSON"):
        open_source(listed)


def test_names_that_no_file_can_have_are_bad_rows(tmp_path: Path) -> None:
    named = row("long", image="x" * 300 + ".jpg"), row("nul", image="a\0.jpg")
    found = kinds(lines(tmp_path / "rows.jsonl", *named, row("good")))
    assert found == {"long": "image_unreadable", "nul": "image_missing"}


@pytest.mark.skipif(
    not hasattr(os, "mkfifo"),
    reason="this system has no named pipes to open",
)
def test_a_pipe_in_the_place_of_an_image_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="is a pipe or a device, not a file"):
        open_image(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("box", ["[nan, 0.1, 0.2, 0.3]", "[0.1, 0.1, inf, 0.3]",
                                 "[1e5, 0.1, 0.2, 0.3]", "[+1.5, 0.1, 0.2, 0.3]"])  # fmt: skip
def test_boxes_of_numbers_that_are_none_are_found(tmp_path: Path, box: str) -> None:
    picture(40, 30).save(tmp_path / "0.png")
    path = lines(tmp_path / "rows.jsonl", row("a", box, "0.png"), row("b", "[0.1, 0.1, 0.2, 0.3]"))
    assert kinds(path) == {"a": "box"}


def test_boxes_of_numbers_that_are_none_are_not_converted(tmp_path: Path) -> None:
    nan, endless = float("nan"), float("inf")
    boxes = [(10, 10, 20, 20), (nan, 10, 20, 20), (10, 10, endless, 20)]
    named = zip(("x", "y", "width", "height"), zip(*boxes, strict=True), strict=True)
    columns = {key: list(values) for key, values in named}
    regions = [
        {"phrase": f"thing {n}", **{key: values[n] for key, values in columns.items()}}
        for n in range(3)
    ]
    (tmp_path / "regions.json").write_text(json.dumps([{"id": 1, "regions": regions}]))
    url = "https://example.org/VG_100K/1.jpg"
    sizes = [{"image_id": 1, "width": 100, "height": 100, "url": url}]
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    files = [tmp_path / "regions.json", tmp_path / "sizes.json"]
    report = convert("vg", files, tmp_path / "vg.json")
    assert report["rounds"] == 1
    assert report["dropped"] == {"box with a number that is none": 2}


@pytest.mark.parametrize(("orientation", "turned"), [(0, False), (6, True), (77, False)])
def test_an_orientation_that_turns_nothing_is_no_find(
    tmp_path: Path, orientation: int, turned: bool
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture(40, 30).save(tmp_path / "0.jpg", exif=exif)
    found = kinds(lines(tmp_path / "rows.jsonl", row("a", image="0.jpg")))
    assert found == ({"a": "image_turned"} if turned else {})


def test_half_a_character_is_a_bad_row_and_stays_as_it_is_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    halves = row("text\ud800"), row("name", image="\udcff.jpg")
    path = lines(Path("rows.jsonl"), *halves, row("good 😀"))
    code, out, err = run("data", "verify", path, "--policy", "report")
    assert code == 0, err
    assert "half a character" in out and r"\udcff.jpg" in out
    manifest = [json.loads(line) for line in (tmp_path / "rows.jsonl.verify.jsonl").open()]
    assert [line["kind"] for line in manifest[1:]] == ["row", "image_missing"]
    assert manifest[1]["id"] == "text\ud800"
    yaml = tmp_path / "mix.yaml"
    yaml.write_text("name: m\nsources:\n  a: {path: rows.jsonl}\n")
    code, _, err = run("data", "mix", yaml, "--out", tmp_path / "mixed.jsonl")
    assert code == 0, err
    mixed = [json.loads(line) for line in (tmp_path / "mixed.jsonl").open()]
    given = {json.dumps(entry | {"source": "a"}) for entry in (*halves, row("good 😀"))}
    assert {json.dumps(entry) for entry in mixed} == given


def test_dialogues_with_half_a_character_or_the_mark_of_an_image_are_dropped(
    tmp_path: Path,
) -> None:
    dialogues = row("half \ud83d"), row("mark", "an <image> tag"), row("good")
    (tmp_path / "sg.json").write_text(json.dumps(dialogues))
    report = convert(
        "sharegpt", [tmp_path / "sg.json"], tmp_path / "o.json", rules={"max_tokens": "null"}
    )
    assert report["rows"] == 1
    assert report["dropped"] == {
        "dialogue with half a character (a lone surrogate)": 1,
        "dialogue that writes <image>, the place of an image": 1,
    }


def test_a_caption_of_no_image_is_a_bad_row(tmp_path: Path) -> None:
    captions = {"id": "lost", "image": None, "caption": "A dog."}, {"id": "text", "text": "A cat."}
    assert kinds(lines(tmp_path / "rows.jsonl", *captions)) == {"lost": "slots", "text": "slots"}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_captions_of_another_encoding_are_named_and_not_changed(tmp_path: Path) -> None:
    picture(40, 30).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"0\.txt: byte 3 is not UTF-8 text"):
        open_source(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n0.png,caf\xe9\n")
    with pytest.raises(DataError, match=r"metadata\.csv: byte 24 is not UTF-8 text"):
        open_source(tmp_path)
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n0.png,{'x' * 200_000}\n")
    source = open_source(tmp_path)
    assert len(source) == 1
    assert len(source[0].messages[-1].text) == 200_000
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, caption in enumerate((b"caf\xe9", b"\xef\xbb\xbfa cat")):
            add(tar, f"{number}.png", (tmp_path / "0.png").read_bytes())
            add(tar, f"{number}.txt", caption)
    shard = open_source(tmp_path / "a.tar")
    with pytest.raises(DataError, match="sample 0: byte 3 of its txt is not UTF-8 text"):
        shard[0]
    assert shard[1].messages[1].text == "a cat"


def test_a_dataset_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a dataset written by save_to_disk"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="cannot be read as a dataset written by save_to_disk"):
        open_source(lines(tmp_path / "rows.jsonl", row("a")), kind="dataset")


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    empty = pa.table({"caption": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet has no rows"):
        open_source(tmp_path / "none.parquet")


def test_keys_that_yaml_reads_as_no_text_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("name: m\nsources:\n  no: {path: a.jsonl}\n")
    with pytest.raises(PumiceError, match="sources has the key False .* keys must be text"):
        load_mixture(str(path))


def test_a_rule_is_given_once(tmp_path: Path, run: Run) -> None:
    rules = "merge=false", "merge=true"
    code, _, err = run("data", "convert", "gqa", *rules, "--out", tmp_path / "o.json")
    assert code == 2 and "rule merge is given twice, as 'false' and 'true'" in err
