"""The proof that a conversion changed nothing: the same questions to the source and the result.

Shapes: T positions of a prompt, V vocabulary (that of the smaller of both models is compared).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import PIL.Image
import torch

from pumice.core.errors import DataError, PumiceError
from pumice.core.log import get_logger
from pumice.core.memory import give_back_memory
from pumice.core.types import Message, assistant, user
from pumice.models.connectors import Instruction

if TYPE_CHECKING:
    from pumice.models.lmm import LMM
    from pumice.processing.encoded import Encoded
    from pumice.processing.processor import Processor

log = get_logger(__name__)

GREEDY_TOKENS = 8
_FLOAT32_TOLERANCE = 1e-4
# Rounding steps of a half type, times the largest logit, that another order of sums may cost.
_STEPS = 16
_ROWS = 64


@dataclass(frozen=True)
class Probe:
    """One prompt; its pixels and sizes are in `encoded`."""

    name: str
    encoded: Encoded


@dataclass(frozen=True)
class Measured:
    """What a model says to one probe: float[T, V] on the CPU, and the greedy tokens after it.

    The logits are kept in the model's own type.
    """

    name: str
    logits: torch.Tensor
    tokens: tuple[int, ...]


class Speaker(Protocol):
    """A model that answers a probe."""

    def __call__(self, probe: Probe, tokens: int) -> Measured:
        """Logits over the prompt, and so many greedy tokens."""


def make_probes(processor: Processor) -> list[Probe]:
    """Text alone, one image, two turns; those that the template has no place for are left out."""
    picture = probe_image()
    dialogues: dict[str, list[Message]] = {
        "text": [user("What is the capital of France?")],
        "image": [user("What is in this picture?", picture)],
        "two turns": [
            user("What is in this picture?", picture),
            assistant("Coloured bands and a square."),
            user("Which colour has the square?"),
        ],
    }
    probes = []
    for name, messages in dialogues.items():
        try:
            probes.append(Probe(name, processor.encode_prompt(messages)))
        except DataError as error:
            log.info("the probe %r is left out: %s", name, error)
    if not probes:
        raise PumiceError(
            f"the template {processor.template.name!r} takes none of the prompts that prove a "
            f"conversion; convert with another --template."
        )
    return probes


def check_prompts(source: Sequence[Probe], result: Sequence[Probe]) -> str | None:
    """How the prompts of two processors differ, in words; None when they are the same."""
    if [probe.name for probe in source] != [probe.name for probe in result]:
        return "their templates take other kinds of prompts"
    for one, two in zip(source, result, strict=True):
        if one.encoded.input_ids != two.encoded.input_ids:
            return f"the prompt {one.name!r} has other tokens"
        a, b = one.encoded.pixel_values, two.encoded.pixel_values
        if a.shape != b.shape or not torch.equal(a, b):
            return f"the picture of the prompt {one.name!r} is prepared otherwise"
    return None


def probe_image() -> PIL.Image.Image:
    """A picture wider than high, so that padding, cropping and tiling all show; always the same."""
    rows, columns = np.mgrid[0:100, 0:170]
    colors = np.stack([columns * 1.5, rows * 2.5, (rows + columns) % 64 * 4], axis=-1)
    colors[30:70, 20:60] = (250, 20, 20)
    return PIL.Image.fromarray(colors.clip(0, 255).astype(np.uint8), "RGB")


def measure(speaker: Speaker, probes: Sequence[Probe]) -> list[Measured]:
    """What a model says to each probe; see `measure_each`."""
    return list(measure_each(speaker, probes))


def measure_each(speaker: Speaker, probes: Sequence[Probe]) -> Iterator[Measured]:
    """What a model says to one probe after another, so that no more than one need be kept.

    The speaker is held until the last answer is taken.
    """
    for probe in probes:
        yield speaker(probe, GREEDY_TOKENS)
        give_back_memory()


class LMMSpeaker:
    """Our model; greedy tokens come one by one from a cache."""

    def __init__(self, lmm: LMM) -> None:
        self._lmm = lmm

    @torch.inference_mode()
    def __call__(self, probe: Probe, tokens: int) -> Measured:
        """Logits over the prompt, and so many greedy tokens."""
        from transformers import DynamicCache

        lmm, encoded = self._lmm, probe.encoded
        ids = torch.tensor([encoded.input_ids], device=lmm.device)
        features = None
        if encoded.num_images:
            features = lmm.encode_images(
                encoded.pixel_values.to(lmm.device), encoded.image_sizes, self._instruction(encoded)
            )
        cache = DynamicCache(config=lmm.language.config)
        media = lmm.media(ids, features)
        with lmm.looking_at(media):
            logits = lmm.language(lmm.embed(ids, features), cache=cache)
        media = media and media.after()
        chosen = [int(logits[0, -1].argmax())]
        for _ in range(tokens - 1):
            step = lmm.language.embed(torch.tensor([chosen[-1:]], device=lmm.device))
            with lmm.looking_at(media):
                chosen.append(int(lmm.language(step, cache=cache)[0, -1].argmax()))
        return Measured(probe.name, logits[0].cpu(), tuple(chosen))

    def _instruction(self, encoded: Encoded) -> Instruction | None:
        from pumice.processing.collate import pad_instructions

        padded = pad_instructions(encoded.instructions) if encoded.instructions else None
        return padded and Instruction(*(part.to(self._lmm.device) for part in padded))


def compare(
    source: Iterable[Measured], result: Iterable[Measured], dtype: torch.dtype
) -> dict[str, Any]:
    """Both models' answers beside each other, and whether they are the same within `dtype`.

    float32: logits within 1e-4 and the same tokens. Half types round, so there only the logits
    decide, within some rounding steps of the largest.
    """
    rows: list[dict[str, Any]] = []
    for one, two in zip(source, result, strict=True):
        width = min(one.logits.shape[1], two.logits.shape[1])
        same_length = len(one.logits) == len(two.logits)
        a, b = (m.logits[: len(one.logits), :width] for m in (one, two))
        difference = _largest_difference(a, b) if same_length else float("inf")
        agreed = sum(x == y for x, y in zip(one.tokens, two.tokens, strict=True))
        tolerance = _tolerance(dtype, float(a.abs().max()))
        exact = dtype == torch.float32
        ok = difference <= tolerance and (agreed == len(one.tokens) or not exact)
        rows.append(
            {
                "probe": one.name,
                "positions": len(one.logits),
                "max_logit_difference": difference,
                "tolerance": tolerance,
                "tokens_equal": agreed,
                "tokens": len(one.tokens),
                "ok": ok,
            }
        )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "max_logit_difference": max(row["max_logit_difference"] for row in rows),
        "token_agreement": sum(r["tokens_equal"] for r in rows) / sum(r["tokens"] for r in rows),
        "probes": rows,
        "ok": all(row["ok"] for row in rows),
    }


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """float[T, V] twice -> their largest difference, a few rows at a time to spare memory."""
    parts = zip(torch.split(a, _ROWS), torch.split(b, _ROWS), strict=True)
    return max(float((one.float() - two.float()).abs().max()) for one, two in parts)


def _tolerance(dtype: torch.dtype, largest: float) -> float:
    if dtype == torch.float32:
        return _FLOAT32_TOLERANCE
    return _STEPS * torch.finfo(dtype).eps * max(1.0, largest)
