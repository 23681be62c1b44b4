"""Choosing the next token of every row in flight, each with its own settings and seed.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from pumice.core.errors import PumiceError
from pumice.core.types import Sampling


class Sampler:
    """One request's settings and its own random numbers, so that neighbours cannot matter."""

    __slots__ = ("_random", "greedy", "seed", "temperature", "top_k", "top_p")

    def __init__(self, sampling: Sampling) -> None:
        check_sampling(sampling)
        self.greedy = sampling.temperature == 0 or sampling.top_k == 1
        self.temperature = sampling.temperature
        self.top_k = sampling.top_k
        self.top_p = sampling.top_p
        self.seed = sampling.seed
        # Not a torch.Generator: these numbers are the same on every device. Of a whole number
        # Random takes the size alone, so that -1 and 1 would draw alike.
        self._random = random.Random(self.seed if self.seed >= 0 else str(self.seed))

    def draw(self) -> float:
        """The next number in [0, 1) of this request."""
        return self._random.random()


def check_sampling(sampling: Sampling) -> None:
    """Raises for settings that make no sense, with the range that does."""
    rules = (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "a whole number from 1"),
        (
            "temperature",
            sampling.temperature >= 0 and math.isfinite(sampling.temperature),
            "0 (greedy) or a positive number",
        ),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1 (1: no limit)"),
        ("top_k", sampling.top_k >= 0, "a whole number from 0 (0: no limit)"),
        ("stop", all(sampling.stop), "strings that are not empty"),
        ("stop", not (sampling.stop and sampling.choices), "none beside choices"),
        (
            "top_logprobs",
            sampling.top_logprobs is None or sampling.top_logprobs >= 0,
            "a whole number from 0 (0: of the chosen tokens alone), or None",
        ),
    )
    for name, fits, allowed in rules:
        if not fits:
            raise PumiceError(
                f"sampling: {name} is {getattr(sampling, name)!r}; allowed: {allowed}."
            )


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """float[B, V] -> B token ids; the largest logit for greedy rows, a draw for the others."""
    tokens = _largest(logits)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawn:
        picked = _draw(logits[drawn], [samplers[row] for row in drawn])
        for row, token in zip(drawn, picked, strict=True):
            tokens[row] = token
    return tokens


def _largest(logits: torch.Tensor) -> list[int]:
    # On the CPU numpy finds it in less than a tenth of torch's time.
    known = logits.device.type == "cpu" and logits.dtype != torch.float64
    tokens: list[int] = (logits.float().numpy() if known else logits).argmax(-1).tolist()
    return tokens


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    # float64: the cut at top_p and the draw must not hang on rounding, which differs by batch size.
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    vocabulary = logits.shape[-1]
    ordered, order = logits.double().sort(dim=-1, descending=True, stable=True)
    temperature = column([s.temperature for s in samplers])
    probs = torch.softmax((ordered - ordered[:, :1]) / temperature, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    rank = torch.arange(vocabulary, device=logits.device)
    kept = before < column([s.top_p for s in samplers])
    # Not above the vocabulary: a whole number may be larger than any float.
    kept &= rank < column([min(s.top_k or vocabulary, vocabulary) for s in samplers])
    kept[:, 0] = True
    # Walked in the order of the vocabulary: by size, two tokens that are as likely but for rounding
    # would change places, and the draw would hang on the batch size again.
    weights = torch.zeros_like(probs).scatter_(1, order, probs * kept)
    reach = weights.cumsum(dim=-1)
    whole = reach[:, -1:]
    # Below the whole, so that a token is found, and the first beyond it has a weight.
    target = torch.minimum(
        column([s.draw() for s in samplers]) * whole, whole.nextafter(torch.zeros_like(whole))
    )
    # Logits that are no numbers reach nothing; their token must be one that there is.
    place = torch.searchsorted(reach, target, right=True).clamp_(max=vocabulary - 1)
    tokens: list[int] = place.squeeze(1).tolist()
    return tokens
