"""The world's benchmark files are the official ones: the shelf reads them, and they are true."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval_files import answers_to, dump_lines
from pumice.core.errors import DataError
from pumice.core.types import Request, Result
from pumice.eval.benchmark import Item
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.runner import rescore, run_benchmark, take_evenly
from pumice.eval.video_frames import middle_index, save_middle_frame
from pumice.world import benchmarks_choice
from pumice.world.benchmarks_choice import FPS, NONE_RIGHT, SHOT, TURN
from pumice.world.datasets import make_world

IMAGES = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, images=1, eval_images=IMAGES)
    return folder


@pytest.mark.parametrize("name", BENCHMARKS.names())
def test_every_benchmark_can_be_asked_and_scored(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    benchmark = BENCHMARKS[name]
    items = benchmark.load(world)
    benchmark.prepare(items)
    for item in items:
        if item.image is not None:
            with Image.open(item.image) as picture:
                assert picture.size == (192, 192)
    answers = dump_lines(tmp_path / "answers.jsonl", answers_to(items, benchmark.truth_text))
    scores = rescore(benchmark, world, answers)
    assert scores.metrics is not None and scores.missing == scores.errors == 0
    best = {"mme": scores.metrics.get("perception_most", 0)}.get(name, 100)
    assert set(benchmark.metric_names()) == set(scores.metrics)
    value, base = scores.metrics[benchmark.headline], scores.base_rate[benchmark.headline]
    assert value > 0.9 * best and base < 0.8 * best


def test_vqav2_has_test_questions_to_submit(world: Path) -> None:
    test, dev = (
        BENCHMARKS["vqav2"].with_options({"split": split}).load(world)
        for split in ("test2015", "test-dev2015")
    )
    prompts = {item.id: item.prompt for item in BENCHMARKS["vqav2"].load(world)}
    assert {item.id: item.prompt for item in test} == prompts
    assert 0 < len(dev) < len(test) and {item.id for item in dev} < prompts.keys()
    assert all(item.image is not None and item.image.is_file() for item in test)


def test_mmbench_turns_the_options_and_the_answer_with_them(world: Path) -> None:
    groups: dict[str, list[Item]] = defaultdict(list)
    for name in ("mmbench", "mmbench_cn"):
        for item in BENCHMARKS[name].load(world):
            groups[f"{name} {item.group}"].append(item)
    kept = 0
    for turns in groups.values():
        answers = {item.extra["options"][item.truth] for item in turns}
        assert len(answers) == 1 and [int(item.id) // TURN for item in turns] == [
            *range(len(turns))
        ]
        own = list(turns[0].extra["options"].values())
        last = [own.pop()] if own[-1] == NONE_RIGHT else []
        kept += bool(last)
        assert len(turns) == len(own)
        for turn, item in enumerate(turns):
            shown = own[len(own) - turn :] + own[: len(own) - turn] + last
            assert list(item.extra["options"].values()) == shown
    assert kept == 2


def test_the_middle_frame_shows_the_scene_that_is_asked_about(world: Path, tmp_path: Path) -> None:
    seed = BENCHMARKS["seed_bench"].with_options({"part": "video"})
    items = seed.load(world)
    assert len(items) == 18
    pictures = [np.asarray(Image.open(p)).astype(int) for p in (world / "val2014").iterdir()]
    for item in items:
        video, span, segment = item.extra["video"]
        save_middle_frame(video, span, segment, tmp_path / "frame.png")
        frame = np.asarray(Image.open(tmp_path / "frame.png")).astype(int)
        # One of the held-out pictures, but for what compression does to it.
        assert min(np.abs(frame - picture).mean() for picture in pictures) < 12, item.id
        # And no frame at the border of two scenes: the asked scene has SHOT frames.
        start = segment[0] * (FPS if span == "seconds" else 1) if segment else SHOT
        assert 0 < middle_index(3 * SHOT, FPS, span, segment) - start < SHOT - 1


@pytest.mark.parametrize(
    ("frames", "fps", "span", "segment", "expected"),
    [
        (24, 8, "whole", (), 11),
        (3, 8, "whole", (), 0),
        (1, 8, "whole", (), 0),
        (100, 10, "seconds", (2.0, 4.0), 29),
        (100, 10, "seconds", (8.0, 40.0), 89),
        (100, 29.97, "seconds", (-1, 1.0), 14),
        (100, 10, "seconds", (20.0, 30.0), 99),
        (100, 15, "frames", (10, 21), 15),
        (100, 15, "frames", (90, 400), 94),
    ],
)
def test_the_middle_is_that_of_the_official_sampler(
    frames: int, fps: float, span: str, segment: tuple[float, ...], expected: int
) -> None:
    assert middle_index(frames, fps, span, segment) == expected  # type: ignore[arg-type]


def test_without_pyav_the_videos_are_left_out_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(benchmarks_choice, "can_write_videos", lambda: False)
    with caplog.at_level(logging.WARNING):
        make_world(tmp_path, images=1, eval_images=2)
    assert "PyAV is not installed" in caplog.text
    content = json.loads((tmp_path / "seed_bench" / "SEED-Bench.json").read_text())
    assert {row["data_type"] for row in content["questions"]} == {"image"}


@pytest.mark.parametrize("name", ["mme", "mmbench"])
def test_a_limit_takes_whole_groups(name: str, world: Path) -> None:
    benchmark = BENCHMARKS[name]
    items = benchmark.load(world)
    some = take_evenly(items, len(items) // 3, whole_groups=benchmark.whole_groups)
    groups = {item.group for item in some}
    assert some == [item for item in items if item.group in groups]
    assert len(items) // 5 < len(some) < len(items) // 2


def test_a_broken_video_is_its_items_error_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    make_world(tmp_path / "world", images=1, eval_images=4)
    videos = tmp_path / "world" / "seed_bench" / "videos"
    (videos / "EPIC-KITCHENS" / "1.mp4").write_bytes(b"no video")
    (videos / "EPIC-KITCHENS" / "2.mp4").unlink()
    seed = BENCHMARKS["seed_bench"].with_options({"part": "video"})
    items = seed.load(tmp_path / "world")
    with caplog.at_level(logging.WARNING):
        seed.prepare(items)
    assert "cannot be read" in caplog.text and "is not there" in caplog.text
    assert sum(item.image is not None and item.image.is_file() for item in items) == 16
    with pytest.raises(DataError, match="cannot be read"):
        seed.prepare([item for item in items if item.extra["video"][0].name == "1.mp4"][1:2])

    def answer(requests: Sequence[Request], _: object) -> list[Result]:
        return [Result(id=request.id, text="A") for request in requests]

    scores = run_benchmark(answer, seed, tmp_path / "world", tmp_path / "out")
    assert scores.metrics is None and scores.errors == 2
    # What is wrong with the video, and not that its frame is not in the cache.
    assert "1.mp4: this video cannot be read" in scores.notes[0]


@pytest.mark.parametrize("segment", [None, 5, ["a", "b"], [1.0]])
def test_a_segment_that_is_none_is_its_items_error(
    segment: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    make_world(tmp_path, images=1, eval_images=4)
    file = tmp_path / "seed_bench" / "SEED-Bench.json"
    content = json.loads(file.read_text())
    cut = [row for row in content["questions"] if row["question_type_id"] == 11]
    cut[0]["segment"] = segment
    file.write_text(json.dumps(content))
    seed = BENCHMARKS["seed_bench"].with_options({"part": "video"})
    with caplog.at_level(logging.WARNING):
        seed.prepare(seed.load(tmp_path))
    assert "two numbers, a start and an end, are needed" in caplog.text


def test_frames_of_another_file_of_the_same_name_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    seed = BENCHMARKS["seed_bench"].with_options({"part": "video"})
    images = []
    for number in (0, 1):
        make_world(tmp_path / str(number), images=1, eval_images=4, seed=number)
        item = seed.load(tmp_path / str(number))[0]
        seed.prepare([item])
        assert item.image is not None
        images.append(item.image)
    assert images[0].name == images[1].name
    assert images[0].read_bytes() != images[1].read_bytes()
