"""Several processes ask one benchmark: the files of one process, or an explicit missing count."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from eval_files import Scripted, vqa_files
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.prediction_files import PREDICTIONS
from pumice.eval.ranks import Ranks, image_of, neighbours
from pumice.eval.runner import SCORES, run_benchmark

HERE = Path(__file__).parent


def ask_together(processes: int, *args: object) -> list[int]:
    """Runs eval_rank.py as torchrun would; the exit code of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "eval_rank.py"), *map(str, args)]
    started = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)})
        for rank in range(processes)
    ]
    return [process.wait(120) for process in started]


def scores_in(folder: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((folder / SCORES).read_text())
    return scores


def test_two_processes_write_the_files_of_one(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    data = tmp_path / "data"
    items = vqa.load(vqa_files(data))
    run_benchmark(Scripted(items), vqa, data, tmp_path / "one", weights="w")
    assert ask_together(2, data, tmp_path / "two") == [0, 0]
    for name in (PREDICTIONS, SCORES):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    asked = [(tmp_path / "two" / f"asked.{rank}").read_text().split("\n") for rank in (0, 1)]
    assert sorted(asked[0] + asked[1]) == sorted(item.id for item in items)
    assert [len(part) for part in asked] == [6, 6]
    assert not list((tmp_path / "two").glob("predictions.rank*"))


def test_a_process_that_dies_leaves_a_missing_count(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    data = tmp_path / "data"
    items = vqa.load(vqa_files(data))
    codes = ask_together(2, data, tmp_path / "two", 2)
    assert codes == [0, -9]
    cut = scores_in(tmp_path / "two")
    # VQAv2 counts what was not answered as wrong; what was not asked is neither.
    assert cut["metrics"] is None and (cut["n"], cut["missing"]) == (12, 4)
    assert "has not finished: 4 of 12 items" in cut["notes"][0]
    again = Scripted(items)
    run_benchmark(again, vqa, data, tmp_path / "two", weights="w")
    assert len(again.asked) == 4
    whole = run_benchmark(Scripted(items), vqa, data, tmp_path / "one", weights="w")
    assert whole.metrics == scores_in(tmp_path / "two")["metrics"]


def test_files_of_processes_that_were_killed_are_taken_up(tmp_path: Path) -> None:
    vqa = BENCHMARKS["vqav2"]
    items = vqa.load(vqa_files(tmp_path))
    run_benchmark(Scripted(items), vqa, tmp_path, tmp_path / "whole", weights="w")
    lines = (tmp_path / "whole" / PREDICTIONS).read_text().splitlines(keepends=True)
    out = tmp_path / "out"
    out.mkdir()
    for rank in range(3):
        own = "".join(lines[rank:9:3])
        (out / f"predictions.rank-{rank}.jsonl").write_text(own[:-7] if rank == 1 else own)
    again = Scripted(items)
    run_benchmark(again, vqa, tmp_path, out, weights="w")
    assert len(again.asked) == 4
    for name in (PREDICTIONS, SCORES):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_shares_part_the_items_and_leave_images_whole(tmp_path: Path) -> None:
    items = BENCHMARKS["vqav2"].load(vqa_files(tmp_path))
    # As POPE does it: the images come round again and again.
    mixed = [*items[::3], *items[1::3], *items[2::3]]
    for size in (1, 2, 3, 5):
        shares = [Ranks(rank, size).share(mixed) for rank in range(size)]
        assert sorted(item.id for share in shares for item in share) == sorted(
            item.id for item in items
        )
        images = [{image_of(item) for item in share} for share in shares]
        assert sum(map(len, images)) == 4
    order = [image_of(item) for item in neighbours(mixed)]
    assert sum(a != b for a, b in zip(order, order[1:], strict=False)) == 3
