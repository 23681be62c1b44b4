"""Held-out loss on a timer, with the right images and with others, and a few answers to read.

The gap between the two losses says whether the model looks: where labels do not depend on images,
or image tokens do not reach the decoder, it stays at zero while the training loss falls all the
same. Nothing here draws a random number or changes the model, so a run that resumes stays exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import functional as F

from pumice.core.images import open_image
from pumice.core.processes import ALONE, Processes
from pumice.core.types import ImagePart, Message, Sample, TextPart
from pumice.data.held_out import Subset, image_key
from pumice.data.mixture import shuffled
from pumice.infer.decoder import AnyDecoder, Chunk
from pumice.models.modes import evaluating
from pumice.processing.collate import collate
from pumice.train.parallel import computable

if TYPE_CHECKING:
    from pumice.models.lmm import LMM
    from pumice.processing.processor import Processor

log = logging.getLogger(__name__)
T = TypeVar("T")
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
        self,
        spec: ValidationSpec,
        processor: Processor,
        held: Sequence[Subset],
        max_tokens: int,
        group: Processes = ALONE,
    ) -> None:
        self.spec, self.processor, self.max_tokens = spec, processor, max_tokens
        self.group = group
        places = [(source, row) for source, part in enumerate(held) for row in range(len(part))]
        order = shuffled(len(places), "validation")[: spec.rows].tolist()
        self.samples = [held[s][r] for s, r in (places[n] for n in order)]
        self.exchanged = _exchanged(self.samples)

    def names(self) -> list[str]:
        """The ids of the rows that are looked at."""
        return [sample.id for sample in self.samples]

    def due(self, done: int, total: int) -> bool:
        """Whether the model is looked at after so many steps."""
        return done % self.spec.every == 0 or done == total

    def __call__(
        self, lmm: LMM, done: int, total: int, warmup: float, half: bool
    ) -> dict[str, Any]:
        """The figures after `done` of `total` steps: each process computes a share, all get all."""
        pairs = [n for n, other in enumerate(self.exchanged) if other is not None]
        with (
            evaluating(lmm),
            torch.no_grad(),
            torch.autocast(lmm.device.type, dtype=torch.bfloat16, enabled=half),
        ):
            own = self._shared(
                range(len(self.samples)),
                lambda share: self._losses(lmm, [self.samples[n] for n in share]),
            )
            other = self._shared(
                pairs, lambda share: self._losses(lmm, [self._other(n) for n in share])
            )
            with computable(lmm):
                probe = self._shared(
                    range(len(self.samples))[: self.spec.probes],
                    lambda share: [self._asked(lmm, self.samples[n]) for n in share],
                )
        figures = {
            "loss": sum(loss for loss, _ in own) / sum(count for _, count in own),
            "rows": len(own),
            **gap_of([own[n] for n in pairs], other),
            "probe": probe,
        }
        judged = done >= max(math.ceil(warmup * total), _JUDGED_FROM * total)
        figures["image_not_used"] = judged and unused(figures)
        return figures

    def _shared(
        self, places: Sequence[int], compute: Callable[[Sequence[int]], list[T]]
    ) -> list[T]:
        """What `compute` gives for the places, in their order; each process computes a share.

        All shares are of one length, by repeats: what is shared out is computed with together.
        """
        rank, size = self.group.rank, self.group.size
        rounds = range(math.ceil(len(places) / size))
        found = self.group.gather(
            compute([places[(size * n + rank) % len(places)] for n in rounds])
        )
        return [found[n % size][n // size] for n in range(len(places))]

    def _other(self, place: int) -> Sample:
        """The sample with the image of another one."""
        other = self.exchanged[place]
        assert other is not None
        return _with_image(self.samples[place], other)

    def _losses(self, lmm: LMM, samples: Sequence[Sample]) -> list[tuple[float, int]]:
        """Summed cross entropy and supervised tokens of each sample."""
        found = []
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
            found += [(float(part.sum()), len(part)) for part in torch.split(losses, counts)]
        return found

    def _asked(self, lmm: LMM, sample: Sample) -> dict[str, str]:
        """A sample's first question, its answer, and the likeliest tokens the model says."""
        turn = next(n for n, message in enumerate(sample.messages) if message.role == "assistant")
        said = self._said(lmm, sample.messages[:turn], sample.id)
        question = next((m.text for m in reversed(sample.messages[:turn]) if m.role == "user"), "")
        return {
            "id": sample.id, "question": question.strip(), "wanted": sample.messages[turn].text,
            "said": self.processor.decode(said),
        }  # fmt: skip

    def _said(self, lmm: LMM, messages: Sequence[Message], where: str) -> list[int]:
        """The likeliest tokens after a prompt, until all processes' answers have ended."""
        prompt = self.processor.encode_prompt(messages, where=where)
        batch = collate([prompt], self.processor.pad_id).to(lmm.device)
        features = None
        if len(batch.pixel_values):
            features = lmm.encode_images(batch.pixel_values, batch.image_sizes, batch.instruction)
        elif lmm.always_looks:
            lmm.blank_features()
        media = lmm.media(batch.input_ids, features)
        decoder = AnyDecoder(lmm)
        cache = decoder.cache()
        embeds = lmm.embed(batch.input_ids, features)[0]
        [logits] = decoder.read([Chunk(embeds, 0, cache, media, ends=True)])
        media = media and media.after()
        length, ends, said = len(embeds), set(self.processor.end_token_ids), list[int]()
        limit = min(_NEW_TOKENS, lmm.language.max_positions - length)
        over = False
        while True:
            token = int(logits.argmax())
            over = over or len(said) >= limit or token in ends
            if not over:
                said.append(token)
            if self.group.sum(not over) == [0]:
                return said
            # A position that is there also for an answer that is over and waits for the others'.
            place = min(length + len(said) - 1, lmm.language.max_positions - 1)
            [logits] = decoder.step([token], [place], cache, media)


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


def _exchanged(samples: Sequence[Sample]) -> list[ImagePart | None]:
    """For each sample the image of another one; None for a sample without an image."""
    shown = [sample for sample in samples if sample.images]
    by_key = {image_key(sample.images[0]): sample.images[0] for sample in shown}
    keys = sorted(by_key)
    following = dict(zip(keys, keys[1:] + keys[:1], strict=True))
    if len(keys) < 2:
        return [None] * len(samples)
    return [
        by_key[following[image_key(sample.images[0])]] if sample.images else None
        for sample in samples
    ]


def _with_image(sample: Sample, other: ImagePart) -> Sample:
    """The sample with that image in place of each of its own, brought to their size.

    The size stays, as tiled images get as many tokens as their size asks for.
    """
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
