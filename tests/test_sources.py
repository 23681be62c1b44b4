"""Sources at scale: the same rows in every kind of file, shards in blocks, images inside files."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pumice.core.errors import DataError, PumiceError
from pumice.core.types import assistant
from pumice.data import parquet_source
from pumice.data.blocks import Blocks, blockwise
from pumice.data.loader import Loader
from pumice.data.mixture import Mixture, Part, shuffled
from pumice.data.open_source import SOURCES, open_source
from pumice.data.sources import Source
from pumice.processing.processor import Processor
from source_files import (
    COUNT,
    WRITERS,
    add,
    bytes_of,
    picture,
    rows,
    write_json,
    write_parquet,
    write_shards,
)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_rows_in_every_kind_of_file_are_the_same_samples(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "other").mkdir()
    wanted = open_source(write_json(tmp_path / "json"))
    path = WRITERS[kind](tmp_path / "other")
    source = open_source(path)
    assert len(source) == COUNT
    for row in np.random.RandomState(0).permutation(COUNT).tolist():
        assert source[row].id == wanted[row].id
        assert bytes_of(source[row]) == bytes_of(wanted[row])
        assert source.size(row) == wanted.size(row)
    assert source[3].source != source[4].source and str(path.parent) in source[3].source
    assert open_source(path, kind=kind).fingerprint() == source.fingerprint()
    with pytest.raises(IndexError):
        source[COUNT]


def test_every_kind_of_the_table_is_tried_here() -> None:
    assert set(SOURCES.names()) == {*WRITERS, "folder"}


# Tar shards


def test_shards_of_a_pattern_and_names_longer_than_a_header_holds(tmp_path: Path) -> None:
    write_shards(tmp_path, long="deep/" * 30)
    source = open_source(tmp_path / "{000..002}.tar")
    assert len(source) == COUNT and source[11].id == "row11"
    assert len(open_source(tmp_path / "00[01].tar")) == 10
    with pytest.raises(DataError, match=r"no file is named .*003\.tar"):
        open_source(tmp_path / "{000..003}.tar")


def test_captions_answer_the_question(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/1.jpg", picture("1"))
        add(tar, "x/1.txt", b"A cat.\n")
        add(tar, "x/2.json", json.dumps({"caption": "A dog.", "width": 3}).encode())
        add(tar, "x/2.png", picture("2"))
    source = open_source(tmp_path / "a.tar", question="What?")
    assert [source[k].id for k in (0, 1)] == ["1", "2"]
    assert bytes_of(source[0]) == [("user", [picture("1"), "\nWhat?"]), ("assistant", ["A cat."])]
    assert source[1].messages[1] == assistant("A dog.")
    assert source.size(1) == (6, 1)


def test_members_of_no_sample_are_said_to_be_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "LICENCE", b"free")
        add(tar, "1.jpg", picture("1"))
        add(tar, "1.txt", b"A cat.")
    assert len(open_source(tmp_path / "a.tar")) == 1
    assert "1 members belong to no sample, such as 'LICENCE'" in caplog.text


def test_tar_files_that_cannot_be_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    whole = (tmp_path / "000.tar").read_bytes()
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "1.txt", b"x")
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 - 700])
    (tmp_path / "between.tar").write_bytes(whole[:1024])
    (tmp_path / "joined.tar").write_bytes(whole + (tmp_path / "001.tar").read_bytes())
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name in ("1.txt", "1.txt"):
            add(tar, name, b"x")
    with tarfile.open(tmp_path / "fewer.tar", "w") as tar:
        add(tar, "1.json", json.dumps(rows()[1]).encode())
        add(tar, "1.png", picture("1"))
    with pytest.raises(DataError, match="unpack it with gunzip"):
        open_source(tmp_path / "packed.tar")
    for name in ("cut.tar", "between.tar"):
        with pytest.raises(DataError, match=r"cannot be read as a tar shard \(it was cut"):
            open_source(tmp_path / name)
    with pytest.raises(DataError, match="it goes on after its end mark"):
        open_source(tmp_path / "joined.tar")
    with pytest.raises(DataError, match="two members end in 'txt'"):
        open_source(tmp_path / "twice.tar")[0]
    with pytest.raises(DataError, match="names 2 images and the shard holds 1"):
        open_source(tmp_path / "fewer.tar")[0]


# Parquet and datasets


def test_of_a_parquet_file_few_row_groups_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "_KEPT", 2)
    source = open_source(write_parquet(tmp_path))
    assert isinstance(source, parquet_source.ParquetFiles)
    for row in range(COUNT):
        source[row]
    assert len(source._kept) == 2
    assert "other" not in source.content(0)


def test_tables_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the columns a; some of id, image"):
        open_source(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read as a parquet file"):
        open_source(tmp_path / "b.parquet")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows())})
    both.save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match=r"several splits \(train\).*dict/train"):
        open_source(tmp_path / "dict")
    assert len(open_source(tmp_path / "dict" / "train")) == COUNT
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no training data that is known"):
        open_source(tmp_path / "empty")
    with pytest.raises(PumiceError, match="Did you mean 'parquet'"):
        open_source(tmp_path / "a.parquet", kind="parket")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(PumiceError, match=r"Install pumice\[data\]"):
        open_source(tmp_path / "a.parquet")


# Folders


def test_folders_of_pictures_with_captions(tmp_path: Path) -> None:
    for way in ("jsonl", "csv", "txt"):
        folder = tmp_path / way
        (folder / "sub").mkdir(parents=True)
        table = [{"file_name": "a.png", "text": "A cat."}]
        table.append({"file_name": "sub/b.png", "text": "A dog."})
        for entry in table:
            (folder / entry["file_name"]).write_bytes(picture(entry["file_name"]))
        if way == "jsonl":
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
        elif way == "csv":
            with (folder / "metadata.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["file_name", "text"])
                writer.writeheader()
                writer.writerows(table)
        else:
            for entry in table:
                (folder / entry["file_name"]).with_suffix(".txt").write_text(entry["text"] + "\n")
        source = open_source(folder, question="What?")
        expected = [picture("sub/b.png"), "\nWhat?"]
        assert bytes_of(source[1]) == [("user", expected), ("assistant", ["A dog."])]
        assert len(source) == 2
    (tmp_path / "txt" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 2 pictures have no caption: a\.png"):
        open_source(tmp_path / "txt")


# Order


def test_a_blockwise_order_holds_every_row_and_stays_near() -> None:
    chosen = np.sort(np.random.RandomState(0).permutation(100)[:70])
    blocks = Blocks(np.arange(0, 100, 10), together=2)

    def permute(size: int, *key: int | str) -> Any:
        return shuffled(size, 3, *key)

    order = blockwise(chosen, blocks, permute)
    assert sorted(order.tolist()) == chosen.tolist() and order.tolist() != chosen.tolist()
    counts = np.bincount(chosen // 10)
    at, seen = 0, set()
    while at < len(order):
        # The next two blocks, whole and mixed.
        first = order[at] // 10
        other = next(
            r // 10 for r in [*order[at:], order[-1]] if r // 10 != first or r == order[-1]
        )
        length = counts[first] + (counts[other] if other != first else 0)
        assert set((order[at : at + length] // 10).tolist()) <= {first, other}
        seen |= {int(first), int(other)}
        at += length
    assert seen == set(range(10))


def test_shards_are_mixed_with_other_sources_but_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pumice.data.tar_source._TOGETHER", 1)
    write_shards(tmp_path, per_shard=3)
    shards, plain = open_source(tmp_path), open_source(write_json(tmp_path))

    def mixture(source: Source) -> Mixture:
        return Mixture([Part(source), Part(plain, 2.0)], seed=5)

    orders = [mixture(shards).order(epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == sorted(
            [(0, k) for k in range(12)] + [(1, k) for k in range(12)] * 2
        )
        visits = [row // 3 for source, row in order if source == 0]
        assert [visits[k] for k in range(0, 12, 3)] == list(dict.fromkeys(visits))
        assert 0 < sum(source == 0 for source, _ in order[:18]) < 12
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_ranks_threads_and_restarts_share_the_rows_of_shards(
    tmp_path: Path, kind: str, processor: Processor
) -> None:
    source = open_source(WRITERS[kind](tmp_path))

    def loader(rank: int = 0, ranks: int = 1, workers: int = 0) -> Loader:
        return Loader(
            Mixture([Part(source)], 1),
            processor,
            4,
            1,
            rank=rank,
            world_size=ranks,
            workers=workers,
        )

    whole = [batch.sample_ids for (batch,) in loader().iterate(0, 6)]
    assert sorted(sum(whole[:3], [])) == sorted(f"row{k}" for k in range(COUNT))
    halves = [[b.sample_ids for (b,) in loader(rank, 2, 3).iterate(0, 6)] for rank in (0, 1)]
    for step in range(6):
        assert sorted(halves[0][step] + halves[1][step]) == sorted(whole[step])
    assert [b.sample_ids for (b,) in loader(workers=2).iterate(4, 2)] == whole[4:]
