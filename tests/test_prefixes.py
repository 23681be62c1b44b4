"""What is kept between requests: a reused beginning gives what a fresh one gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tiny
from pumice.core.types import Message, Request, Result, Sampling, assistant, user
from pumice.infer.cache import BufferCache, StackedCache
from pumice.infer.engine import Engine
from pumice.infer.prefixes import PrefixStore, common_length
from pumice.models.lmm import LMM
from pumice.processing.processor import Processor
from small_requests import Recorder

LAYERS, HEADS, WIDTH = 2, 3, 4


def row_of(symbols: Sequence[int]) -> BufferCache:
    """A cache of one row whose numbers tell the layer, and all symbols up to each position."""
    cache = BufferCache()
    sums = torch.tensor(symbols, dtype=torch.float64).cumsum(0)
    for layer in range(LAYERS):
        states = (sums * (layer + 1)).view(1, 1, -1, 1).expand(1, HEADS, -1, WIDTH)
        cache.update(states, -states, layer)
    return cache


def test_a_store_of_prefixes_gives_what_was_put_in_and_keeps_its_limit() -> None:
    draw = random.Random(0)
    store = PrefixStore(max_bytes=6000)
    kept = []
    for _ in range(300):
        # Two symbols, so that beginnings agree and part at every place.
        symbols = [draw.randint(1, 2) for _ in range(draw.randint(1, 12))]
        cache = BufferCache()
        known = store.known(symbols)
        assert store.fill(symbols, cache) == known == cache.width
        if known:
            expected = row_of(symbols[:known])
            for layer, wanted in zip(cache.layers, expected.layers, strict=True):
                assert torch.equal(layer.keys, wanted.keys)
                assert torch.equal(layer.values, wanted.values)
        store.add(symbols, row_of(symbols), 0, 0)
        assert store.known(symbols) == len(symbols)
        assert store.bytes == store.positions * LAYERS * 2 * HEADS * WIDTH * 8 <= 6000
        kept.append(known)
    assert sum(kept) > 400
    store.clear()
    assert store.bytes == store.positions == 0 and store.known([1, 2]) == 0


def test_both_caches_hold_the_same_rows_whoever_joins_and_leaves() -> None:
    draw = random.Random(3)
    shape = torch.empty(HEADS, 0, WIDTH, dtype=torch.float64)
    batch, stacked = BufferCache(), StackedCache(LAYERS, shape)
    rows: list[list[int]] = []
    for _ in range(300):
        move = draw.choice(("join", "join", "leave", "speak", "speak", "speak"))
        if move == "join" and len(rows) < 5:
            symbols = [draw.randint(1, 9) for _ in range(draw.randint(1, 90))]
            one, other = row_of(symbols), StackedCache(LAYERS, shape, len(symbols))
            half = draw.randint(0, len(symbols))
            for part in (slice(half), slice(half, None)):
                known = [torch.stack([layer.keys[0, :, part], layer.values[0, :, part]])
                         for layer in one.layers]  # fmt: skip
                other.extend([torch.stack(known)])
            batch.join(one, len(symbols))
            stacked.join(other, len(symbols))
            rows.append(symbols)
        elif move == "leave" and rows:
            place = draw.randrange(len(rows))
            rows[place] = rows[-1]
            rows.pop()
            width = max(map(len, rows), default=0)
            batch.leave(place, width)
            stacked.leave(place, width)
        elif move == "speak" and rows:
            fresh, _ = stacked.grow(1, len(rows))
            for symbols in rows:
                symbols.append(draw.randint(1, 9))
            for layer in range(LAYERS):
                last = torch.cat([row_of(s).layers[layer].keys[:, :, -1:] for s in rows])
                batch.update(last, -last, layer)
                fresh[layer].copy_(torch.stack([last, -last]))
        assert batch.width == stacked.width == max(map(len, rows), default=0)
        for place, symbols in enumerate(rows):
            span = batch.width - len(symbols), batch.width
            wanted = torch.cat(row_of(symbols).pieces(0, 0, len(symbols)))
            assert torch.equal(torch.cat(batch.pieces(place, *span)), wanted)
            [piece] = stacked.pieces(place, *span)
            assert torch.equal(piece.flatten(0, 2), wanted)


def test_what_was_used_longest_ago_goes_first() -> None:
    size = LAYERS * 2 * HEADS * WIDTH * 8
    store = PrefixStore(max_bytes=6 * size)
    for symbols in ([1, 2, 3], [4, 5, 6]):
        store.add(symbols, row_of(symbols), 0, 0)
    store.fill([1, 2, 3], BufferCache())
    store.add([7], row_of([7]), 0, 0)
    assert [store.known(s) for s in ([1, 2, 3], [4, 5, 6], [7])] == [3, 0, 1]
    store.add(list(range(10, 20)), row_of(range(10, 20)), 0, 0)
    assert store.positions == 0  # larger than the limit: nothing can stay


def test_common_length() -> None:
    draw = random.Random(1)
    for _ in range(200):
        one, other = ([draw.randint(0, 1) for _ in range(draw.randint(0, 9))] for _ in range(2))
        pairs = zip(one, other, strict=False)
        unequal = [place for place, (a, b) in enumerate(pairs) if a != b]
        assert common_length(one, other) == (unequal or [min(len(one), len(other))])[0]


def questions(pictures: Path) -> list[Request]:
    """Four questions about each of two images, two about both, and a conversation that goes on."""
    one, two = pictures / "0.png", pictures / "1.png"
    texts = ["what is", "a red cat in the blue circle", "Answer?", "is the dog in the square"]
    turns: list[tuple[Message, ...]] = [(user(text, one),) for text in texts]
    turns += [(user(text, two),) for text in texts]
    turns += [(user(text, one, two),) for text in texts[:2]]
    talk: list[Message] = []
    for text in texts[:3]:
        talk.append(user(text, *([] if talk else [two])))
        turns.append(tuple(talk))
        talk.append(assistant("the red dog in a circle of cats"))
    settings = [Sampling(max_new_tokens=5 + place % 4, seed=place) for place in range(len(turns))]
    return [Request(messages, one) for messages, one in zip(turns, settings, strict=True)]


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_a_reused_prefix_gives_what_a_fresh_one_gives(
    pictures: Path, lmm: LMM, processor: Processor, monkeypatch: pytest.MonkeyPatch, max_batch: int
) -> None:
    recorder = Recorder(monkeypatch)
    requests = questions(pictures)
    fresh: list[Result] = []
    for request in requests:
        fresh += Engine(lmm, processor, 1).generate([request])
    wanted = recorder.take()
    assert not any(result.cached_tokens for result in fresh)
    engine = Engine(lmm, processor, max_batch)
    for _ in range(2):  # known from each other, then from the call before
        results = engine.generate(requests)
        assert results == fresh
        for (tokens, logits), (alone, expected) in zip(recorder.take(), wanted, strict=True):
            assert tokens == alone
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    # The second time all but the last position of every prompt is known.
    assert [r.cached_tokens for r in results] == [r.prompt_tokens - 1 for r in results]


def test_questions_about_one_image_read_it_once(pictures: Path, engine: Engine) -> None:
    requests = questions(pictures)[:4]
    results = engine.generate(requests)
    # All but the first take over the beginning of the text and the image.
    known = sorted(result.cached_tokens > tiny.NUM_PATCHES for result in results)
    assert known == [False, True, True, True]
    totals = engine.memory.totals
    assert totals.reused_tokens == sum(result.cached_tokens for result in results)
    assert totals.prompt_tokens == sum(result.prompt_tokens for result in results)
    assert totals.new_tokens == sum(result.new_tokens for result in results)
    assert totals.finished == 4 and not totals.failed and not totals.cancelled


def test_a_conversation_goes_on_behind_its_last_answer(pictures: Path, engine: Engine) -> None:
    first = (user("what is", pictures / "0.png"),)
    [result] = engine.generate([Request(first, Sampling(max_new_tokens=12))])
    assert result.text
    next_turn = (*first, assistant(result.text), user("the dog?"))
    again = Engine(engine.lmm, engine.processor).generate([Request(next_turn)])
    [after] = engine.generate([Request(next_turn)])
    assert [after] == again
    assert after.cached_tokens >= result.prompt_tokens


def test_other_weights_forget_what_was_known(pictures: Path, engine: Engine) -> None:
    request = questions(pictures)[0]
    [before] = engine.generate([request])
    with torch.no_grad():
        engine.lmm.language.token_embeddings.mul_(1.5)
        engine.lmm.connector.get_parameter("2.weight").mul_(-1)
    [after] = engine.generate([request])
    assert after == Engine(engine.lmm, engine.processor).generate([request])[0] != before
    assert after.cached_tokens == 0


def test_nothing_is_kept_when_nothing_may_be(
    pictures: Path, lmm: LMM, processor: Processor
) -> None:
    engine = Engine(lmm, processor, prefix_bytes=0, feature_bytes=0)
    requests = questions(pictures)
    waits = [Request(one.messages, Sampling(max_new_tokens=1)) for one in requests[:4]]
    engine.generate(waits)
    assert engine.memory.totals.steps == 1  # nobody waits for a beginning that is not kept
    assert engine.generate(requests) == Engine(lmm, processor).generate(requests)
    assert engine.memory.prefixes.bytes == 0 and not engine.memory.totals.reused_tokens
