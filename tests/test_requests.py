"""Other people's requests: OpenAI chat messages and LLaVA's question rows."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from pumice.core.errors import DataError
from pumice.core.types import Message, Request, Sampling, TextPart, user
from pumice.infer.requests import chat_messages, read_request
from tiny import noise as picture


def data_uri(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_chat_messages(tmp_path: Path) -> None:
    uri = data_uri(picture(0))
    image = {"type": "image_url", "image_url": {"url": uri}}
    text = {"type": "text", "text": "what?"}
    raw = base64.b64decode(uri.partition(",")[2])
    first = chat_messages([{"role": "user", "content": [image, text]}], images_dir=None)
    last = chat_messages([{"role": "user", "content": [text, image]}], images_dir=None)
    assert first == last == (user("what?", raw),)
    between = chat_messages([{"role": "user", "content": [text, image, text]}], images_dir=None)
    assert [type(p).__name__ for p in between[0].content] == ["TextPart", "ImagePart", "TextPart"]
    file = {"type": "image_url", "image_url": "sub/0.png"}
    named = chat_messages([{"role": "user", "content": [file, text]}], images_dir=tmp_path)
    assert named == (user("what?", tmp_path / "sub/0.png"),)
    talk = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    assert [m.role for m in chat_messages(talk, images_dir=None)] == ["system", "user", "assistant"]
    assert chat_messages(talk, images_dir=None)[0] == Message("system", (TextPart("x"),))


def test_data_uris_as_browsers_read_them() -> None:
    plain = data_uri(picture(0))
    data = plain.partition(",")[2]
    lines = "\n".join(data[at : at + 76] for at in range(0, len(data), 76)) + "\n"
    for uri in (f"DATA:image/png;base64,{data}", f"data:;Base64,{data}", f"data:;base64,{lines}"):
        read, wanted = (
            chat_messages([{"role": "user", "content": [part]}], images_dir=None)
            for part in ({"type": "image_url", "image_url": given} for given in (uri, plain))
        )
        assert read == wanted


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (5, "content is 5"),
        ([{"type": "audio"}], "type 'audio'; allowed: text, image_url"),
        ([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}], "web address"),
        ([{"type": "image_url", "image_url": {"url": "HTTPS://x/y.png"}}], "web address"),
        ([{"type": "image_url", "image_url": {"url": "y.png"}}], "only data URIs"),
        ([{"type": "image_url", "image_url": {"url": "ftp://x/y.png"}}], "is no data URI"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}], "base64"),
        ([{"type": "text"}], "text is None"),
    ],
)
def test_chat_message_errors(content: Any, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        chat_messages([{"role": "user", "content": content}], images_dir=None, where="row 3")
    assert str(caught.value).startswith("row 3: ")


def test_request_rows(tmp_path: Path) -> None:
    row = {"question_id": 12, "image": "0.png", "text": "what?", "max_tokens": 5, "stop": "."}
    request = read_request(row, images_dir=tmp_path, sampling=Sampling(temperature=0.5))
    assert request == Request(
        (user("what?", tmp_path / "0.png"),),
        Sampling(max_new_tokens=5, temperature=0.5, stop=(".",)),
        id="12",
    )
    chat = {"id": "a", "messages": [{"role": "user", "content": "hi"}]}
    assert read_request(chat, images_dir=None) == Request((user("hi"),), id="a")
    for bad, told in (
        ({}, "the fields none"),
        ({"text": "x", "top_k": 1.5}, "top_k is 1.5; a whole number"),
        ({"text": "x", "image": 3}, "image is 3"),
        ({"messages": "hi"}, "a list of at least one"),
    ):
        with pytest.raises(DataError, match=told):
            read_request(bad, images_dir=tmp_path)
