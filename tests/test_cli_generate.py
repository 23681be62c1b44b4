"""`pumice generate`: one row out per row in, resumable, errors as rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pumice.infer.model import Model

Run = Callable[..., tuple[int, str, str]]


CHAT = {
    "id": "a",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "0.png"}},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ],
}
REQUESTS = [
    json.dumps(CHAT),
    json.dumps({"question_id": 7, "image": "1.png", "text": "Colour?", "category": "c"}),
    json.dumps({"question_id": 8, "image": "broken.png", "text": "Colour?"}),
    "{not json",
    json.dumps({"question_id": 9, "text": "No image."}),
    json.dumps({"question_id": 9, "text": "No image."}),
    json.dumps({"id": "nothing asked"}),
    json.dumps({"question_id": 10, "image": "missing.png", "text": "Colour?"}),
    json.dumps({"question_id": 11, "image": "huge.bmp", "text": "Colour?"}),
    json.dumps({"question_id": 12, "text": " "}),
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def generate(root: Path, tmp_path: Path, run: Run) -> Run:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(REQUESTS) + "\n\n", encoding="utf-8")
    # The header of a picture of 60,000 x 60,000 pixels.
    header = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    size = (60_000).to_bytes(4, "little") * 2
    (root / "huge.bmp").write_bytes(header + size + b"\x01\0\x18\0" + bytes(24))

    def call(*args: object) -> tuple[int, str, str]:
        return run(
            "generate", root / "model", "--requests", requests, "--images", root,
            "--out", tmp_path / "out.jsonl", "--max-new-tokens", 4, *args,
        )  # fmt: skip

    return call


def test_generate_one_row_out_per_row_in(generate: Run, tmp_path: Path) -> None:
    code, out, _ = generate("--json")
    assert code == 0
    assert json.loads(out) == {"out": str(tmp_path / "out.jsonl"), "rows": 10, "errors": 6}
    rows = rows_of(tmp_path / "out.jsonl")
    names = [row.get("id", row.get("question_id")) for row in rows]
    assert names == ["a", 7, 8, "line 4", 9, 9, "nothing asked", 10, 11, 12]
    failed = [False, False, True, True, False, False, True, True, True, True]
    assert ["error" in row for row in rows] == failed
    assert all(("text" in row) != ("error" in row) for row in rows)
    assert rows[0]["image_tokens"] == 16 and rows[4]["image_tokens"] == 0
    assert rows[1]["prompt"] == "Colour?" and rows[1]["category"] == "c"
    assert rows[4]["text"] == rows[5]["text"]
    for number, told in (
        (3, "broken.png is not an image that can be read (it is a text file)"),
        (4, "column 2: not valid JSON"),
        (7, "needed: messages"),
        (8, "missing.png does not exist"),
        (9, "at most 100,000,000 are allowed"),
        (10, "the question is empty"),
    ):
        error = rows[number - 1]["error"]
        # By the line, not by the key that stands for the request within the engine.
        assert error.startswith(f"{tmp_path / 'requests.jsonl'}, line {number}") and told in error


def test_generate_goes_on_where_it_stopped(
    generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate()
    out = tmp_path / "out.jsonl"
    whole = out.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    # Stopped while writing: rows in the order they came, the last one cut.
    out.write_text(lines[4] + lines[0] + lines[1][:20], encoding="utf-8")
    asked: list[str] = []
    real = Model.generate

    def counted(self: Model, requests: Any, on_result: Any = None) -> Any:
        asked.extend(request.messages[0].text for request in requests)
        return real(self, requests, on_result)

    monkeypatch.setattr(Model, "generate", counted)
    code, _, err = generate()
    assert code == 0 and "2 of 10 rows are answered already" in err
    assert asked == ["\nColour?"] * 2 + ["No image."] + ["\nColour?"] * 2 + [" "]
    assert out.read_text(encoding="utf-8") == whole


def test_generate_never_mixes_settings_or_deletes_foreign_rows(
    generate: Run, tmp_path: Path
) -> None:
    generate()
    before = (tmp_path / "out.jsonl").read_bytes()
    code, _, err = generate("--seed", 1)
    assert code == 2 and "holds 4 answers" in err and "--resume never" in err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert generate("--seed", 1, "--resume", "never")[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() != before


def test_generate_refuses_paths_that_cannot_work(generate: Run, tmp_path: Path, root: Path) -> None:
    for args, told in (
        (("--images", tmp_path / "nowhere"), "is not a directory that exists"),
        (("--out", tmp_path / "requests.jsonl", "--resume", "never"), "the requests file itself"),
        (("--out", tmp_path), "is a directory"),
    ):
        before = (tmp_path / "requests.jsonl").read_bytes()
        code, _, err = generate(*args)
        assert code == 2 and told in err
        assert (tmp_path / "requests.jsonl").read_bytes() == before


def test_generate_with_nothing_but_errors_fails(root: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "r.jsonl").write_text("[]\n", encoding="utf-8")
    args = ("--requests", tmp_path / "r.jsonl", "--out", tmp_path / "out.jsonl")
    assert run("generate", root / "model", *args)[0] == 1
    assert "error" in rows_of(tmp_path / "out.jsonl")[0]
    (tmp_path / "r.jsonl").write_text("\n", encoding="utf-8")
    assert run("generate", root / "model", *args)[0] == 2
