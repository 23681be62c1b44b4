"""Both pocket backbones train side by side; neither outlives a failure of the other."""

from __future__ import annotations

import functools
import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pumice.world.backbones import Report, run_together
from pumice.world.lessons import PATCHES, ROW_END, TILED, Draft
from pumice.world.scenes import COLUMNS, ROWS, random_scene


class Bar:
    """Keeps what it is told."""

    def __init__(self, stop: bool = False) -> None:
        self.done, self.stop = 0, stop
        self.fields: dict[str, Any] = {}

    def update(self, n: int = 1, **fields: Any) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.done += n
        self.fields.update(fields)


def counts(number: int, report: Report) -> None:
    for step in range(number):
        report(step + 1, 1 / (step + 1))


def fails(report: Report) -> None:
    sys.exit(3)


def never_ends(file: Path, report: Report) -> None:
    file.touch()
    report(1, 0.5)
    while True:
        time.sleep(0.05)
        file.touch()


def test_the_last_step_of_each_is_shown() -> None:
    bar = Bar()
    jobs = {"one": functools.partial(counts, 40), "two": functools.partial(counts, 2)}
    assert run_together(jobs, bar) == ""
    assert bar.done == 42
    assert bar.fields == {"one": "40 steps, loss 0.025", "two": "2 steps, loss 0.500"}


def test_a_failure_stops_the_other(tmp_path: Path) -> None:
    jobs = {"bad": fails, "good": functools.partial(never_ends, tmp_path / "alive")}
    assert "bad ended with exit code 3" in run_together(jobs, Bar())
    assert not multiprocessing.active_children()


def test_ctrl_c_stops_both(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    jobs = {file.name: functools.partial(never_ends, file) for file in files}
    with pytest.raises(KeyboardInterrupt):
        run_together(jobs, Bar(stop=True))
    assert not multiprocessing.active_children()


class OneTokenPerCharacter:
    bos_token_id = 1


def test_what_does_not_fit_is_left_out_with_its_turn() -> None:
    from pumice.world.language_backbone import TEXT_TOKENS, Scribe

    scribe = Scribe.__new__(Scribe)
    scribe.tokenizer = OneTokenPerCharacter()

    def length(scene: Any, *pieces: tuple[str | None, float]) -> int:
        draft = Draft(scene, list(pieces))
        texts = iter([5] * len(text) for text, _ in pieces if text is not None)
        ids, weights = scribe._row(draft, texts, PATCHES)
        assert len(ids) == len(weights)
        return len(ids)

    scene = random_scene(random.Random(0).randrange(1000))
    turn = (("q" * 40, 0.1), ("a" * 7, 1.0), ("</s>", 1.0))
    assert length(None, *turn, *turn) == 1 + 51
    assert length(scene, (None, 0.0), *turn) == 1 + PATCHES + 51
    # Nothing fits after the scene: the scene alone is left.
    assert length(scene, (None, 0.0), ("a" * TEXT_TOKENS, 1.0), (".", 0.0)) == 1 + PATCHES
    # A caption has no end mark and is kept whole.
    assert length(scene, (None, 0.0), ("c" * 300, 1.0)) == 1 + PATCHES + 300


def test_a_wide_scene_in_tiles_says_everything_there_and_places_in_the_whole() -> None:
    for index in range(60):
        scene = random_scene(9_000_000 + index)
        words = TILED.words(scene, random.Random(index))
        assert len(words) == TILED.positions == PATCHES + 12 * 13
        whole, rows = words[:PATCHES], [words[PATCHES + 13 * row :][:13] for row in range(12)]
        assert all(row[-1] == [ROW_END] and [ROW_END] not in row[:-1] for row in rows)
        told = {word for row in rows for position in row for word in position}
        for thing in scene.things:
            # A word may be dropped from the one patch a small thing covers.
            named = {"sign", thing.word} if thing.is_sign else {thing.shape, thing.color}
            assert named & told
            # Its place is said where it stands in the whole.
            patches = [p for p in whole if {thing.shape, "sign"} & set(p)]
            assert all(len(set(p) & {*ROWS, *COLUMNS}) == 2 for p in patches)
        if scene.sign:
            assert not any(scene.sign.word in position for position in whole)


def test_the_cycles_are_the_whole_training() -> None:
    from pumice.world.language_backbone import cycles

    steps = [step for cycle in cycles(1300) for step in cycle.steps]
    assert steps == list(range(1300))
    assert [cycle.tiled > 0 for cycle in cycles(1300)] == [False, False, True]
