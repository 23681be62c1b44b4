"""data: rows of LLaVA's files, and the batches that come of them with the real processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pumice.core.errors import DataError, PumiceError
from pumice.core.types import ImagePart, Message, Sample, TextPart, assistant, user
from pumice.data.loader import Loader
from pumice.data.mixture import Mixture, Part
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
        (row(ASKED, image=[None]), "'image' is None"),
        (row([("user", "What?"), ("gpt", "A.")]), "turn 1: 'from' is 'user'; allowed: human, gpt"),
        (row([("gpt", "Hi."), ("human", "What?"), ("gpt", "A.")]), "must begin with 'human'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "given int"),
        ({"conversations": [{"value": "What?"}]}, "'from' is None"),
        ({"conversations": ["What?"]}, "given str"),
        ({"conversations": []}, "given []"),
        ({"messages": []}, "'messages' must be a list"),
        ({"dialogue": []}, "given keys"),
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
    ((batch,),) = loader.iterate(0, 1)
    again = loader.micro_batches_at(0)[0]
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
        Loader(mixture, real_processor, batch_size=1, seed=0).micro_batches_at(0)[0]
    message = str(caught.value)
    for part in (f"sample 'q17' ({path}, row 1)", f"image {tmp_path / name}", expected):
        assert part in message
    assert message.count(". ") >= 1 and message.endswith(".")


def test_over_long_real_samples_are_named(tmp_path: Path, real_processor: Any) -> None:
    # The image does not exist: the length is checked before any image is opened.
    turns = [("human", "<image>" + "x" * 99), ("gpt", "y")]
    path = write_list(tmp_path / "train.json", [row(turns, id="q", image="missing.png")])
    mixture = Mixture([Part(LlavaJson(path, tmp_path))], 0)
    with pytest.raises(DataError, match=r"sample 'q' \(.*row 1\) has \d+ tokens .*at most 32 "):
        Loader(mixture, real_processor, batch_size=1, seed=0, max_tokens=32).micro_batches_at(0)[0]
