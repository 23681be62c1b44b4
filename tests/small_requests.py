"""Requests of many lengths and seeds, and a recorder of what a decoder saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pumice.core.types import Request, Sampling, user
from pumice.infer import decoding
from pumice.infer.sampling import Sampler, choose


def mixed(pictures: Path, n: int = 24) -> list[Request]:
    """Prompts of many lengths, with none, one and two images."""
    out = []
    for i, text in enumerate(["what is", "the red cat in a blue circle " * 3, "Answer?"]):
        for images in ([], [pictures / "0.png"], [pictures / "1.png", pictures / "2.png"]):
            new = max(n - 2 * len(out), 3)
            settings = Sampling(max_new_tokens=new, seed=len(out))
            out.append(Request((user(text, *images),), settings, id=f"{i}"))
    return out


class Recorder:
    """Stands in for `choose` and keeps what every row saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.batches: list[int] = []
        self.known: list[Sampler] = []
        monkeypatch.setattr(decoding, "choose", self)

    def __call__(self, logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
        tokens = choose(logits, samplers)
        self.batches.append(len(samplers))
        self.known += samplers
        for row, token, sampler in zip(logits, tokens, samplers, strict=True):
            self.logits.setdefault(id(sampler), []).append(row.clone())
            self.tokens.setdefault(id(sampler), []).append(token)
        return tokens

    def take(self) -> list[tuple[list[int], torch.Tensor]]:
        """(tokens, float[n, V]) of each row by its seed, then as they came; and forgets them."""
        seeds = {id(sampler): sampler.seed for sampler in self.known}
        order = sorted(self.tokens, key=lambda row: seeds[row])
        out = [(self.tokens[k], torch.stack(self.logits[k])) for k in order]
        self.logits, self.tokens, self.batches, self.known = {}, {}, [], []
        return out
