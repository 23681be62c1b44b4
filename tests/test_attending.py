"""Several prompts read at once: each as transformers reads it alone, however they are laid out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tiny
from pumice.infer import attending
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
