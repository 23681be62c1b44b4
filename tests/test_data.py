"""data: rows of LLaVA's files, their order in an epoch, and the batches of every step."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pumice.core.errors import DataError, PumiceError
from pumice.core.types import ImagePart, Message, Sample, TextPart, assistant, user
from pumice.data.loader import WINDOW, Loader
from pumice.data.mixture import Mixture, Part, shuffled
from pumice.data.sources import LlavaJson

Turns = list[tuple[str, str]]


def row(turns: Turns, **fields: Any) -> dict[str, Any]:
    return {
        **fields,
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
    }


def write_list(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), "utf-8")
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def one(tmp_path: Path, content: Any, **settings: Any) -> Sample:
    return LlavaJson(write_list(tmp_path / "train.json", [content]), "/pictures", **settings)[0]


# Sources

WRITERS = [write_list, write_lines]
ASKED = [("human", "<image>\nWhat is it?"), ("gpt", "A cat.")]


@pytest.mark.parametrize("write", WRITERS)
def test_rows_of_a_list_and_of_lines_are_the_same_samples(
    tmp_path: Path, write: Callable[[Path, list[Any]], Path]
) -> None:
    rows = [
        row(ASKED, id="a", image="x/1.jpg"),
        row([("human", "Wie heißt du? 猫"), ("gpt", "Kater.")], id=7, model=""),
        row([("human", "Hi"), ("gpt", "Ho"), ("human", "And?"), ("gpt", "No.")]),
    ]
    # The name says nothing about the content.
    source = LlavaJson(write(tmp_path / "train.data", rows), tmp_path)
    assert len(source) == 3
    samples = [source[i] for i in range(3)]
    assert samples == [source[i] for i in range(3)]
    assert [sample.id for sample in samples] == ["a", "7", "2"]
    picture = tmp_path / "x" / "1.jpg"
    assert samples[0].messages == (user("What is it?", picture), assistant("A cat."))
    assert samples[1].messages == (user("Wie heißt du? 猫"), assistant("Kater."))
    assert [m.role for m in samples[2].messages] == ["user", "assistant"] * 2
    number = "row 2" if write is write_list else "line 2"
    assert samples[1].source == f"{source.path}, {number}"
    assert [source.size(i) for i in range(3)] == [(25, 1), (21, 0), (11, 0)]
    with pytest.raises(IndexError):
        source[3]


def test_line_numbers_count_empty_lines_and_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    text = json.dumps(row(ASKED, image="a.jpg"))
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}\n\n{text}".encode())
    source = LlavaJson(path, tmp_path)
    assert len(source) == 2 and source[1].source.endswith("line 3")
    assert source[0].messages == source[1].messages


def test_lines_are_not_kept_in_memory(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row([("human", "x" * 999), ("gpt", "y")])] * 50)
    source = LlavaJson(path, tmp_path)
    first = source[0].messages
    path.write_text(path.read_text().replace("x", "z"))
    assert source[0].messages != first


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("<image>\nWhat?", "\nWhat?"),
        ("What?\n<image>", "\nWhat?"),
        ("  What <image> is it? ", "\nWhat  is it?"),
        ("<image>", ""),
        (" <image>\n", ""),
    ],
)
def test_the_image_goes_to_the_front_as_in_the_reference(
    tmp_path: Path, written: str, expected: str
) -> None:
    sample = one(tmp_path, row([("human", written), ("gpt", " A. ")], image="a.jpg"))
    parts = (ImagePart(Path("/pictures/a.jpg")),)
    assert sample.messages[0].content == parts + ((TextPart(expected),) if expected else ())
    assert sample.messages[1].text == " A. "


def test_the_front_is_that_of_the_turn_which_has_the_image(tmp_path: Path) -> None:
    turns = [("human", " Hi "), ("gpt", "Ho"), ("human", "And <image>?"), ("gpt", "Yes")]
    sample = one(tmp_path, row(turns, image="a.jpg"))
    assert sample.messages[0] == user(" Hi ")
    assert sample.messages[2] == user("And ?", Path("/pictures/a.jpg"))


def test_as_written_keeps_every_character(tmp_path: Path) -> None:
    content = row([("human", " Look: <image> \nwhat? "), ("gpt", "A.")], image="a.jpg")
    sample = one(tmp_path, content, image_place="as_written")
    picture = ImagePart(Path("/pictures/a.jpg"))
    assert sample.messages[0].content == (TextPart(" Look: "), picture, TextPart(" \nwhat? "))


def test_several_images_stay_in_their_places(tmp_path: Path) -> None:
    turns = [
        ("human", "<image> and <image>?"),
        ("gpt", "A."),
        ("human", "Or <image>"),
        ("gpt", "B"),
    ]
    sample = one(tmp_path, row(turns, image=["1.jpg", "2.jpg", "3.jpg"]))
    one_, two, three = (ImagePart(Path(f"/pictures/{n}.jpg")) for n in (1, 2, 3))
    assert sample.messages[0].content == (one_, TextPart(" and "), two, TextPart("?"))
    assert sample.messages[2].content == (TextPart("Or "), three)
    assert sample.images == (one_, two, three)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (row([("human", "What?"), ("gpt", "A.")], image="a.jpg"), "0 <image> but the row has 1"),
        (row(ASKED), "1 <image> but the row has 0"),
        (row([("human", "<image><image>"), ("gpt", "A.")], image="a.jpg"), "2 <image> but"),
        (row(ASKED, image=["a.jpg", "b.jpg"]), "/pictures/a.jpg, /pictures/b.jpg"),
        (row([("human", "<image>"), ("gpt", "An <image>.")], image="a.jpg"), "gpt turn holds"),
        (row(ASKED, image=3), "'image' is 3"),
        (row(ASKED, image=""), "'image' is ''"),
        (row(ASKED, image=[None]), "'image' is [None]"),
        (row([("user", "What?"), ("gpt", "A.")]), "turn 1: 'from' is 'user'; allowed: human, gpt"),
        (row([("gpt", "Hi."), ("human", "What?"), ("gpt", "A.")]), "must begin with 'human'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "given int"),
        ({"conversations": [{"value": "What?"}]}, "'from' is None"),
        ({"conversations": ["What?"]}, "given str"),
        ({"conversations": []}, "given []"),
        ({"messages": []}, "given keys"),
    ],
)
@pytest.mark.parametrize("write", WRITERS)
def test_a_faulty_row_is_named_with_its_place_and_a_remedy(
    tmp_path: Path, write: Callable[[Path, list[Any]], Path], content: Any, expected: str
) -> None:
    content = {"id": "q17", **content}
    source = LlavaJson(write(tmp_path / "t.json", [row([("human", "Hi")]), content]), "/pictures")
    source[0]
    with pytest.raises(DataError) as caught:
        source[1]
    message = str(caught.value)
    place = "row 2" if write is write_list else "line 2"
    assert f"sample 'q17' ({tmp_path / 't.json'}, {place})" in message and expected in message
    assert any(word in message for word in ("Correct", "Add or remove", "Remove", "Rename"))
    # Only the check of the row complains; its length can be asked for beforehand.
    assert source.size(1)[1] in (0, 1, 2)


def test_a_broken_line_and_a_row_that_is_no_object(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row(ASKED, image="a.jpg")] * 2)
    path.write_text(path.read_text()[:-5] + "\n")
    source = LlavaJson(path, tmp_path)
    source[0]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, column \d+: this is not valid JSON"):
        source[1]
    for write, place in ((write_list, "row 2"), (write_lines, "line 2")):
        source = LlavaJson(write(tmp_path / "b.json", [{}, [1]]), tmp_path)
        with pytest.raises(DataError, match=f"b.json, {place}: a row must be a JSON object"):
            source[1]


def test_files_that_cannot_be_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.json cannot be opened"):
        LlavaJson(tmp_path / "missing.json", tmp_path)
    for content in ("", "[]", "\n\n"):
        (tmp_path / "empty.json").write_text(content)
        with pytest.raises(DataError, match=r"empty\.json has no rows"):
            LlavaJson(tmp_path / "empty.json", tmp_path)
    (tmp_path / "cut.json").write_text('[{"id": 1},\n {"id"')
    with pytest.raises(DataError, match=r"cut\.json, line 2, column"):
        LlavaJson(tmp_path / "cut.json", tmp_path)
    with pytest.raises(PumiceError, match="Did you mean 'start'"):
        LlavaJson(tmp_path / "cut.json", tmp_path, image_place="strat")  # type: ignore[arg-type]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write_list(tmp_path / "a.json", [row(ASKED, image="a.jpg")])
    source = LlavaJson(path, tmp_path)
    before = source.fingerprint()
    assert LlavaJson(path, tmp_path / "elsewhere").fingerprint() == before
    path.write_text(path.read_text() + " ")
    assert source.fingerprint() != before


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
        assert alone.batch_at(step) == expected[step]


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
        batches = [[length for _, length in batch] for batch in map(loader.batch_at, range(60))]  # type: ignore[call-overload]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    count = WINDOW * 8 + 80
    grouped, plain = make_loader(count, group_by_length=True), make_loader(count)
    assert waste(grouped) < 0.2 * waste(plain)
    longest = [max(length for _, length in grouped.batch_at(step)) for step in range(WINDOW)]  # type: ignore[attr-defined]
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
        parts = [loader.rows_at(step) for loader in shares]
        assert [len(part) for part in parts] == [2] * 4
        assert sorted(sum(parts, [])) == sorted(whole.rows_at(step))


def test_a_faulty_row_stops_at_its_own_step_and_is_named() -> None:
    rows = Rows(40, "bad")
    mixture = Mixture([Part(rows)], seed=0)
    step, bad = 2, mixture.order(0)[20][1]
    expected = [make_loader(mixture=mixture).batch_at(before) for before in range(step)]
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
    loader.batch_at(0)
    assert seen == [3]


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(PumiceError, match="batch_size is 8 for 3 processes"):
        make_loader(world_size=3)
    with pytest.raises(PumiceError, match="batch_size is 0"):
        make_loader(batch_size=0)
    with pytest.raises(PumiceError, match="workers is -1"):
        make_loader(workers=-1)


def test_the_length_estimate_counts_images() -> None:
    class Pictures(Rows):
        def size(self, row: int) -> tuple[int, int]:
            return 10, row % 2

    loader = make_loader(mixture=Mixture([Part(Pictures(80))], 0), group_by_length=True)
    kinds = [{row % 2 for _, row in loader.rows_at(step)} for step in range(10)]
    assert all(len(kind) == 1 for kind in kinds) and {0} in kinds and {1} in kinds


def test_messages_are_plain_data(tmp_path: Path) -> None:
    sample = one(tmp_path, row(ASKED, image="a.jpg"))
    assert isinstance(sample.messages[0], Message)
    assert sample.messages[0].text == "\nWhat is it?"


# From files to tensors, with the real processor


@pytest.fixture(scope="module")
def real_processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    from pumice.processing.images import ImageSpec
    from pumice.processing.processor import Processor
    from tiny import tokenizer_folder

    folder = tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Processor(tokenizer, ImageSpec("pad", 32), "vicuna_v1", "", 16)


def picture_files(folder: Path) -> bytes:
    import PIL.Image

    for name, kind in (("grey.png", "L"), ("cmyk.jpg", "CMYK"), ("alpha.png", "RGBA")):
        PIL.Image.new(kind, (40, 20)).save(folder / name)
    PIL.Image.effect_noise((60, 50), 90).save(folder / "noise.jpg")
    return (folder / "noise.jpg").read_bytes()


def test_files_become_batches(tmp_path: Path, real_processor: Any) -> None:
    picture_files(tmp_path)
    rows = [row(ASKED, id=name, image=name) for name in ("grey.png", "cmyk.jpg", "alpha.png")]
    rows.append(row([("human", "Hi"), ("gpt", "A longer answer without a picture.")], id="text"))
    source = LlavaJson(write_lines(tmp_path / "train.jsonl", rows), tmp_path)
    loader = Loader(Mixture([Part(source)], 0), real_processor, batch_size=4, seed=0)
    (batch,) = loader.iterate(0, 1)
    again = loader.batch_at(0)
    assert sorted(batch.sample_ids) == ["alpha.png", "cmyk.jpg", "grey.png", "text"]
    assert batch.pixel_values.shape == (3, 3, 32, 32) and batch.num_supervised > 0
    for name in ("input_ids", "labels", "position_ids", "pixel_values", "lengths"):
        assert getattr(batch, name).equal(getattr(again, name)), name


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.jpg", None, "does not exist"),
        ("zero.jpg", b"", "empty (0 bytes)"),
        ("words.jpg", b"no picture", "is not an image"),
        ("cut.jpg", "cut", "truncated or damaged"),
        ("huge.bmp", "huge", "at most 100,000,000 are allowed"),
    ],
)
def test_a_faulty_image_stops_training_with_its_name(
    tmp_path: Path, real_processor: Any, name: str, content: bytes | str | None, expected: str
) -> None:
    sound = picture_files(tmp_path)
    if content == "cut":
        content = sound[: len(sound) // 2]
    elif content == "huge":
        header = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
        content = header + (60_000).to_bytes(4, "little") * 2 + b"\x01\0\x18\0" + bytes(24)
    if content is not None:
        (tmp_path / name).write_bytes(content)  # type: ignore[arg-type]
    path = write_list(tmp_path / "train.json", [row(ASKED, id="q17", image=name)])
    mixture = Mixture([Part(LlavaJson(path, tmp_path))], 0)
    with pytest.raises(DataError) as caught:
        Loader(mixture, real_processor, batch_size=1, seed=0).batch_at(0)
    message = str(caught.value)
    for part in (f"sample 'q17' ({path}, row 1)", f"image {tmp_path / name}", expected):
        assert part in message
    assert message.count(". ") >= 1 and message.endswith(".")


def test_over_long_real_samples_are_named(tmp_path: Path, real_processor: Any) -> None:
    path = write_list(tmp_path / "train.json", [row([("human", "x" * 99), ("gpt", "y")], id="q")])
    mixture = Mixture([Part(LlavaJson(path, tmp_path))], 0)
    with pytest.raises(DataError, match=r"sample 'q' \(.*row 1\) has \d+ tokens .*at most 32 "):
        Loader(mixture, real_processor, batch_size=1, seed=0, max_tokens=32).batch_at(0)
