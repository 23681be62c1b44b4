"""The engine behind every answer: requests are batched, cached, and end as results.

A request that cannot be answered ends as a result with an error; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pumice.core.errors import PumiceError
from pumice.core.types import Message, Request, Result
from pumice.infer.answer import Answer
from pumice.infer.decoding import Decoding, Row
from pumice.infer.features import ImageFeatures, Shown
from pumice.infer.sampling import Sampler, check_sampling
from pumice.models.constants import IMAGE_ID
from pumice.models.lmm import LMM

if TYPE_CHECKING:
    from pumice.processing.processor import Processor

# Requests are sorted by length within windows of so many batches, for neighbours of like length.
_WINDOW = 16


@dataclass(slots=True)
class _Prepared:
    index: int
    request: Request
    ids: list[int]
    images: list[Shown]

    @property
    def where(self) -> str:
        return _where(self.request)


class Engine:
    """Answers requests with one model; at most `max_batch` rows run at once."""

    def __init__(self, lmm: LMM, processor: Processor, max_batch: int = 16) -> None:
        if max_batch < 1:
            raise PumiceError(f"max_batch is {max_batch}; a whole number from 1 is needed.")
        _check_pair(lmm, processor)
        self.lmm = lmm
        self.processor = processor
        self.max_batch = max_batch

    def generate(
        self,
        requests: Sequence[Request],
        on_result: Callable[[Result], None] | None = None,
    ) -> list[Result]:
        """One result per request, in their order; `on_result` hears each as soon as it is there."""
        results: dict[int, Result] = {}

        def report(index: int, result: Result) -> None:
            results[index] = result
            if on_result is not None:
                on_result(result)

        features = ImageFeatures(self.lmm, self.processor, self.max_batch)
        size = _WINDOW * self.max_batch
        with _evaluating(self.lmm):
            for start in range(0, len(requests), size):
                window = range(start, min(start + size, len(requests)))
                ready = self._prepare_all(requests, window, report)
                for first in range(0, len(ready), self.max_batch):
                    self._answer(ready[first : first + self.max_batch], features, report)
        return [results[index] for index in range(len(requests))]

    def stream(self, request: Request) -> Generator[str, None, Result]:
        """The answer in pieces, whole characters each; raises when it cannot be answered.

        The pieces together are the text of the result that the generator returns.
        """
        prepared = self._prepare(0, request)
        told = ""
        with _evaluating(self.lmm):
            row = self._row(prepared, self._encode_one(prepared))
            for _ in Decoding(self.lmm, [row]).run():
                settled = row.answer.settled
                if len(settled) > len(told):
                    yield settled[len(told) :]
                    told = settled
        return _result(prepared.request, row)

    @torch.inference_mode()
    def logits(self, messages: Sequence[Message]) -> torch.Tensor:
        """Messages -> float[T, V] over the whole prompt, image tokens expanded."""
        prepared = self._prepare(0, Request(tuple(messages)))
        with _evaluating(self.lmm):
            features = self._encode_one(prepared).of(prepared.images)
            ids = torch.tensor([prepared.ids], device=self.lmm.device)
            logits: torch.Tensor = self.lmm(ids, features=features)
        return logits[0]

    def _prepare_all(
        self, requests: Sequence[Request], window: range, report: Callable[[int, Result], None]
    ) -> list[_Prepared]:
        ready: list[_Prepared] = []
        for index in window:
            try:
                ready.append(self._prepare(index, requests[index]))
            except PumiceError as error:
                report(index, Result(id=requests[index].id, error=str(error)))
        return sorted(ready, key=lambda prepared: len(prepared.ids))

    def _answer(
        self,
        chunk: Sequence[_Prepared],
        features: ImageFeatures,
        report: Callable[[int, Result], None],
    ) -> None:
        errors = features.encode([(prepared.where, prepared.images) for prepared in chunk])
        rows = []
        requests: dict[int, Request] = {}
        for prepared, error in zip(chunk, errors, strict=True):
            if error is not None:
                report(prepared.index, Result(id=prepared.request.id, error=error))
                continue
            requests[prepared.index] = prepared.request
            rows.append(self._row(prepared, features))
        for finished in Decoding(self.lmm, rows).run():
            for row in finished:
                report(row.index, _result(requests[row.index], row))

    def _encode_one(self, prepared: _Prepared) -> ImageFeatures:
        features = ImageFeatures(self.lmm, self.processor, self.max_batch)
        [error] = features.encode([(prepared.where, prepared.images)])
        if error is not None:
            raise PumiceError(error)
        return features

    def _prepare(self, index: int, request: Request) -> _Prepared:
        check_sampling(request.sampling)
        encoded = self.processor.encode_prompt(
            request.messages, where=_where(request), pixels=False
        )
        positions = len(encoded.input_ids)
        limit = self.lmm.language.max_positions
        if positions >= limit:
            raise PumiceError(
                f"{_where(request)} has {positions} positions "
                f"({encoded.input_ids.count(IMAGE_ID)} of them for {encoded.num_images} images), "
                f"and the language model reads at most {limit}, the answer among them. Shorten the "
                f"text, or give fewer images."
            )
        images = [image for message in request.messages for image in message.images]
        asked = encoded.instructions or [[]] * len(images)
        shown = [Shown(image, tuple(ids)) for image, ids in zip(images, asked, strict=True)]
        return _Prepared(index, request, encoded.input_ids, shown)

    def _row(self, prepared: _Prepared, features: ImageFeatures) -> Row:
        sampling = prepared.request.sampling
        answer = Answer(
            self.processor.decode,
            end_tokens=self.processor.end_token_ids,
            stop=(*self.processor.stop_strings, *sampling.stop),
            max_tokens=min(
                sampling.max_new_tokens, self.lmm.language.max_positions - len(prepared.ids)
            ),
        )
        return Row(
            index=prepared.index,
            prompt=prepared.ids,
            features=features.of(prepared.images),
            sampler=Sampler(sampling),
            answer=answer,
        )


def _check_pair(lmm: LMM, processor: Processor) -> None:
    pairs = (
        ("image tokens of a view", processor.image_tokens, lmm.image_tokens),
        ("pixels of a view's side", processor.image_spec.size, lmm.vision.image_size),
        ("tiling", processor.image_spec.tiling, lmm.tiling),
        ("instruction read", processor.instruction is not None, lmm.connector.wants_instruction),
    )
    for what, given, wanted in pairs:
        if given != wanted:
            raise PumiceError(
                f"the processor and the model do not belong together: {what} are {given} for the "
                f"processor and {wanted} for the model. Take both from one checkpoint."
            )


@contextmanager
def _evaluating(lmm: LMM) -> Iterator[None]:
    # Training code generates too, with a model that must be in training mode again afterwards.
    if not lmm.training:
        yield
        return
    modes = [(module, module.training) for module in lmm.modules()]
    lmm.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _where(request: Request) -> str:
    return f"request {request.id!r}" if request.id else "the prompt"


def _result(request: Request, row: Row) -> Result:
    return Result(
        id=request.id,
        text=row.answer.text,
        finish_reason=row.answer.finish_reason,
        prompt_tokens=len(row.prompt),
        image_tokens=row.prompt.count(IMAGE_ID),
        new_tokens=row.answer.new_tokens,
    )
