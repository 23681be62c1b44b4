"""pumice data mix: shares, counts that must come out, hashes of what was chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from academic_files import make
from conftest import Run
from eval_files import dump
from pumice.core.errors import DataError, PumiceError
from pumice.data.loader import Loader
from pumice.data.mix import Expected, MixPart, read_record, record_path, write_mix
from pumice.data.mixture import Mixture, Part
from pumice.data.open_source import open_source
from pumice.data.sources import LlavaJson
from pumice.data.written_rows import stored_images
from pumice.processing.processor import Processor
from pumice.recipe.mixture import load_mixture, mixture_names
from pumice.train.data_card import card_text, data_card
from pumice.train.stages import DataSpec
from source_files import WRITERS, bytes_of, picture


def rows(name: str, count: int, *, image: str | None = None) -> list[dict[str, Any]]:
    asked = "Hi" if image is None else "<image>\nHi"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "Ho"}]
    shown = {} if image is None else {"image": image}
    return [{"id": f"{name}{n}", **shown, "conversations": turns} for n in range(count)]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """text.json (5 rows) and seen.json (10 rows, 2 images below pictures/)."""
    dump(tmp_path / "text.json", rows("t", 5))
    seen = rows("s", 6, image="a/0.jpg") + rows("u", 4, image="a/b/1.jpg")
    dump(tmp_path / "seen.json", seen)
    (tmp_path / "pictures").mkdir()
    return tmp_path


def mixture(folder: Path, **keys: Any) -> Path:
    content = {
        "name": "two",
        "sources": {
            "text": {"path": "text.json"},
            "seen": {"path": "seen.json", "images": "pictures"},
        },
    }
    for key, value in keys.items():
        place, *below = key.split("__")
        node: Any = content if place in ("seed", "images", "expect") else content["sources"][place]
        if not below:
            content[place] = value
            continue
        node[below[0]] = value
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def mixed(file: Path, run: Run, *more: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    out = file.parent / "train.jsonl"
    code, told, err = run("data", "mix", file, "--out", out, "--json", *more)
    assert code == 0, err
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    return lines, json.loads(told)


def test_every_row_of_every_source_comes_and_is_counted(sources: Path, run: Run) -> None:
    lines, record = mixed(mixture(sources), run)
    assert sorted(line["id"] for line in lines) == sorted(
        [f"t{n}" for n in range(5)] + [f"s{n}" for n in range(6)] + [f"u{n}" for n in range(4)]
    )
    # An image is named below the one directory of the mixture.
    assert {line.get("image") for line in lines} == {
        None, "pictures/a/0.jpg", "pictures/a/b/1.jpg",
    }  # fmt: skip
    assert {line["source"] for line in lines} == {"text", "seen"}
    told = {key: record[key] for key in ("rows", "with_image", "without_image", "images")}
    assert told == {"rows": 15, "with_image": 10, "without_image": 5, "images": 2}
    seen = record["sources"]["seen"]
    assert (seen["rows"], seen["with_image"], seen["without_image"]) == (10, 10, 0)
    assert seen["folders"] == {"pictures/a": 6, "pictures/a/b": 4}
    assert record == json.loads(record_path(sources / "train.jsonl").read_text())
    assert len(LlavaJson(sources / "train.jsonl", sources)) == 15


def test_shares_are_drawn_by_the_seed(sources: Path, run: Run) -> None:
    file = mixture(sources, seen__weight=0.5, text__epochs=2)
    lines, record = mixed(file, run)
    ids = [line["id"] for line in lines]
    told = sorted(name for name in ids if name.startswith("t"))
    assert told == sorted([f"t{n}" for n in range(5)] * 2) and len(ids) == 15
    again, same = mixed(file, run)
    assert [line["id"] for line in again] == ids and same == record
    _, other = mixed(file, run, "--seed", "1")
    assert other["ids_sha256"] != record["ids_sha256"] and other["rows"] == record["rows"]
    capped, told = mixed(mixture(sources, seen__cap=3), run)
    assert told["sources"]["seen"]["rows"] == 3 and len(capped) == 8
    assert told["sources"]["seen"]["rows_there"] == 10


def test_the_hash_of_ids_is_of_the_choice_and_not_of_the_order(sources: Path, run: Run) -> None:
    _, one = mixed(mixture(sources), run)
    _, two = mixed(mixture(sources), run, "--seed", "5")
    assert one["ids_sha256"] == two["ids_sha256"] and one["sha256"] != two["sha256"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"seen__expect": {"rows": 11}}, "seen has 10 rows, expected 11"),
        ({"seen__expect": {"with_image": 9}}, "seen has 10 rows with an image, expected 9"),
        ({"text__expect": {"without_image": 4}}, "text has 5 rows without an image, expected 4"),
        ({"seen__expect": {"images": 3}}, "seen has 2 different images, expected 3"),
        ({"seen__expect": {"folders": {"pictures/a/b": 5}}},
         "seen has 4 rows with images below pictures/a/b, expected 5"),
        ({"expect": {"rows": 16}}, "the whole mixture has 15 rows, expected 16"),
    ],
)  # fmt: skip
def test_other_counts_are_an_error_and_nothing_is_written(
    sources: Path, run: Run, keys: dict[str, Any], told: str
) -> None:
    file, out = mixture(sources, **keys), sources / "train.jsonl"
    code, _, err = run("data", "mix", file, "--out", out)
    assert code == 2 and told in err and "--accept" in err
    assert sorted(path.name for path in sources.iterdir()) == [
        "mixture.yaml", "pictures", "seen.json", "text.json",
    ]  # fmt: skip


def test_a_folder_may_be_called_as_a_count_is(sources: Path, run: Run) -> None:
    (sources / "pictures").rename(sources / "images")
    folders = {"images": 10, "rows": 0}
    expect = {"rows": 10, "images": 2, "folders": folders}

    def told(expect: dict[str, Any]) -> str:
        file = mixture(sources, seen__images="images", seen__expect=expect)
        code, _, err = run("data", "mix", file, "--out", sources / "n.jsonl")
        assert code == 2
        return err

    _, record = mixed(mixture(sources, seen__images="images", seen__expect=expect), run)
    assert record["sources"]["seen"]["images"] == 2
    # The count of the folder does not stand for that of different images.
    assert "seen has 2 different images, expected 10" in told(expect | {"images": 10})
    below = told(expect | {"folders": {"images": 9}})
    assert "seen has 10 rows with images below images, expected 9" in below


def test_all_that_is_missing_is_named_at_once(sources: Path, run: Run) -> None:
    (sources / "seen.json").unlink()
    (sources / "pictures").rmdir()
    for name in ("a file", "1.tar"):
        (sources / name).touch()
    file = mixture(sources, images="a file", text__path="{0..2}.tar", text__images="pictures")
    code, _, err = run("data", "mix", file, "--out", sources / "new" / "train.jsonl")
    assert code == 2 and "1.tar" not in err and "--root" in err
    for name in ("seen.json", "0.tar", "2.tar", "pictures", "a file (a file, no directory)"):
        assert err.count(str(sources / name)) == 1, name
    assert not (sources / "new").exists()


def test_what_cannot_be_written_is_refused_first(sources: Path, run: Run) -> None:
    file = mixture(sources)
    for out, told in ((sources, "is a directory"), (sources / "o.json", "allowed: .jsonl")):
        code, _, err = run("data", "mix", file, "--out", out)
        assert code == 2 and told in err
    assert not list(sources.glob("*.part")) and not (sources / "o.json").exists()


def test_accepted_counts_are_recorded(sources: Path, run: Run) -> None:
    file = mixture(sources, seen__expect={"rows": 11}, text__expect={"rows": 5},
                   expect={"rows": 16})  # fmt: skip
    _, record = mixed(file, run, "--accept", "seen")
    assert record["sources"]["seen"]["accepted"] and not record["sources"]["text"]["accepted"]
    assert record["sources"]["seen"]["expected"]["rows"] == 11
    code, _, err = run("data", "mix", file, "--out", sources / "x.jsonl", "--accept", "sen")
    assert code == 2 and "no source of two" in err
    # What is accepted of one source says nothing of another.
    file = mixture(sources, seen__expect={"rows": 11}, text__expect={"rows": 6})
    code, _, err = run("data", "mix", file, "--out", sources / "x.jsonl", "--accept", "seen")
    assert code == 2 and "text has 5 rows, expected 6" in err and "seen has" not in err


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"text__wieght": 2.0}, "'weight'"),
        ({"text__cap": 0}, "sources.text.cap"),
        ({"text__expect": {"row": 1}}, "known here: rows, with_image"),
        ({"seed": "x"}, "^mixture not valid: seed is 'x'"),
    ],
)
def test_wrong_keys_are_named(sources: Path, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(PumiceError, match=told):
        load_mixture(str(mixture(sources, **keys)))
    with pytest.raises(PumiceError, match="Did you mean 'llava15-665k'"):
        load_mixture("llava15-655k")


def write_captions(folder: Path) -> Path:
    """A folder of pictures whose captions are in a table."""
    (folder / "captions").mkdir()
    for number in range(3):
        (folder / f"captions/{number}.png").write_bytes(picture(f"{number}a.png"))
    lines = [f"{number}.png,Seen {number}" for number in range(3)]
    (folder / "captions/metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    return folder / "captions"


def write_parts(folder: Path) -> Path:
    """Chats whose parts hold what LLaVA's layout cannot say: its mark as text, a system text."""
    (folder / "0.png").write_bytes(picture("0a.png"))
    asked = [{"type": "text", "text": "Is <image> a word? "}, {"type": "image"}]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "Yes."},
    ]
    (folder / "parts.jsonl").write_text(json.dumps({"images": ["0.png"], "messages": turns}))
    return folder / "parts.jsonl"


@pytest.mark.parametrize(
    "writer", [*WRITERS.values(), write_captions, write_parts], ids=lambda writer: writer.__name__
)
def test_what_a_source_gives_the_mixed_file_gives(
    writer: Callable[[Path], Path], tmp_path: Path
) -> None:
    for name in ("in", "pictures"):
        (tmp_path / name).mkdir()
    source = open_source(writer(tmp_path / "in"), question="What is it?")
    out = tmp_path / "out" / "train.jsonl"
    part = MixPart(name="one", source=source)
    record = write_mix([part], out, name="m", seed=0, images=tmp_path / "pictures")
    mixed = LlavaJson(out, tmp_path / "pictures")
    given = {sample.id: sample for sample in map(mixed.__getitem__, range(len(mixed)))}
    assert len(given) == len(source) == record["rows"]
    pictures = set()
    for row in range(len(source)):
        sample = source[row]
        assert bytes_of(given[sample.id]) == bytes_of(sample)
        pictures |= {part.image for part in sample.images if isinstance(part.image, bytes)}
    # Only what was inside a file is written, and once.
    stored = stored_images(out)
    written = {path.read_bytes() for path in stored.iterdir()} if pictures else set()
    assert written == pictures and record["images_written"] == len(pictures)
    assert stored.exists() == bool(pictures)


def test_nothing_is_left_of_a_mixture_that_does_not_come_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = open_source(WRITERS["parquet"](tmp_path / "in"))
    part = MixPart(name="one", source=source, expected=Expected(images=1))
    out = tmp_path / "out" / "train.jsonl"
    with pytest.raises(DataError, match="expected 1"):
        write_mix([part], out, name="m", seed=0, images=tmp_path)
    assert list(out.parent.iterdir()) == []


def test_a_picture_inside_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    table = pa.Table.from_pylist([{"id": "x", "image": {"bytes": b"no"}, "conversations": turns}])
    pq.write_table(table, tmp_path / "a.parquet")
    part = MixPart(name="one", source=open_source(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"'x' \(.*a.parquet, row 1\).*not an image"):
        write_mix([part], tmp_path / "out.jsonl", name="m", seed=0, images=tmp_path)


def test_a_source_is_not_overwritten(sources: Path) -> None:
    part = MixPart(name="one", source=LlavaJson(sources / "text.json", sources))
    with pytest.raises(PumiceError, match="is a source"):
        write_mix([part], sources / "text.json", name="m", seed=0, images=sources)


# The real mixture

RECOUNT = {
    "llava-instruct": 157_712, "sharegpt": 40_688, "vqav2": 82_783, "gqa": 72_140, "okvqa": 8_998,
    "ocrvqa": 80_000, "aokvqa": 66_160, "textcaps": 21_953, "refcoco": 48_447, "vg": 86_417,
}  # fmt: skip


def test_the_shipped_mixture_is_the_recount() -> None:
    assert mixture_names() == ["llava15-558k", "llava15-665k", "llava15-665k-published"]
    whole, _ = load_mixture("llava15-665k")
    expects = {name: entry.expect for name, entry in whole.sources.items()}
    assert {name: expect and expect.rows for name, expect in expects.items()} == RECOUNT
    for name, expect in expects.items():
        assert expect is not None
        assert (expect.with_image, expect.without_image) == (
            (0, RECOUNT[name]) if name == "sharegpt" else (RECOUNT[name], 0)
        )
    assert whole.expect is not None and whole.expect.rows == sum(RECOUNT.values()) == 665_298
    assert whole.expect.with_image == 665_298 - 40_688
    published, _ = load_mixture("llava15-665k-published")
    expect = published.sources["mix665k"].expect
    assert expect is not None
    coco = ("llava-instruct", "vqav2", "okvqa", "aokvqa", "refcoco")
    assert expect.folders["coco"] == sum(RECOUNT[name] for name in coco)
    assert sum(expect.folders.values()) == expect.with_image == whole.expect.with_image


def test_a_source_of_the_shipped_mixture_that_is_short_is_named(
    world: Path, tmp_path: Path, run: Run
) -> None:
    for source in RECOUNT:
        make(world, source, tmp_path / "converted" / f"{source}.json")
    out = tmp_path / "mix.jsonl"
    asked = ("data", "mix", "llava15-665k", "--root", tmp_path, "--out", out)
    code, _, err = run(*asked)
    assert code == 2 and "expected 82,783" in err and "vqav2 has 6 rows" in err
    accepted = [word for source in RECOUNT for word in ("--accept", source)]
    code, told, _ = run(*asked, *accepted, "--json")
    record = json.loads(told)
    assert code == 0 and set(record["sources"]) == set(RECOUNT)
    assert record["without_image"] == record["sources"]["sharegpt"]["rows"] > 0
    source = LlavaJson(out, tmp_path)
    assert len([source[row] for row in range(len(source))]) == record["rows"]


# What a run says


def test_processes_and_workers_change_no_rows(sources: Path, processor: Processor) -> None:
    def parts() -> Mixture:
        return Mixture(
            [Part(LlavaJson(sources / "text.json", sources), 0.6),
             Part(LlavaJson(sources / "seen.json", sources), cap=7, epochs=2)], seed=3,
        )  # fmt: skip

    whole = parts()
    expected = sorted(whole.order(0))
    for world_size in (1, 2, 4):
        for workers in (0, 2):
            loaders = [
                Loader(parts(), processor, 4, seed=3, workers=workers, rank=rank,
                       world_size=world_size)
                for rank in range(world_size)
            ]  # fmt: skip
            assert {loader.mixture.rows_hash() for loader in loaders} == {whole.rows_hash()}
            seen = [
                row
                for step in range(loaders[0].steps_per_epoch)
                for loader in loaders
                for micro in loader.micro_rows(loader.rows_at(step))
                for row in micro
            ]
            filled = loaders[0].steps_per_epoch * 4 - len(whole)
            assert len(seen) == len(expected) + filled
            assert all(seen.count(row) >= expected.count(row) for row in expected)


def test_the_hash_of_rows_changes_with_the_choice(sources: Path) -> None:
    def hashed(seed: int, **share: Any) -> str:
        return Mixture([Part(LlavaJson(sources / "seen.json", sources), **share)], seed).rows_hash()

    assert hashed(0) == hashed(1)
    assert hashed(0, weight=0.5) != hashed(1, weight=0.5)
    assert hashed(0, cap=9) not in {hashed(0), hashed(0, cap=8)}
    assert hashed(0, epochs=2) != hashed(0)
    before = hashed(0)
    dump(sources / "seen.json", rows("z", 10, image="a/0.jpg"))
    assert hashed(0) != before


def test_the_card_of_a_run_names_the_mixture(sources: Path, run: Run) -> None:
    _, record = mixed(mixture(sources), run)
    out = sources / "train.jsonl"
    spec = DataSpec(path=out, images=sources)
    (card,) = data_card([spec], sources)
    assert card["mixture"] == record
    assert f"15 rows of two (ids {record['ids_sha256'][:12]})" in card_text(card)
    with out.open("a") as file:
        file.write(json.dumps(rows("n", 1)[0]) + "\n")
    (card,) = data_card([spec], sources)
    assert card["mixture"] is None and read_record(out, "other") is None
