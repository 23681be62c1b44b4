"""Held-out loss on a timer, with the right images and with others, and a few answers to read.

The gap between the two losses says whether the model looks: where labels do not depend on images,
or image tokens do not reach the decoder, it stays at zero while the training loss falls all the
same. Nothing here draws a random number or changes the model, so a run that resumes stays exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from pumice.core.images import open_image
from pumice.core.types import ImagePart, Message, Sample, TextPart
from pumice.data.held_out import Subset, image_key
from pumice.data.mixture import shuffled
from pumice.models.modes import evaluating
from pumice.processing.collate import Batch, collate

if TYPE_CHECKING:
    from pumice.models.lmm import LMM
    from pumice.processing.processor import Processor

log = logging.getLogger(__name__)
_BATCH = 8
# Nats per supervised token; a gap below it, or within two standard errors of zero, is none.
_LEAST_GAP = 0.01
# The image must have become useful by then, and the learning rate have reached its peak.
_JUDGED_FROM = 0.25
_NEW_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSpec:
    """What is held out and how often it is looked at; `rows` are read at most each time."""

    fraction: float
    every: int
    rows: int = 128
    probes: int = 3


class Validator:
    """The held-out rows of a stage and what is asked of them."""

    def __init__(
        self, spec: ValidationSpec, processor: Processor, held: Sequence[Subset], max_tokens: int
    ) -> None:
        self.spec, self.processor, self.max_tokens = spec, processor, max_tokens
        places = [(source, row) for source, part in enumerate(held) for row in range(len(part))]
        order = shuffled(len(places), "validation")[: spec.rows].tolist()
        self.samples = [held[s][r] for s, r in (places[n] for n in order)]
        self.exchanged = _exchanged(self.samples)

    def due(self, done: int, total: int) -> bool:
        """Whether the model is looked at after so many steps."""
        return done % self.spec.every == 0 or done == total

    def __call__(
        self, lmm: LMM, done: int, total: int, warmup: float, half: bool
    ) -> dict[str, Any]:
        """The figures after `done` of `total` steps; all processes compute them alike."""
        with (
            evaluating(lmm),
            torch.no_grad(),
            torch.autocast(lmm.device.type, dtype=torch.bfloat16, enabled=half),
        ):
            own = list(self._losses(lmm, self.samples))
            pairs = [n for n, sample in enumerate(self.exchanged) if sample is not None]
            other = list(self._losses(lmm, [s for s in self.exchanged if s is not None]))
            probe = [self._asked(lmm, sample) for sample in self.samples[: self.spec.probes]]
        figures = {
            "loss": sum(loss for loss, _ in own) / sum(count for _, count in own),
            "rows": len(own),
            **gap_of([own[n] for n in pairs], other),
            "probe": probe,
        }
        judged = done >= max(math.ceil(warmup * total), _JUDGED_FROM * total)
        figures["image_not_used"] = judged and unused(figures)
        return figures

    def _losses(self, lmm: LMM, samples: Sequence[Sample]) -> Iterator[tuple[float, int]]:
        """Summed cross entropy and supervised tokens of each sample."""
        for start in range(0, len(samples), _BATCH):
            encoded = [
                self.processor.encode(sample, self.max_tokens)
                for sample in samples[start : start + _BATCH]
            ]
            batch = collate(encoded, self.processor.pad_id).to(lmm.device)
            counts = (batch.labels[:, 1:] >= 0).sum(1).tolist()
            targets = batch.labels[:, 1:]
            logits = lmm.logits(batch).float()
            losses = F.cross_entropy(logits, targets[targets >= 0], reduction="none")
            for part in torch.split(losses, counts):
                yield float(part.sum()), len(part)

    def _asked(self, lmm: LMM, sample: Sample) -> dict[str, str]:
        """A sample's first question, its answer, and the likeliest tokens the model says."""
        turn = next(n for n, message in enumerate(sample.messages) if message.role == "assistant")
        prompt = self.processor.encode_prompt(sample.messages[:turn], where=sample.id)
        batch = collate([prompt], self.processor.pad_id).to(lmm.device)
        ends, said = set(self.processor.end_token_ids), list[int]()
        while len(said) < _NEW_TOKENS:
            token = int(_next_logits(lmm, batch).argmax())
            if token in ends:
                break
            said.append(token)
            batch = _longer(batch, token)
        question = next((m.text for m in reversed(sample.messages[:turn]) if m.role == "user"), "")
        return {
            "id": sample.id, "question": question.strip(), "wanted": sample.messages[turn].text,
            "said": self.processor.decode(said),
        }  # fmt: skip


def gap_of(own: Sequence[tuple[float, int]], other: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """What wrong images cost, in nats per supervised token, and its standard error over rows."""
    if len(own) < 2:
        return {"shuffled_loss": None, "gap": None, "gap_error": None}
    gaps = [(b - a) / n for (a, n), (b, _) in zip(own, other, strict=True)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return {
        "shuffled_loss": sum(loss for loss, _ in other) / sum(count for _, count in other),
        "gap": mean,
        "gap_error": math.sqrt(variance / len(gaps)),
    }


def unused(figures: dict[str, Any]) -> bool:
    """Whether another image is as good as the right one."""
    gap: float | None = figures["gap"]
    return gap is not None and gap < max(_LEAST_GAP, 2 * figures["gap_error"])


def warning(stage: str, figures: dict[str, Any]) -> str:
    """What to say when it is."""
    return (
        f"stage {stage}: the image is not used: held-out loss is {figures['loss']:.3f}, and with "
        f"other images it is higher by {figures['gap']:.3f} +- {figures['gap_error']:.3f} nats per "
        f"token only. Look at the data (pumice data show: do answers depend on the picture?), at "
        f"the learning rate of the connector, and at the images the rows name."
    )


def _exchanged(samples: Sequence[Sample]) -> list[Sample | None]:
    """Each sample with another one's image, brought to its own size; None without an image.

    The size stays, as tiled images get as many tokens as their size asks for.
    """
    shown = [sample for sample in samples if sample.images]
    by_key = {image_key(sample.images[0]): sample.images[0] for sample in shown}
    keys = sorted(by_key)
    following = dict(zip(keys, keys[1:] + keys[:1], strict=True))
    if len(keys) < 2:
        return [None] * len(samples)
    return [
        _with_image(sample, by_key[following[image_key(sample.images[0])]])
        if sample.images
        else None
        for sample in samples
    ]


def _with_image(sample: Sample, other: ImagePart) -> Sample:
    where = f"sample {sample.id!r} of the validation rows"
    strange = open_image(other.image, where=where)

    def part(given: ImagePart | TextPart) -> ImagePart | TextPart:
        if isinstance(given, TextPart):
            return given
        return ImagePart(strange.resize(open_image(given.image, where=where).size))

    messages = tuple(
        Message(message.role, tuple(part(given) for given in message.content))
        for message in sample.messages
    )
    return replace(sample, messages=messages)


def _next_logits(lmm: LMM, batch: Batch) -> torch.Tensor:
    keep = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    keep[:, -1] = True
    logits: torch.Tensor = lmm(
        batch.input_ids,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        keep=keep,
        image_sizes=batch.image_sizes,
        instruction=batch.instruction,
    )
    return logits[0]


def _longer(batch: Batch, token: int) -> Batch:
    ids = F.pad(batch.input_ids, (0, 1), value=token)
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    return replace(batch, input_ids=ids, position_ids=places)
