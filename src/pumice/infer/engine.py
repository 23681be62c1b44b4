"""The engine behind every answer: requests are batched, cached, and end as results.

A request that cannot be answered ends as a result with an error; the others go on. What is known
of images and of beginnings of prompts is kept from request to request. `Engine` answers lists of
requests and single ones; `online.Online` answers many threads with the same scheduler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from pumice.core.errors import PumiceError
from pumice.core.types import Message, Request, Result
from pumice.infer.answer import Answer
from pumice.infer.best_decoder import best_decoder
from pumice.infer.choices import Guide, LongChoiceError, choice_ids
from pumice.infer.decoder import Decoder
from pumice.infer.features import ContentHashes, ImageFeatures, Key, Opened, Shown
from pumice.infer.prefixes import PrefixStore
from pumice.infer.rows import Row, Span, name_of
from pumice.infer.sampling import Sampler, check_sampling
from pumice.infer.scheduler import Limits, Memory, Scheduler, Totals
from pumice.models.constants import IMAGE_ID
from pumice.models.lmm import LMM
from pumice.models.modes import evaluating
from pumice.processing.encoded import images_named

if TYPE_CHECKING:
    from pumice.processing.encoded import Encoded
    from pumice.processing.processor import Processor

# Requests are sorted within windows of so many batches, for neighbours of like length.
_WINDOW = 16
# Letters that a position holds at most, for prompts that are not even tokenised. Some tokenizers
# have tokens of hundreds of blanks, but no prompt is made of these.
_LETTERS = 32
_FEATURE_BYTES = 512 * 1024**2
_PREFIX_BYTES = 1024**3
KEPT_BYTES = _FEATURE_BYTES + _PREFIX_BYTES


class Engine:
    """Answers requests with one model; at most `max_batch` rows run at once.

    `prefix_bytes` and `feature_bytes` bound what is kept of prompts and of images for later
    requests; with 0 nothing is kept once its requests are done. Safe to use from several threads.
    """

    def __init__(
        self,
        lmm: LMM,
        processor: Processor,
        max_batch: int = 16,
        *,
        prefix_bytes: int = _PREFIX_BYTES,
        feature_bytes: int = _FEATURE_BYTES,
        compiled: bool = False,
    ) -> None:
        """`compiled`: decode steps go through torch.compile."""
        if max_batch < 1:
            raise PumiceError(f"max_batch is {max_batch}; a whole number from 1 is needed.")
        _check_pair(lmm, processor)
        self.lmm = lmm
        self.processor = processor
        self.max_batch = max_batch
        self.memory = Memory(
            ImageFeatures(lmm, processor, max_batch, feature_bytes),
            PrefixStore(prefix_bytes),
            Totals(),
            threading.RLock(),
        )
        self._hashes = ContentHashes()
        self._weights: tuple[tuple[int, int], ...] = ()
        self._compiled = compiled
        self._decoder: Decoder | None = None

    def generate(
        self,
        requests: Sequence[Request],
        on_result: Callable[[Result], None] | None = None,
    ) -> list[Result]:
        """One result per request, in their order; `on_result` hears each as soon as it is there."""
        results: dict[int, Result] = {}
        places: dict[Row, int] = {}

        def report(index: int, result: Result) -> None:
            results[index] = result
            if on_result is not None:
                on_result(result)

        size = _WINDOW * self.max_batch
        starts = iter(range(0, len(requests), size))
        start: int | None = next(starts, None)
        ahead = self.memory.features.max_bytes > 0
        with self._at_work(Limits(self.max_batch, look_ahead=ahead)) as scheduler:
            while start is not None or not scheduler.idle:
                # Before the last rows of a window run alone, the next one joins them.
                if start is not None and len(scheduler.waiting) < self.max_batch:
                    window = range(start, min(start + size, len(requests)))
                    for index, row in self._rows(requests, window, report):
                        places[row] = index
                        scheduler.add(row)
                    start = next(starts, None)
                for row in scheduler.step():
                    report(places.pop(row), row.result(self.processor.decode))
        return [results[index] for index in range(len(requests))]

    def stream(self, request: Request) -> Generator[str, None, Result]:
        """The answer in pieces, whole characters each; raises when it cannot be answered.

        The pieces together are the text of the result that the generator returns.
        """
        row = self.row(request)
        told = ""
        with evaluating(self.lmm):
            scheduler = self.scheduler(Limits(1))
            scheduler.add(row)
            while not scheduler.idle:
                # Held for a step alone: between them the caller has the thread.
                with scheduler.at_work():
                    scheduler.step()
                settled = row.answer.settled
                if len(settled) > len(told):
                    yield settled[len(told) :]
                    told = settled
        result = row.result(self.processor.decode)
        if result.error is not None:
            raise PumiceError(result.error)
        return result

    @torch.inference_mode()
    def logits(self, messages: Sequence[Message]) -> torch.Tensor:
        """Messages -> float[T, V] over the whole prompt, image tokens expanded."""
        row = self.row(Request(tuple(messages)))
        with evaluating(self.lmm), self.memory.lock:
            self._check_weights()
            [error] = self.memory.features.encode([(row.where, row.images)])
            if error is not None:
                raise PumiceError(error)
            features = [self.memory.features.get(shown) for shown in row.images]
            ids = torch.tensor([row.prompt], device=self.lmm.device)
            logits: torch.Tensor = self.lmm(ids, features=features)
        return logits[0]

    def prepare(self) -> None:
        """Lays all weights out for answering, which the first requests would else wait for."""
        with self.memory.lock:
            self.scheduler(Limits(self.max_batch))
            self.memory.features.prepare()

    def scheduler(self, limits: Limits) -> Scheduler:
        """A new scheduler that shares what this engine keeps of earlier requests."""
        with self.memory.lock:
            self._check_weights()
            if self._decoder is None:
                self._decoder = best_decoder(self.lmm, compiled=self._compiled)
                # Weights that are joined for it lie elsewhere, and are the same.
                self._weights = self._weights_now()
            return Scheduler(self.lmm, self._decoder, self.memory, limits)

    @contextmanager
    def _at_work(self, limits: Limits) -> Iterator[Scheduler]:
        with evaluating(self.lmm):
            scheduler = self.scheduler(limits)
            with scheduler.at_work():
                yield scheduler

    def row(self, request: Request, like: Row | None = None) -> Row:
        """A request checked and tokenised, its images unopened; raises PumiceError otherwise.

        The choices of `like`, another row of the same messages, are not tokenised again.
        """
        check_sampling(request.sampling)
        self._check_letters(request)
        encoded = self.processor.encode_prompt(
            request.messages, where=name_of(request), pixels=False
        )
        prompt = encoded.input_ids
        limit = self.lmm.language.max_positions
        if len(prompt) >= limit:
            raise PumiceError(
                f"{name_of(request)} has {len(prompt)} positions ({prompt.count(IMAGE_ID)} of "
                f"them for {encoded.num_images} images), and the language model reads at most "
                f"{limit}, the answer among them. Shorten the text, or give fewer images."
            )
        new_tokens = min(request.sampling.max_new_tokens, limit - len(prompt))
        answer = self._answer(request, new_tokens, like)
        return Row(
            request=request,
            prompt=prompt,
            spans=self._spans(request, encoded),
            sampler=Sampler(request.sampling),
            answer=answer,
            max_positions=len(prompt) + answer.max_tokens,
        )

    def rows_together(self, requests: Sequence[Request]) -> list[Row]:
        """The rows of requests that may be choices of one: what they share is tokenised once."""
        rows: list[Row] = []
        for request in requests:
            rows.append(self.row(request, rows[-1] if rows else None))
        return rows

    def _check_letters(self, request: Request) -> None:
        """Refuses what is far too long: to tokenise megabytes takes minutes, and holds up all."""
        limit, messages = self.lmm.language.max_positions, request.messages
        letters = sum(len(message.text) for message in messages)
        if max(letters, len(messages)) <= limit:
            return
        most = limit * min(self._longest_token, _LETTERS)
        if letters > most or len(messages) > limit:
            raise PumiceError(
                f"{name_of(request)} has {letters} characters in {len(messages)} turns, and the "
                f"language model reads at most {limit} positions, which hold at most {most}. "
                f"Shorten the text."
            )

    @cached_property
    def _longest_token(self) -> int:
        """In letters; to look through a large vocabulary takes longer than to read a short text."""
        return max(map(len, self.processor.tokenizer.get_vocab()))

    def _answer(self, request: Request, most: int, like: Row | None) -> Answer:
        """An answer of at most `most` tokens, or one of the request's choices."""
        processor, sampling = self.processor, request.sampling
        if not sampling.choices:
            return Answer(
                processor.decode,
                end_tokens=processor.end_token_ids,
                stop=(*processor.stop_strings, *sampling.stop),
                max_tokens=most,
            )
        where, ends = name_of(request), processor.closing_token_ids
        guide = _shared_guide(request, like)
        if guide is None:
            guide = Guide(choice_ids(processor, request.messages, sampling.choices, where), ends)
        longest = guide.longest
        if longest > most:
            raise LongChoiceError(where, longest, most)
        # A choice may hold what would stop a free answer, so nothing but its end stops it.
        return Answer(processor.decode, end_tokens=ends, stop=(), max_tokens=longest, guide=guide)

    def open_images(self, rows: Sequence[Row]) -> dict[Key, Opened]:
        """The images of rows whose features are not there yet, decoded and prepared once each.

        Raises DataError for what is no image.
        """
        features = self.memory.features
        shown = {
            one.key: (one, at) for row in rows for one, at in images_named(row.images, row.where)
        }
        missing = {key: one for key, one in shown.items() if features.get(one[0]) is None}
        return {key: features.open(*one) for key, one in missing.items()}

    def _spans(self, request: Request, encoded: Encoded) -> list[Span]:
        images = [image for message in request.messages for image in message.images]
        asked = encoded.instructions or [[]] * len(images)
        plans = [self.processor.plan(size) for size in encoded.image_sizes] or [None] * len(images)
        spans = []
        at = 0
        for image, ids, plan in zip(images, asked, plans, strict=True):
            first = encoded.input_ids.index(IMAGE_ID, at)
            at = first + self.processor.image_positions(plan)
            spans.append(Span(first, at, Shown(image, self._hashes.of(image), tuple(ids))))
        return spans

    def _rows(
        self, requests: Sequence[Request], window: range, report: Callable[[int, Result], None]
    ) -> list[tuple[int, Row]]:
        """The rows of these requests; those about the same images stand together."""
        rows: list[tuple[int, Row]] = []
        for index in window:
            try:
                rows.append((index, self.row(requests[index])))
            except PumiceError as error:
                report(index, Result(id=requests[index].id, error=str(error)))
        shortest: dict[tuple[object, ...], int] = {}
        for _, row in rows:
            shown = tuple(image.key for image in row.images)
            length = len(row.prompt)
            shortest[shown] = min(shortest.get(shown, length), length)

        def order(entry: tuple[int, Row]) -> tuple[object, ...]:
            row = entry[1]
            shown = tuple(image.key for image in row.images)
            return shortest[shown] if shown else len(row.prompt), shown, len(row.prompt)

        return sorted(rows, key=order)

    def _check_weights(self) -> None:
        """Forgets what other weights have computed, such as those of an earlier training step."""
        weights = self._weights_now()
        if weights != self._weights:
            self.memory.features.renew()
            self.memory.prefixes.clear()
            self._decoder = None
            self._weights = weights

    def _weights_now(self) -> tuple[tuple[int, int], ...]:
        """Which weights these are: where each lies, and how often it was changed."""
        return tuple((p.data_ptr(), p._version) for p in self.lmm.parameters())


def _shared_guide(request: Request, like: Row | None) -> Guide | None:
    """The guide of a row whose answer is one of the same list after the same messages."""
    if like is None or like.answer.guide is None:
        return None
    same = like.request.sampling.choices == request.sampling.choices
    return like.answer.guide.again() if same and like.request.messages == request.messages else None


def _check_pair(lmm: LMM, processor: Processor) -> None:
    # Where there are no tiles, nothing asks for the square in which the tokens stand.
    tiled = processor.image_spec.tiling is not None
    pairs = (
        ("image tokens of a view", processor.image_tokens, lmm.image_tokens),
        ("pixels of a view's side", processor.image_spec.size, lmm.vision.image_size),
        ("tiling", processor.image_spec.tiling, lmm.tiling),
        (
            "side of a view's square of tokens",
            tiled and processor.view_side,
            tiled and lmm.view_side,
        ),
        ("instruction read", processor.instruction is not None, lmm.connector.wants_instruction),
    )
    for what, given, wanted in pairs:
        if given != wanted:
            raise PumiceError(
                f"the processor and the model do not belong together: {what} are {given} for the "
                f"processor and {wanted} for the model. Take both from one checkpoint."
            )
