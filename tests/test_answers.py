"""How answers end and stream: whole characters, stop strings that never leak, limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.core.types import Request, Result, Sampling, user
from pumice.infer.answer import Answer
from pumice.infer.engine import Engine
from pumice.processing.processor import Processor
from small_requests import Recorder, mixed


def greedy(engine: Engine, text: str, **more: Any) -> Result:
    [result] = engine.generate([Request((user(text),), Sampling(**more))])
    return result


def test_length_and_context_limit(engine: Engine) -> None:
    result = greedy(engine, "cat", max_new_tokens=5)
    assert (result.finish_reason, result.new_tokens) == ("length", 5)
    full = greedy(engine, "cat " * 480, max_new_tokens=100)
    assert full.prompt_tokens + full.new_tokens == engine.lmm.language.max_positions
    assert full.finish_reason == "length"


def test_end_token_stops_and_leaves_no_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    free = greedy(engine, "cat", max_new_tokens=12)
    [(tokens, _)] = recorder.take()
    place = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(Processor, "end_token_ids", property(lambda self: (tokens[place],)))
    ended = greedy(engine, "cat", max_new_tokens=12)
    assert free.finish_reason == "length"
    assert (ended.finish_reason, ended.new_tokens) == ("stop", place + 1)
    assert ended.text == engine.processor.decode(tokens[:place]).strip()


def answer_of(decode: Callable[[Sequence[int]], str], ids: Sequence[int], **more: Any) -> list[str]:
    """What had settled after each token, and the final text at the end."""
    options = {"end_tokens": (2,), "stop": (), "max_tokens": 999, **more}
    answer = Answer(decode, **options)
    seen = []
    for token in ids:
        over = answer.push(token)
        seen.append(answer.settled)
        if over:
            break
    return [*seen, answer.text]


TEXTS = ["naïve 猫 😀é", " a cat\n\nis 고양이  ", "ééé😀😀", "a"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_streams_whole_characters(processor: Processor, text: str, ended: bool) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    ways: list[tuple[Callable[[Sequence[int]], str], list[int]]] = [
        (processor.decode, ids),
        (
            lambda ids: bytes(i - 3 for i in ids).decode(errors="replace"),
            [b + 3 for b in text.encode()],
        ),
    ]
    for decode, tokens in ways:
        *seen, final = answer_of(decode, [*tokens, 2] if ended else tokens)
        assert final == text.strip()
        for early, late in zip(seen, [*seen[1:], final], strict=True):
            assert late.startswith(early) and "\N{REPLACEMENT CHARACTER}" not in early


def test_a_character_cut_off_by_the_limit_leaves_no_mark(processor: Processor) -> None:
    ids = processor.tokenizer.encode("é猫", add_special_tokens=False)
    for length in range(1, len(ids)):
        *_, final = answer_of(processor.decode, ids, max_tokens=length)
        assert final in ("", "é"), (length, final)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("cat",), "a red"), (("zzz", "red c"), "a"), (("é",), "a red cat in"), (("zzz",), None)],
)
def test_stop_strings_cut_and_never_leak(
    processor: Processor, stop: tuple[str, ...], expected: str | None
) -> None:
    text = "a red cat in é circle"
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    *seen, final = answer_of(processor.decode, [*ids, 2], stop=stop)
    assert final == (text if expected is None else expected)
    assert all(final.startswith(piece) for piece in seen)


def test_broken_bytes_stream_as_they_end(processor: Processor) -> None:
    # Decoders with byte fallback call a whole run broken for one wrong byte in it.
    run = [3 + byte for byte in b"8\xe9\xc3\xa98"]
    for ids in (run, [*run, 300, *run], [300, *run[:2]], [*run[:1], *run[1:2] * 6]):
        *seen, final = answer_of(processor.decode, [*ids, 2])
        assert all(final.startswith(piece) for piece in seen)
        assert ("8" in final) == (3 + ord("8") in ids)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(3, 400, (20,), generator=generator).tolist()
        *seen, final = answer_of(processor.decode, ids, max_tokens=20, stop=("zzz",))
        assert all(final.startswith(piece) for piece in seen)


def test_stream_equals_generate(pictures: Path, engine: Engine) -> None:
    for request in mixed(pictures)[3:6]:
        [whole] = engine.generate([request])
        pieces, stream = [], engine.stream(request)
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                assert end.value == whole
                break
        assert "".join(pieces) == whole.text and all(pieces)
    with pytest.raises(PumiceError, match="does not exist"):
        next(engine.stream(Request((user("what", pictures / "nowhere.png"),))))
