"""Rows at scale: where they stand in a file, what is kept of it, and the layouts they come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pumice.core.errors import DataError
from pumice.core.types import ImagePart, Message, Sample, TextPart, assistant, user
from pumice.data import row_index
from pumice.data.row_index import RowFile
from pumice.data.sources import LlavaJson

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=4)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(objects, min_size=1, max_size=6), ascii_=st.booleans(), data=st.data())
def test_every_row_is_found_in_any_spelling_and_any_window(
    tmp_path: Path, rows: list[Any], ascii_: bool, data: st.DataObject
) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_) for row in rows) + "\n"
    indent = data.draw(st.sampled_from([None, 0, 2]))
    whole = json.dumps(rows, ensure_ascii=ascii_, indent=indent)
    mark = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf", b" \r\n"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_index, "_CHUNK", data.draw(st.integers(1, 40)))
        for name, text in (("rows.jsonl", lines), ("rows.json", whole)):
            (tmp_path / name).write_bytes(mark + text.encode())
            found = RowFile(tmp_path / name)
            assert [found.read(row) for row in range(len(found))] == rows


@pytest.mark.parametrize("listed", [True, False])
def test_the_places_of_a_large_file_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    monkeypatch.setattr(row_index, "KEPT_FROM", 0)
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.json"
    rows = [{"id": str(number), "conversations": TURNS} for number in range(20)]

    def write(rows: list[Any]) -> None:
        lines = "\n".join(json.dumps(row) for row in rows)
        path.write_text(json.dumps(rows) if listed else lines)

    write(rows)
    first = LlavaJson(path, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(row_index, "_find", lambda *given: pytest.fail("gone through again"))
        again = LlavaJson(path, tmp_path)
        assert [again[k] for k in range(20)] == [first[k] for k in range(20)]
        assert again.fingerprint() == first.fingerprint()
    write([{**row, "id": f"new {row['id']}"} for row in rows[:7]])
    changed = LlavaJson(path, tmp_path)
    assert len(changed) == 7 and changed[6].id == "new 6"
    assert changed.fingerprint() != first.fingerprint()
    # What belonged to the old file is gone.
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_index, "KEPT_FROM", 0)
    (tmp_path / "cache").write_text("a file where a directory should be")
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": TURNS}]))
    assert len(LlavaJson(tmp_path / "train.json", tmp_path)) == 1
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"id": 1},\n {"id": }]', "line 2, column 9: this is not valid JSON (Expecting value)"),
        ('[{"id": 1}\n {"id": 2}]', "line 2, column 2: .*Expecting ',' or ']'"),
        ('[{"id": 1}]\nmore', "line 2, column 1: .*Extra data"),
        ('[{"id": 1},', "line 1, column 12: .*Expecting value"),
        ('[{"id": 1}', "Expecting ',' or ']'"),
    ],
)
@pytest.mark.parametrize("window", [3, 10_000])
def test_a_broken_list_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str, window: int
) -> None:
    monkeypatch.setattr(row_index, "_CHUNK", window)
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError, match=expected.replace("(", r"\(").replace(")", r"\)")):
        RowFile(path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(DataError, match="byte 9 is not UTF-8"):
        RowFile(tmp_path / "train.json")


# Layouts


def one(tmp_path: Path, content: dict[str, Any]) -> Sample:
    (tmp_path / "rows.jsonl").write_text(json.dumps(content))
    return LlavaJson(tmp_path / "rows.jsonl", "/p")[0]


A, B = ImagePart(Path("/p/a.jpg")), ImagePart(Path("/p/b.jpg"))


def test_chat_messages_with_texts(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A cat."},
    ]
    sample = one(tmp_path, {"id": "m", "images": ["a.jpg"], "messages": messages})
    assert sample.messages == (
        Message("system", (TextPart("Be brief."),)),
        user("What is it?", Path("/p/a.jpg")),
        assistant("A cat."),
    )


def test_parts_of_a_message_stay_in_their_order(tmp_path: Path) -> None:
    def turns(*images: dict[str, Any]) -> list[dict[str, Any]]:
        first, second = images
        text = [{"type": "text", "text": "From "}, first, {"type": "text", "text": " to "}, second]
        answer = [{"type": "text", "text": "An <image> moved.", "index": None}]
        return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    bare = {"type": "image"}
    expected = (TextPart("From "), A, TextPart(" to "), B)
    for content in (
        {"images": ["a.jpg", "b.jpg"], "messages": turns(bare, bare)},
        {"images": ["b.jpg", "a.jpg"], "messages": turns(bare | {"index": 1}, bare | {"index": 0})},
        {"messages": turns(bare | {"image": "a.jpg"}, bare | {"image": "b.jpg"})},
    ):
        sample = one(tmp_path, content)
        assert sample.messages[0].content == expected
        # Listed parts say what is text, so a mark in a text is only text.
        assert sample.messages[1].text == "An <image> moved."


def test_pairs_of_texts_follow_their_images(tmp_path: Path) -> None:
    texts = [{"user": "What?", "assistant": "A."}, {"user": "And?", "assistant": "B."}]
    sample = one(tmp_path, {"images": ["a.jpg", "b.jpg"], "texts": texts})
    assert sample.messages[0].content == (A, B, TextPart("\nWhat?"))
    assert [m.text for m in sample.messages[1:]] == ["A.", "And?", "B."]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"messages": [{"role": "gpt", "content": "x"}]}, "'role' is 'gpt'; allowed: system, user"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' must be text"),
        (
            {
                "images": ["a.jpg"],
                "messages": [{"role": "user", "content": [{"type": "image", "index": 1}]}],
            },
            r"with the numbers \[1\]",
        ),
        (
            {
                "images": ["a.jpg"],
                "messages": [{"role": "assistant", "content": [{"type": "image"}]}],
            },
            "a gpt turn holds",
        ),
        ({"texts": [{"user": "x"}]}, "'assistant' must be text"),
        ({"texts": "x"}, "'texts' must be a list"),
    ],
)
def test_faults_of_the_other_layouts(tmp_path: Path, content: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        one(tmp_path, content)
