"""Messages and images to token ids, labels and pixels: the one road for training and generation.

Ids and labels are built together, segment by segment, and never found again in text. What a prompt
holds is therefore always the beginning of what was trained on. An image is a run of `IMAGE_ID`,
which is outside every vocabulary: no text can forge one.

Shapes: N = views of all images (an image that is not tiled has one), S = side of a view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import write_json
from pumice.core.images import image_size, open_image
from pumice.core.types import ImagePart, Message, Sample
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.tiling import ImagePlan, plan_image
from pumice.processing.encoded import Encoded, images_named, sample_named
from pumice.processing.images import ImageSpec, preprocess
from pumice.processing.own_template import find_template
from pumice.processing.processor_file import (
    FORMAT,
    INSTRUCTION_FOLDER,
    PROCESSOR_FILE,
    VERSION,
    read_instruction,
    read_processor_file,
)
from pumice.processing.templates import BOS, EOS, Segment, Template, Token
from pumice.processing.text_encoder import TextEncoder, template_tokens
from pumice.processing.tiles import cut_views
from pumice.processing.view_room import ViewRoom, in_one

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Marks, spaces, line breaks, several scripts, and spellings of special tokens.
_CHECK_TEXT = " Yes:  a cat,\n\n3.14 naïve 猫 고양이 😀 </s> <image>"


class Processor:
    """Encodes conversations for one tokenizer, image preparation and template.

    `system` None is the template's own system text and "" none. A template that keeps images alone
    (`plain`) has no place for a system text and leaves it out. `image_tokens` are those of one
    view, and `view_side` the side of the square they stand in (None: learnt queries, no square).
    With `image_mark` one position stands for an image, however many views it has (gated
    cross-attention). `instruction` says which tokenizer reads what is asked of an image: "language"
    for this one, or another tokenizer; None for connectors that do not read it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_spec: ImageSpec,
        template: str | Template,
        system: str | None,
        image_tokens: int,
        *,
        view_side: int | None = None,
        image_mark: bool = False,
        instruction: PreTrainedTokenizerFast | Literal["language"] | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        if image_tokens < 1:
            raise PumiceError(
                f"image_tokens is {image_tokens}; 1 or more are allowed. Give the image_tokens of "
                "the model."
            )
        self.tokenizer = tokenizer
        self.image_spec = image_spec
        self.template = (
            find_template(template, tokenizer) if isinstance(template, str) else template
        )
        self.system = system
        self.image_tokens = image_tokens
        self.view_side = view_side
        self.image_mark = image_mark
        self.instruction = instruction
        self._text = text_encoder or TextEncoder(tokenizer)
        self._token_ids = template_tokens(self.template, self._text)

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch; never learnt, so it may be the end token as well."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in known if token is not None))

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's own end token, then the tokenizer's."""
        ends = [self.template.end, EOS] if self.template.end else [EOS]
        ids = [self._text.token_id(token) for token in ends]
        return tuple(dict.fromkeys(index for index in ids if index is not None))

    @property
    def closing_token_ids(self) -> tuple[int, ...]:
        """What may follow a whole answer: end tokens, and the first of texts in their place."""
        texts = (self.template.after_answer, *self.stop_strings)
        first = [self._text.after_text("a", text)[0] for text in texts if text]
        return tuple(dict.fromkeys([*self.end_token_ids, *first]))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer, for templates without an end token."""
        return self.template.stop

    def with_template(self, template: str | Template, system: str | None = None) -> Processor:
        """The same tokenizer and image preparation under another template."""
        return Processor(
            self.tokenizer,
            self.image_spec,
            template,
            system,
            self.image_tokens,
            view_side=self.view_side,
            image_mark=self.image_mark,
            instruction=self.instruction,
            text_encoder=self._text,
        )

    def encode(self, sample: Sample, max_tokens: int | None = None, pixels: bool = True) -> Encoded:
        """A training conversation; pixel_values float[N, 3, S, S], without `pixels` N = 0.

        More than `max_tokens` tokens (image tokens counted) is an error; nothing is cut off.
        """
        encoded = self._encode(sample.messages, sample_named(sample), False, max_tokens, pixels)
        encoded.sample_id = sample.id
        return encoded

    def encode_batch(
        self, samples: Sequence[Sample], max_tokens: int | None = None
    ) -> list[Encoded]:
        """Training conversations as `encode` makes each, their views one behind the other.

        All texts come first: to go to and fro between tokens and pixels costs a few hundredths.
        """
        places = [sample_named(sample) for sample in samples]
        read = [
            self._read(sample.messages, place, False, max_tokens)
            for sample, place in zip(samples, places, strict=True)
        ]
        tiled = self.image_spec.tiling is not None
        count = 0 if tiled else sum(len(images) for _, images in read)
        room = ViewRoom(count, self.image_spec.size)
        for sample, place, (encoded, images) in zip(samples, places, read, strict=True):
            self._show(encoded, images, place, room)
            encoded.sample_id = sample.id
        return [encoded for encoded, _ in read]

    def encode_prompt(
        self,
        messages: Sequence[Message],
        *,
        where: str = "the prompt",
        max_tokens: int | None = None,
        pixels: bool = True,
    ) -> Encoded:
        """A conversation that waits for its answer; pixel_values float[N, 3, S, S].

        Nothing in it is learnt. `pixels` False leaves the images unopened (N = 0), for callers that
        keep image features.
        """
        encoded = self._encode(messages, where, True, max_tokens, pixels)
        encoded.labels = [IGNORE] * len(encoded.input_ids)
        return encoded

    def answer_ids(
        self, messages: Sequence[Message], texts: Iterable[str], where: str = ""
    ) -> list[list[int]]:
        """The ids of answers to these messages as each would be learnt, without what closes it."""
        prompt = self.template.segments(
            messages, open_turn=True, system=self.system, where=where or "the prompt"
        )
        before = self.template.before_answer
        answers = [Segment("text", f"{before}{text}", learn=True) for text in texts]
        return [self._piece(answer, prompt[-1], where) for answer in answers]

    def load_image(
        self, image: ImagePart, where: str = "", room: ViewRoom | None = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """One image opened and prepared -> float[V, 3, S, S], its views, and width and height."""
        opened = open_image(image.image, where=where, transparency=self.image_spec.transparency)
        plan = self.plan(opened.size)
        if plan is None:
            into = room.take() if room else None
            return preprocess(opened, self.image_spec, into).unsqueeze(0), opened.size
        return cut_views(opened, plan, self.image_spec), opened.size

    def plan(self, size: tuple[int, int]) -> ImagePlan | None:
        """How an image of this width and height is tiled; None without tiling."""
        tiling = self.image_spec.tiling
        if tiling is None:
            return None
        return plan_image(size, tiling, self.view_side, self.image_tokens)

    def instruction_ids(self, text: str, where: str = "") -> list[int]:
        """The ids of what is asked of an image, as the connector reads them; [] if it does not."""
        if self.instruction is None or not self.template.user_text:
            return []
        text = text.strip()
        if self.instruction == "language":
            return self._text.start(text, where) if text else []
        ids: list[int] = self.instruction(text).input_ids
        limit = self.instruction.model_max_length
        if len(ids) > limit:
            raise DataError(
                f"{where}: the question about the image has {len(ids)} tokens for the connector, "
                f"which reads at most {limit}; nothing is cut off. Shorten it."
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special tokens; image positions leave no trace."""
        text = self.tokenizer.decode(
            [index for index in ids if index >= 0],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def save(self, directory: Path | str) -> None:
        """Writes the tokenizer's files and processor.json, which holds the template as data."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        data = {
            "format": FORMAT,
            "version": VERSION,
            "template": self.template.to_dict(),
            "system": self.system,
            "image": self.image_spec.to_dict(),
            "image_tokens": self.image_tokens,
            "view_side": self.view_side,
            "image_mark": self.image_mark,
            "instruction": self._save_instruction(directory),
            "check": {"text": _CHECK_TEXT, "ids": self._read_check(_CHECK_TEXT)},
        }
        write_json(directory / PROCESSOR_FILE, data)

    @classmethod
    def load(cls, directory: Path | str) -> Processor:
        """The processor written by `save`; a tokenizer that reads text otherwise is an error."""
        from transformers import PreTrainedTokenizerFast

        directory = Path(directory)
        data = read_processor_file(directory)
        if not (directory / "tokenizer.json").is_file():
            raise PumiceError(
                f"{directory} holds no tokenizer.json; the tokenizer files belong beside "
                f"{PROCESSOR_FILE}. Copy the whole checkpoint directory again."
            )
        # This class takes tokenizer.json as it is; a family's own class may rebuild it.
        processor = cls(
            PreTrainedTokenizerFast.from_pretrained(directory),
            ImageSpec.from_dict(data["image"]),
            Template.from_dict(data["template"]),
            data["system"],
            data["image_tokens"],
            view_side=data["view_side"],
            image_mark=data["image_mark"],
            instruction=read_instruction(directory, data["instruction"]),
        )
        given = processor._read_check(data["check"]["text"])
        if given != data["check"]["ids"]:
            raise PumiceError(
                f"the tokenizer in {directory} reads a text other than when it was saved: "
                f"{given} instead of {data['check']['ids']} for {data['check']['text']!r}. The "
                "model's answers would be wrong. Restore the tokenizer files, or use the versions "
                "of transformers and tokenizers that saved them."
            )
        return processor

    def _save_instruction(self, directory: Path) -> str | None:
        if self.instruction is None or isinstance(self.instruction, str):
            return self.instruction
        self.instruction.save_pretrained(directory / INSTRUCTION_FOLDER)
        return INSTRUCTION_FOLDER

    def _read_check(self, text: str) -> list[int]:
        return self._text.start(text) + self._text.after_token(text.strip())

    def _encode(
        self,
        messages: Sequence[Message],
        where: str,
        open_turn: bool,
        max_tokens: int | None,
        pixels: bool,
    ) -> Encoded:
        encoded, images = self._read(messages, where, open_turn, max_tokens)
        if pixels:
            self._show(encoded, images, where)
        return encoded

    def _read(
        self, messages: Sequence[Message], where: str, open_turn: bool, max_tokens: int | None
    ) -> tuple[Encoded, list[ImagePart]]:
        """All but the pixels, and the images; what is too long is refused before they are read."""
        segments = self.template.segments(
            messages, open_turn=open_turn, system=self.system, where=where
        )
        images = [segment.image for segment in segments if segment.image is not None]
        sizes = self._sizes(images, where)
        counts = [self.image_positions(self.plan(size)) for size in sizes]
        counts = counts or [self.image_tokens] * len(images)
        ids, labels = self._assemble(segments, counts, where)
        if max_tokens is not None and len(ids) > max_tokens:
            raise DataError(
                f"{where} has {len(ids)} tokens ({sum(counts)} of them for "
                f"{len(images)} images); at most {max_tokens} are allowed and nothing is cut off. "
                "Shorten it, raise max_tokens, or take it out of the data."
            )
        none = torch.empty(0, 3, *[self.image_spec.size] * 2)
        asked = self._instructions(messages, where)
        encoded = Encoded(ids, labels, none, len(images), instructions=asked)
        self._set_sizes(encoded, sizes)
        return encoded, images

    def _show(
        self,
        encoded: Encoded,
        images: Sequence[ImagePart],
        where: str,
        room: ViewRoom | None = None,
    ) -> None:
        """Puts in the views of all images, in `room` while there is some."""
        pairs = [self.load_image(image, at, room) for image, at in images_named(images, where)]
        if pairs:
            encoded.pixel_values = in_one([view for view, _ in pairs])
            self._set_sizes(encoded, [size for _, size in pairs])

    def _set_sizes(self, encoded: Encoded, sizes: list[tuple[int, int]]) -> None:
        encoded.image_sizes = sizes
        encoded.grids = [plan.grid if plan else (1, 1) for plan in map(self.plan, sizes)]

    def image_positions(self, plan: ImagePlan | None) -> int:
        """The positions of one image in the text."""
        return self.image_tokens if plan is None or self.image_mark else plan.tokens.total

    def _sizes(self, images: Sequence[ImagePart], where: str) -> list[tuple[int, int]]:
        """Width and height of images before they are decoded; none are needed without tiling."""
        if self.image_spec.tiling is None:
            return []
        return [image_size(image.image, where=at) for image, at in images_named(images, where)]

    def _instructions(self, messages: Sequence[Message], where: str) -> list[list[int]]:
        if self.instruction is None:
            return []
        return [
            self.instruction_ids(message.text, where)
            for message in messages
            for _ in message.images
        ]

    def _assemble(
        self, segments: Sequence[Segment], counts: Sequence[int], where: str
    ) -> tuple[list[int], list[int]]:
        """Ids and labels; `counts` are the positions of each image."""
        places, ids, labels = iter(counts), list[int](), list[int]()
        last: Segment | None = None
        for segment in segments:
            if segment.kind == "token" and Token(segment.text) not in self._token_ids:
                continue  # BOS of a tokenizer that has none
            piece = (
                [IMAGE_ID] * next(places)
                if segment.kind == "image"
                else self._piece(segment, last, where)
            )
            if segment.learn and not piece:
                raise DataError(
                    f"{where}: the answer {segment.text[:60]!r} has no tokens under this "
                    "tokenizer; an answer needs at least one. Change or remove the sample."
                )
            ids += piece
            labels += piece if segment.learn else [IGNORE] * len(piece)
            # At the very front the mark of a sequence's start belongs to the text after BOS, which
            # images may precede.
            first = segment.text == BOS.name and ids.count(IMAGE_ID) == len(ids) - 1
            last = None if first else segment
        return ids, labels

    def _piece(self, segment: Segment, last: Segment | None, where: str) -> list[int]:
        if segment.kind == "token":
            return [self._token_ids[Token(segment.text)]]
        if last is None or last.kind == "image":
            return self._text.start(segment.text, where)
        if last.kind == "token":
            return self._text.after_token(segment.text, where)
        return self._text.after_text(last.text, segment.text, where)
