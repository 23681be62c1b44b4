"""The order of rows in an epoch, and the batches of every step: functions of the seed alone."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pumice.core.errors import DataError, PumiceError
from pumice.core.types import Sample, user
from pumice.data.loader import WINDOW, Loader
from pumice.data.mixture import Mixture, Part, shuffled
from pumice.data.packing import Packing, Size

# Mixture


class Rows:
    """A source of `count` samples whose texts have lengths of their own."""

    def __init__(self, count: int, name: str = "rows", bad: frozenset[int] = frozenset()) -> None:
        self.name, self.count, self.bad = name, count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Sample:
        if row in self.bad:
            raise DataError(f"sample {self.name}-{row} is broken")
        text = "x" * self.size(row)[0]
        return Sample(f"{self.name}-{row}", (user(text),), f"{self.name}.json, row {row + 1}")

    def size(self, row: int) -> tuple[int, int]:
        return row * 7919 % 400 + 1, 0

    def fingerprint(self) -> str:
        return f"{self.name}-{self.count}"


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    mixture = Mixture([Part(Rows(50, "a")), Part(Rows(30, "b"))], seed=1)
    everything = sorted([(0, i) for i in range(50)] + [(1, i) for i in range(30)])
    orders = [mixture.order(epoch) for epoch in (0, 1, 2)]
    assert len(mixture) == 80
    assert all(sorted(order) == everything for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != everything
    # Mixed, not one source after the other.
    assert 10 < sum(index for index, _ in orders[0][:40]) < 20


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def mixture(seed: int) -> Mixture:
        return Mixture([Part(Rows(40), weight=0.5), Part(Rows(9), cap=4)], seed)

    late = mixture(3)
    late.order(5)
    assert late.order(1) == mixture(3).order(1) != mixture(4).order(1)
    # Written down, because a run must go on in the same order after an upgrade.
    assert shuffled(8, 3, "order", 1).tolist() == [5, 6, 1, 3, 7, 0, 4, 2]


def test_a_cap_keeps_the_same_rows_in_every_epoch() -> None:
    mixture = Mixture([Part(Rows(100), cap=10)], seed=0)
    chosen = {frozenset(mixture.order(epoch)) for epoch in range(4)}
    assert len(chosen) == 1 and len(next(iter(chosen))) == len(mixture) == 10
    assert chosen != {frozenset(Mixture([Part(Rows(100), cap=10)], seed=1).order(0))}
    assert len(Mixture([Part(Rows(5), cap=10)], seed=0)) == 5


@pytest.mark.parametrize(
    ("weight", "epochs", "count"),
    [(0.5, 1, 5), (2.0, 1, 20), (2.5, 1, 25), (1.0, 3, 30), (0.26, 2, 6)],
)
def test_weights_draw_without_replacement(weight: float, epochs: int, count: int) -> None:
    mixture = Mixture([Part(Rows(10), weight, None, epochs)], seed=0)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(7):
        order = mixture.order(epoch)
        assert len(order) == len(mixture) == count
        seen.update(order)
        times = [seen[0, i] for i in range(10)]
        assert max(times) - min(times) <= 1


def test_cap_and_weight_together() -> None:
    mixture = Mixture([Part(Rows(100), weight=2.0, cap=10)], seed=0)
    assert set(Counter(mixture.order(0)).values()) == {2} and len(mixture) == 20


def test_the_fingerprint_tells_mixtures_apart() -> None:
    def mark(seed: int = 0, **fields: Any) -> str:
        return Mixture([Part(Rows(9), **fields)], seed).fingerprint()

    assert mark() == mark()
    assert len({mark(), mark(1), mark(weight=0.5), mark(cap=3), mark(epochs=2)}) == 5


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], "no sources"),
        ([Part(Rows(0, "none"))], "none has no rows"),
        ([Part(Rows(5), weight=0.0)], "a number above 0"),
        ([Part(Rows(5), weight=float("nan"))], "a number above 0"),
        ([Part(Rows(5), weight=0.01)], "less than one row"),
        ([Part(Rows(5), cap=0)], "from 1"),
        ([Part(Rows(5), epochs=0)], "1 or more"),
    ],
)
def test_mixtures_that_make_no_sense(parts: list[Part], expected: str) -> None:
    with pytest.raises(PumiceError, match=expected):
        Mixture(parts, seed=0)


# Loader


@dataclass
class FakeEncoded:
    sample_id: str
    input_ids: list[int]


class FakeProcessor:
    """One token per character; slow at random places, as image files are."""

    image_tokens = 10
    pad_id = 3

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def encode_batch(self, samples: Sequence[Sample], max_tokens: int | None = None) -> list[Any]:
        return [self.encode(sample, max_tokens) for sample in samples]

    def encode(self, sample: Sample, max_tokens: int | None = None) -> Any:
        self.threads.add(threading.current_thread().name)
        length = len(sample.messages[0].text)
        if max_tokens is not None and length > max_tokens:
            raise DataError(f"{sample.id} has {length} tokens of {max_tokens}")
        time.sleep(length % 3 / 2000)
        return FakeEncoded(sample.id, [1] * length)


def make_loader(count: int = 100, **settings: Any) -> Loader:
    mixture = settings.pop("mixture", None) or Mixture([Part(Rows(count))], seed=0)
    defaults: dict[str, Any] = {
        "batch_size": 8,
        "seed": 0,
        "processor": FakeProcessor(),
        "collate": lambda encoded, pad_id: [(e.sample_id, len(e.input_ids)) for e in encoded],
    }
    return Loader(mixture, **{**defaults, **settings})


@pytest.mark.parametrize("grouped", [False, True])
def test_batches_are_the_same_whatever_the_workers_and_wherever_one_starts(grouped: bool) -> None:
    alone = make_loader(group_by_length=grouped, workers=0)
    expected = list(alone.iterate(0, 40))
    for workers in (1, 3):
        loader = make_loader(group_by_length=grouped, workers=workers)
        assert list(loader.iterate(0, 40)) == expected
        assert list(loader.iterate(17, 5)) == expected[17:22]
        assert any("pumice-loader" in name for name in loader.processor.threads)
    # Any order of asking, across epochs (13 steps each) and back.
    for step in (39, 0, 14, 12, 13):
        assert alone.micro_batches_at(step) == expected[step]


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_shows_every_row(grouped: bool) -> None:
    loader = make_loader(100, group_by_length=grouped)
    assert loader.steps_per_epoch == 13
    for epoch in range(3):
        rows = [r for step in range(13) for r in loader.rows_at(13 * epoch + step)]
        times = Counter(rows)
        assert len(rows) == 104 and len(times) == 100
        # The last batch is filled up with the rows the next epoch begins with.
        filled = loader.mixture.order(epoch + 1)[:4]
        assert sorted(rows) == sorted(loader.mixture.order(epoch) + filled)


def test_a_set_smaller_than_a_batch_gives_whole_batches() -> None:
    loader = make_loader(3)
    rows = loader.rows_at(0)
    assert loader.steps_per_epoch == 1 and len(rows) == 8
    assert set(rows) == {(0, 0), (0, 1), (0, 2)}


def test_grouping_by_length_evens_the_batches_out_and_keeps_their_order_random() -> None:
    def waste(loader: Loader) -> int:
        batches = [[length for _, length in loader.micro_batches_at(s)[0]] for s in range(60)]  # type: ignore[attr-defined]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    count = WINDOW * 8 + 80
    grouped, plain = make_loader(count, group_by_length=True), make_loader(count)
    assert waste(grouped) < 0.2 * waste(plain)
    longest = [
        max(length for _, length in grouped.micro_batches_at(step)[0]) for step in range(WINDOW)
    ]  # type: ignore[attr-defined]
    rises = sum(a < b for a, b in zip(longest, longest[1:], strict=False))
    assert 15 < rises < 35
    # Rows stay within their window of the epoch.
    first = [r for step in range(WINDOW) for r in grouped.rows_at(step)]
    assert sorted(first) == sorted(grouped.mixture.order(0)[: WINDOW * 8])
    another = make_loader(count, group_by_length=True, seed=1)
    assert another.rows_at(0) != grouped.rows_at(0)


@pytest.mark.parametrize("grouped", [False, True])
def test_processes_share_the_steps_of_one(grouped: bool) -> None:
    whole = make_loader(group_by_length=grouped)
    shares = [make_loader(group_by_length=grouped, rank=r, world_size=4) for r in range(4)]
    for step in range(30):
        rows = whole.rows_at(step)
        parts = [row for loader in shares for row in loader.micro_rows(rows)]
        assert [len(part) for part in parts] == [2] * 4
        assert sorted(sum(parts, [])) == sorted(whole.rows_at(step))


def test_a_faulty_row_stops_at_its_own_step_and_is_named() -> None:
    rows = Rows(40, "bad")
    mixture = Mixture([Part(rows)], seed=0)
    step, bad = 2, mixture.order(0)[20][1]
    expected = [make_loader(mixture=mixture).micro_batches_at(before) for before in range(step)]
    rows.bad = frozenset({bad})
    for workers in (0, 2):
        batches = make_loader(mixture=mixture, workers=workers).iterate(0, 5)
        assert [next(batches) for _ in range(step)] == expected
        with pytest.raises(DataError, match=f"bad-{bad} is broken"):
            next(batches)


def test_over_long_samples_are_refused_and_never_cut() -> None:
    with pytest.raises(DataError, match=r"rows-\d+ has \d+ tokens of 390"):
        list(make_loader(100, max_tokens=390).iterate(0, 13))
    assert len(list(make_loader(100, max_tokens=400).iterate(0, 13))) == 13


def test_leaving_early_ends_the_threads() -> None:
    before = threading.active_count()
    batches = make_loader(workers=3).iterate(0, 1000)
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_preparing_ahead_is_bounded() -> None:
    processor = FakeProcessor()
    count = 0

    class Counting(FakeProcessor):
        def encode(self, sample: Sample, max_tokens: int | None = None) -> Any:
            nonlocal count
            count += 1
            return processor.encode(sample, max_tokens)

    batches = make_loader(workers=2, processor=Counting()).iterate(0, 1000)
    next(batches)
    time.sleep(0.2)
    assert count <= 8 * 4
    batches.close()  # type: ignore[attr-defined]


def test_collate_gets_the_pad_id_of_the_processor() -> None:
    seen = []
    loader = make_loader(collate=lambda encoded, pad_id: seen.append(pad_id))
    loader.micro_batches_at(0)
    assert seen == [3]


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(PumiceError, match="batch_size is 8 for 3 processes"):
        make_loader(world_size=3)
    with pytest.raises(PumiceError, match="batch_size is 0"):
        make_loader(batch_size=0)
    with pytest.raises(PumiceError, match="micro_batch_size is 3 and a process has 4 rows"):
        make_loader(micro_batch_size=3, world_size=2)
    with pytest.raises(PumiceError, match="workers is -1"):
        make_loader(workers=-1)


class Pictures(Rows):
    """Every other row has an image."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.looked_at: list[int] = []

    def size(self, row: int) -> tuple[int, int]:
        self.looked_at.append(row)
        return 10, row % 2

    def __getitem__(self, row: int) -> Sample:
        self.looked_at.append(row)
        question = user("what?", Path("a.png")) if row % 2 else user("what?")
        return Sample(str(row), (question,), f"row {row}")


def test_the_length_estimate_counts_images() -> None:
    loader = make_loader(mixture=Mixture([Part(Pictures(80))], 0), group_by_length=True)
    kinds = [{row % 2 for _, row in loader.rows_at(step)} for step in range(10)]
    assert all(len(kind) == 1 for kind in kinds) and {0} in kinds and {1} in kinds


def test_no_row_is_read_twice() -> None:
    pictures = Pictures(80)
    loader = make_loader(mixture=Mixture([Part(pictures)], 0), micro_batch_size=4)
    loader.micro_batches_at(0)
    assert pictures.looked_at == [row for _, row in loader.rows_at(0)]


@pytest.mark.parametrize("by_length", [False, True])
def test_grouping_by_modality_leaves_one_mixed_batch_a_window(by_length: bool) -> None:
    mixture = Mixture([Part(Pictures(WINDOW * 8 + 36))], 0)
    loader = make_loader(mixture=mixture, group_by_modality=True, group_by_length=by_length)
    batches = [loader.rows_at(step) for step in range(loader.steps_per_epoch)]
    assert sorted({row for batch in batches for row in batch}) == sorted(mixture.order(0))
    kinds = [{row % 2 for _, row in batch} for batch in batches]
    assert sum(len(kind) == 2 for kind in kinds[:WINDOW]) <= 1
    assert sum(len(kind) == 2 for kind in kinds) <= 2
    assert {0} in kinds[:10] and {1} in kinds[:10]
    assert batches != [
        make_loader(mixture=mixture, group_by_modality=True, seed=1).rows_at(step)
        for step in range(loader.steps_per_epoch)
    ]


class Sizes:
    """One token a character, one view."""

    def __call__(self, row: tuple[int, int]) -> Size:
        return Size(Rows(100).size(row[1])[0], 1)

    def check(self, row: tuple[int, int], encoded: Any) -> None:
        assert self(row).tokens == len(encoded.input_ids)

    def keep(self) -> None:
        pass


def test_packing_shares_the_rows_of_a_step_among_processes() -> None:
    packing = Packing(tokens=500, tiles=5)
    plain = make_loader()
    for processes in (1, 2, 4):
        shares = [
            make_loader(packing=packing, sizes=Sizes(), rank=r, world_size=processes)
            for r in range(processes)
        ]
        for step in range(20):
            batches = [loader.micro_batches_at(step) for loader in shares]
            assert len({len(share) for share in batches}) == 1
            held = [batch for share in batches for batch in share]
            assert all(sum(length for _, length in batch) <= 500 for batch in held)  # type: ignore[attr-defined]
            assert all(0 < len(batch) <= 5 for batch in held)  # type: ignore[arg-type]
            assert sorted(sum(held, [])) == sorted(plain.micro_batches_at(step)[0])  # type: ignore[arg-type,type-var]
