"""tokenizer.model without the sentencepiece package: the ids of SentencePiece and of the releases.

SentencePiece's own way of joining pieces is written out here in a few lines, as an oracle.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from pumice.core.errors import PumiceError
from pumice.core.types import Message, Sample, assistant, user
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from pumice.processing.sentencepiece_model import Piece, read_model
from pumice.processing.sentencepiece_tokenizer import read_tokenizer
from pumice.processing.templates import TEMPLATES
from real_files import CHECKPOINTS, lacking

MARK = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
WORDS = ["the", "cat", "sat", "aaa", "aaaa", "USER", "ASSISTANT", "猫猫"]
TEXTS = (
    "",
    " ",
    "  two  spaces ",
    "\n",
    "\n\nthe cat",
    "the cat sat aaaaaaa",
    "é naïve",
    "一只猫猫",
)
TEXTS += ("고양이 😀👩‍👩‍👧", "USER: Hi ASSISTANT: no", "</s> <s> <unk>", "\t3.14\r\n", "<0x0A>")


# A model file, written by hand


def field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def pieces() -> list[tuple[str, float, int]]:
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(f"<0x{value:02X}>", 0.0, BYTE) for value in range(256)]
    joined: list[str] = []
    for word in [*WORDS, *(MARK + word for word in WORDS), MARK * 2]:
        joined += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in joined]
        # Several ways lead to one piece, so that the order of merges matters.
        joined += [word[start:] for start in range(1, len(word) - 1) if word[start:] not in joined]
    joined = list(dict.fromkeys(joined))
    # The scores alone say which piece comes first, not the ids.
    places = random.Random(5).sample(range(len(joined)), len(joined))
    rows += [(text, -float(place), NORMAL) for text, place in zip(joined, places, strict=True)]
    letters = [MARK, *(chr(code) for code in range(33, 127)), "é", "猫"]
    return rows + [(text, -1000.0 - place, NORMAL) for place, text in enumerate(letters)]


def model_file(
    rows: list[tuple[str, float, int]],
    *,
    algorithm: int = 2,
    character_map: bytes = b"",
    extra_spaces: int = 0,
    dummy: int = 1,
    bos: int = 1,
) -> bytes:
    data = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
        for text, score, kind in rows
    )
    trainer = field(3, algorithm) + field(10, 0.5) + field(35, 1) + field(40, 0)
    trainer += field(41, bos) + field(43, -1)
    normalizer = field(1, b"identity") + field(2, character_map)
    normalizer += field(3, dummy) + field(4, extra_spaces)
    return data + field(2, trainer) + field(3, normalizer)


def folder(path: Path, config: dict[str, Any] | None = None, **settings: Any) -> Path:
    (path / "tokenizer.model").write_bytes(model_file(pieces(), **settings))
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return path


def by_sentencepiece(text: str, *, front: bool = True) -> list[int]:
    """Joins, again and again, the neighbours whose piece scores highest, the leftmost first."""
    rows = pieces()
    ids = {text: index for index, (text, _, _) in enumerate(rows)}
    scores = {text: score for text, score, kind in rows if kind == NORMAL}
    parts = list((MARK if front and text else "") + text.replace(" ", MARK))
    while True:
        pairs = [
            (scores[left + right], -place)
            for place, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
            if left + right in scores
        ]
        if not pairs:
            break
        place = -max(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    out: list[int] = []
    for part in parts:
        known = part in scores
        out += [ids[part]] if known else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_sentencepieces(legacy: bool, tmp_path: Path) -> None:
    made = read_tokenizer(folder(tmp_path, {"legacy": legacy}))
    rng = random.Random(0)
    texts = [
        "".join(rng.choices("acatshe AUER猫é 고\n.", k=rng.randint(1, 30))) for _ in range(300)
    ]
    for text in [*TEXTS[:10], *TEXTS[11:], *texts]:
        ids = made(text, add_special_tokens=False)["input_ids"]
        # The newer way takes a space at the very front for the mark, as transformers' own does.
        front = legacy or not text.startswith(" ")
        assert ids == by_sentencepiece(text, front=front), text
        assert made.decode(ids) == (text if front else text[1:])
    assert made("the cat")["input_ids"] == [1, *by_sentencepiece("the cat")]
    behind = made("x</s>USER", add_special_tokens=False)["input_ids"]
    assert behind == [*by_sentencepiece("x"), 2, *by_sentencepiece("USER", front=legacy)]


def test_without_a_space_in_front(tmp_path: Path) -> None:
    made = read_tokenizer(folder(tmp_path, {"add_bos_token": False}, dummy=0))
    for text in ("the cat", " the", "猫"):
        assert made(text)["input_ids"] == by_sentencepiece(text, front=False)
        assert made.decode(made(text)["input_ids"]) == text


def test_special_tokens_come_from_the_files(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_eos_token": True,
         "padding_side": "left", "model_max_length": 2048, "chat_template": "{{ 'hi' }}"},
    )  # fmt: skip
    count = len(pieces())
    (path / "added_tokens.json").write_text(json.dumps({"<pad>": count + 1, "<image>": count}))
    (path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    made = read_tokenizer(path)
    assert (made.bos_token_id, made.eos_token_id, made.unk_token_id) == (1, 2, 0)
    assert (made.pad_token, made.pad_token_id) == ("<pad>", count + 1)
    assert (made.padding_side, made.model_max_length) == ("left", 2048)
    assert made.chat_template == "{{ 'hi' }}"
    assert made("<image>the")["input_ids"][1:-1] == [count, *by_sentencepiece("the")]
    assert made("the")["input_ids"][-1] == 2
    made.save_pretrained(tmp_path / "again")
    again = read_tokenizer(tmp_path / "again")
    for text in TEXTS:
        assert again(text)["input_ids"] == made(text)["input_ids"]


def test_a_model_without_a_start_token(tmp_path: Path) -> None:
    made = read_tokenizer(folder(tmp_path, bos=-1))
    assert made.bos_token is None and made.eos_token == "</s>"
    assert made("the")["input_ids"] == by_sentencepiece("the")


def test_a_gap_in_the_added_ids_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "added_tokens.json").write_text(json.dumps({"<image>": len(pieces()) + 1}))
    with pytest.raises(PumiceError, match="'<image>' has the id .* without a gap"):
        read_tokenizer(path)


def test_a_users_own_piece_is_found_in_text_and_shown(tmp_path: Path) -> None:
    rows = [*pieces(), ("[X]", 0.0, USER)]
    (tmp_path / "tokenizer.model").write_bytes(model_file(rows))
    made = read_tokenizer(tmp_path)
    ids = made("a[X]", add_special_tokens=False)["input_ids"]
    assert ids[-1] == len(rows) - 1
    assert made.decode(ids, skip_special_tokens=True) == "a[X]"


def test_the_file_is_read_field_by_field(tmp_path: Path) -> None:
    model = read_model(folder(tmp_path) / "tokenizer.model")
    assert model.pieces[0] == Piece("<unk>", 0.0, "unknown")
    assert model.pieces[3 + 10] == Piece("<0x0A>", 0.0, "byte")
    assert model.pieces[-1] == Piece("猫", pieces()[-1][1], "normal")
    assert (model.algorithm, model.byte_fallback, model.add_dummy_prefix) == ("bpe", True, True)
    assert (model.unk_id, model.bos_id, model.eos_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"algorithm": 1}, "kind unigram; only bpe"),
        ({"character_map": b"abc"}, "normalisation table"),
        ({"extra_spaces": 1}, "repeated spaces"),
    ],
)
def test_models_that_cannot_be_built_the_same_are_refused(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(PumiceError, match=says) as caught:
        read_tokenizer(folder(tmp_path, **settings))
    assert "save_pretrained" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"aGVsbG8= 0\nd29ybGQ= 1\n",
        model_file(pieces())[:-9],
        model_file(pieces())[:5000],
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
)
def test_other_and_cut_off_files_are_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(PumiceError, match="tokenizer.model is not a whole SentencePiece model"):
        read_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(PumiceError, match="neither tokenizer.json nor tokenizer.model.*vocab.txt"):
        read_tokenizer(tmp_path)
    with pytest.raises(PumiceError, match="found: nothing"):
        read_tokenizer(tmp_path / "missing")


# The released files, where a checkout has them


def released(name: str) -> Path:
    path = CHECKPOINTS / name
    if not path.is_dir():
        pytest.skip(lacking(path, "the released tokenizer"))
    return path


@pytest.fixture(scope="module")
def original() -> Any:
    return read_tokenizer(released("llava-v1.5-7b"))


def test_the_released_model_gives_the_released_vocabulary_and_merges(original: Any) -> None:
    official = json.loads((released("llava-1.5-7b-hf") / "tokenizer.json").read_text())["model"]
    built = json.loads(original.backend_tokenizer.to_str())["model"]
    assert built["vocab"] == official["vocab"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in official["merges"]]
    assert [tuple(merge) for merge in built["merges"]] == pairs
    assert (built["byte_fallback"], built["fuse_unk"]) == (True, True)


def test_ids_of_the_released_tokenizers_agree(original: Any) -> None:
    other = read_tokenizer(released("llava-1.5-7b-hf"))
    rng = random.Random(0)
    letters = "the cat sat on  a mat,\n USERs: 3.14 é naïve 猫一只 고양이 😀 \t{}[]<>/\\'\""
    texts = ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(500)]
    for text in [*TEXTS, *texts, str(TEMPLATES["v0"].after_system[0])]:
        special = any(token in text for token in ("<s>", "</s>", "<unk>"))
        if not special and not text.startswith(" "):
            assert original(text)["input_ids"] == other(text)["input_ids"], text


def by_the_reference(tokenizer: Any, prompt: str) -> list[int]:
    """LLaVA's rule: pieces between images are tokenised apart, each without its own BOS."""
    ids = [tokenizer.bos_token_id]
    for number, chunk in enumerate(prompt.split("<image>")):
        ids += ([IMAGE_ID] if number else []) + tokenizer(chunk)["input_ids"][1:]
    return ids


ANSWERS = (
    "A1",
    "\nYes",
    "  no ",
    "一只猫",
    "고양이",
    "😀👩‍👩‍👧",
    "He said ASSISTANT: yes. USER: no",
)


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "llava_v0", "v0", "llava_llama_2"])
@pytest.mark.parametrize("release", ["llava-v1.5-7b", "llava-1.5-7b-hf"])
def test_prompts_have_the_ids_of_the_reference(release: str, name: str) -> None:
    tokenizer = read_tokenizer(released(release))
    made = Processor(tokenizer, ImageSpec("pad", 4), name, None, 1)
    rng = random.Random(name)
    for rounds in (1, 2, 3, 4):
        turns: list[Message] = []
        for number in range(rounds):
            turns += [user(f"What is {number}?", *([b""] if number == 0 else []))]
            turns += [assistant(rng.choice(ANSWERS))]
        open_turns = turns[:-1]
        segments = made.template.segments(open_turns, open_turn=True)
        own = {"bos": "<s>", "eos": "</s>"}
        text = "".join(
            "<image>" if s.kind == "image" else own.get(s.text, s.text) for s in segments
        )
        ids = made.encode_prompt(open_turns, pixels=False).input_ids
        assert ids == by_the_reference(tokenizer, text.removeprefix("<s>"))


def test_golden_ids_of_the_original_release(original: Any) -> None:
    made = Processor(original, ImageSpec("pad", 4), "vicuna_v1", "", 1)
    turns = (user("Hi", picture()), assistant("A1"), user("Q2"), assistant("\nA2"))
    encoded = made.encode(Sample("s", turns))
    opening = [319, 1799, 9047, 13566, 29901]
    first = [1, 3148, 1001, 29901, 29871, IMAGE_ID, 29871, 13, 18567, *opening, 319, 29896, 2]
    # As LLaVA's pinned transformers 4.37 has it: "USER" in one token behind </s>, without a mark.
    second = [11889, 29901, 660, 29906, *opening, 29871, 13, 29909, 29906, 2]
    assert encoded.input_ids == first + second
    learnt = [label for label in encoded.labels if label != IGNORE]
    assert learnt == [319, 29896, 2, 29871, 13, 29909, 29906, 2]


def picture() -> Any:
    import PIL.Image

    return PIL.Image.new("RGB", (4, 4))
