"""Several prompts read at once: each as transformers reads it alone, however they are laid out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tiny
from pumice.infer import attending, cache
from pumice.infer.attending import OneByOne, SideBySide
from pumice.infer.decoder import AnyDecoder, Chunk, Decoder
from pumice.infer.plain_decoder import PlainDecoder
from pumice.models.lmm import LMM

# What each prompt is cut into: chunks are read round by round, all prompts' beside each other.
LAYOUTS = {
    "short": ([[5], [7], [6]], SideBySide),
    "equal": ([[4], [4]], SideBySide),
    "one goes on": ([[5, 3], [7, 2], [6, 4]], SideBySide),
    "alone": ([[9]], OneByOne),
    "long": ([[150], [140]], OneByOne),
    "long, and goes on": ([[70, 80], [64, 65], [65, 1]], OneByOne),
    "uneven": ([[40], [2], [3]], OneByOne),
}


@pytest.fixture(scope="module")
def model(folders: SimpleNamespace) -> LMM:
    lmm = tiny.new_lmm(folders.vision, folders.language)
    tiny.spread(lmm.language)
    return lmm


def read(decoder: Decoder, lmm: LMM, cuts: list[list[int]]) -> torch.Tensor:
    """float[rounds of logits, V]: what is said after each prompt, then after one more token."""
    draw = torch.Generator().manual_seed(3)
    lengths = [sum(parts) for parts in cuts]
    prompts = [
        torch.randint(0, lmm.language.vocab_size, (length,), generator=draw) for length in lengths
    ]
    caches = decoder.caches(lengths)
    found, places = [], [0] * len(cuts)
    for turn in range(max(map(len, cuts))):
        chunks = []
        for row, parts in enumerate(cuts):
            first, last = places[row], places[row] + parts[turn]
            embeds = lmm.language.embed(prompts[row][first:last])
            chunks.append(Chunk(embeds, first, caches[row], None, turn == len(parts) - 1))
            places[row] = last
        found += decoder.read(chunks)
    together = decoder.cache()
    for row, more in zip(range(len(cuts)), reversed(range(len(cuts))), strict=True):
        together.join(caches[row], lengths[row], more)
    found += list(decoder.step([7] * len(cuts), lengths, together, None))
    return torch.stack(found)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_each_is_read_as_alone(model: LMM, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, layout = LAYOUTS[name]
    used = []
    for kind in (OneByOne, SideBySide):
        call = kind.__call__
        monkeypatch.setattr(
            kind,
            "__call__",
            lambda self, *given, call=call: (used.append(type(self)), call(self, *given))[1],
        )
    fast = read(PlainDecoder(model), model, cuts)
    assert set(used) == {layout}
    torch.testing.assert_close(fast, read(AnyDecoder(model), model, cuts), atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_rows_of_other_buffers_are_not_taken_for_one(model: LMM) -> None:
    decoder = PlainDecoder(model)
    first, second = decoder.caches([4, 4]), decoder.caches([4, 4])

    def chunk(cache: object) -> Chunk:
        return Chunk(torch.zeros(4, 32), 0, cache, None, ends=True)

    assert SideBySide.can_hold([chunk(first[0]), chunk(first[1])])
    assert not SideBySide.can_hold([chunk(first[0]), chunk(second[1])])
    assert not SideBySide.can_hold([chunk(first[1]), chunk(first[0])])
    assert not SideBySide.can_hold([chunk(first[0])])
    assert not SideBySide.can_hold([chunk(decoder.cache(4)), chunk(decoder.cache(4))])
    assert attending._CUT < 150  # "long" above is longer


@torch.inference_mode()
def test_rows_that_lie_side_by_side_become_a_batch_without_a_copy(model: LMM) -> None:
    decoder = PlainDecoder(model)
    lengths = [5, 7, 6]
    every = [decoder.caches(lengths) for _ in range(2)]
    for caches in every:
        embeds = [model.language.embed(torch.arange(9, 9 + length)) for length in lengths]
        decoder.read([Chunk(e, 0, row, None, True) for e, row in zip(embeds, caches, strict=True)])
    assert not decoder.cache().take_over(every[0][:2])
    assert not decoder.cache().take_over(every[0][::-1])
    assert not decoder.cache().take_over([*every[0][:2], every[1][2]])
    assert not decoder.cache().take_over(decoder.caches(lengths))  # nothing is read yet
    joined, taken = decoder.cache(), decoder.cache()
    for row, more in ((0, 2), (1, 1), (2, 0)):
        joined.join(every[0][row], lengths[row], more)
    memory = every[1][0].beside.every.data_ptr()
    assert taken.take_over(every[1]) and taken._buffer.shown.data_ptr() == memory
    assert not taken.take_over(every[0])
    for step in range(cache._ANSWER + 2):
        if step == 3:
            for batch in (joined, taken):
                batch.leave(0, max(lengths[1:]))
            lengths = [lengths[2], lengths[1]]
        tokens = list(range(5, 5 + len(lengths)))
        one, other = (decoder.step(tokens, lengths, batch, None) for batch in (joined, taken))
        assert torch.equal(one, other)
        assert (taken._buffer._data.data_ptr() == memory) == (step < cache._ANSWER)
        lengths = [length + 1 for length in lengths]
