"""A model to talk to: `pumice.load("pocket").ask("What is this?", images=["cat.jpg"])`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pumice.convert.open import open_model
from pumice.core.errors import PumiceError
from pumice.core.registry import check_choice, suggest
from pumice.core.shipped import resolve_model
from pumice.core.types import Message, Request, Result, Sampling, user
from pumice.infer.engine import KEPT_BYTES, Engine
from pumice.infer.placement import placement
from pumice.infer.requests import chat_messages
from pumice.models.quantize import check_method, pack_for_cpu

if TYPE_CHECKING:
    import PIL.Image
    import torch

    from pumice.models.lmm import LMM
    from pumice.processing.processor import Processor

    ImageLike = str | Path | bytes | PIL.Image.Image

AdapterUse = Literal["merge", "keep"]


class Model:
    """A language-and-vision model with its processor, ready to answer."""

    def __init__(
        self,
        lmm: LMM,
        processor: Processor,
        max_batch: int = 16,
        *,
        kept_bytes: int = KEPT_BYTES,
        compile: bool = False,
    ) -> None:
        self.lmm = lmm
        self.processor = processor
        features = kept_bytes // 3
        self.engine = Engine(
            lmm,
            processor,
            max_batch,
            prefix_bytes=kept_bytes - features,
            feature_bytes=features,
            compiled=compile,
        )
        if compile:
            # What cannot be is told here, and nobody's first question takes minutes.
            self.engine.prepare()

    def ask(self, text: str, images: Sequence[ImageLike] = (), **sampling: Any) -> Result:
        """The answer to one question about any number of images; raises when there is none.

        `sampling` are fields of `pumice.Sampling`, such as max_new_tokens or temperature.
        """
        [result] = self.engine.generate([_question(text, images, sampling)])
        if result.error is not None:
            raise PumiceError(result.error)
        return result

    def generate(
        self, requests: Sequence[Request], on_result: Callable[[Result], None] | None = None
    ) -> list[Result]:
        """One result per request, in their order; a failed request is a result with an error."""
        return self.engine.generate(requests, on_result)

    def stream(
        self, text: str | Request, images: Sequence[ImageLike] = (), **sampling: Any
    ) -> Generator[str, None, Result]:
        """The answer in pieces of whole characters; takes what `ask` takes, or a request."""
        request = text if isinstance(text, Request) else _question(text, images, sampling)
        return self.engine.stream(request)

    def logits(
        self,
        messages: str | Sequence[Message | Mapping[str, Any]],
        images: Sequence[ImageLike] = (),
    ) -> torch.Tensor:
        """Messages -> float[T, V] over the whole prompt, image tokens expanded.

        Messages are ours, OpenAI chat messages, or one question as text; `images` go in front of
        the first user turn.
        """
        return self.engine.logits(_messages(messages, images))


def load(
    name_or_dir: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    max_batch: int = 16,
    kept_bytes: int = KEPT_BYTES,
    quantize: str | None = None,
    base: str | Path | None = None,
    vision: str | Path | None = None,
    template: str | None = None,
    adapter: AdapterUse = "merge",
    compile: bool = False,
) -> Model:
    """The model of a directory, whoever wrote it, or a shipped one by its name.

    pumice, Hugging Face LLaVA, LLaVA-NeXT, InstructBLIP and IDEFICS, original LLaVA, and a language
    model alone are recognised by what lies in the directory. Without `device` the GPU if there is
    one; without `dtype` bfloat16 there and float32 on CPU. `quantize` ("int8" or "int4") holds the
    language model's linear layers in so many bits. `kept_bytes` bounds what is kept of images and
    of beginnings of prompts for later requests. `base` is the language model that a connector or
    an adapter belongs to, `vision` the vision backbone that a checkpoint only names, `template` the
    name of a conversation template where the directory does not say it. An `adapter` (LoRA) is
    merged into its base as it is read, or kept beside it ("keep"). With `compile` decode steps go
    through torch.compile: loading takes a minute or two longer, and needs Triton or, on a CPU, g++.
    """
    method = None if quantize is None else check_method(quantize)
    check_choice("adapter", adapter, get_args(AdapterUse))
    where, precision = placement(device, dtype)
    directory = resolve_model(name_or_dir)
    lmm, processor = open_model(
        directory,
        precision,
        where,
        quantize=method,
        base=base,
        vision=vision,
        template=template,
        keep_adapter=adapter == "keep",
    )
    pack_for_cpu(lmm.language)
    return Model(lmm, processor, max_batch, kept_bytes=kept_bytes, compile=compile)


def _question(text: str, images: Sequence[ImageLike], sampling: dict[str, Any]) -> Request:
    known = [field.name for field in fields(Sampling)]
    for name in sampling:
        if name not in known:
            raise PumiceError(
                f"sampling {name!r} is unknown; known: {', '.join(known)}.{suggest(name, known)}"
            )
    for name in ("stop", "choices"):
        if name in sampling:
            given = sampling[name]
            sampling[name] = (given,) if isinstance(given, str) else tuple(given or ())
    return Request((user(text, *_images(images)),), Sampling(**sampling))


def _messages(
    messages: str | Sequence[Message | Mapping[str, Any]], images: Sequence[ImageLike]
) -> tuple[Message, ...]:
    if isinstance(messages, str):
        return (user(messages, *_images(images)),)
    read: list[Message] = []
    for message in messages:
        if isinstance(message, Message):
            read.append(message)
        else:
            read.extend(chat_messages([message], images_dir=Path()))
    if not images:
        return tuple(read)
    first = next((place for place, m in enumerate(read) if m.role == "user"), None)
    if first is None or any(message.images for message in read):
        raise PumiceError(
            f"{len(images)} images are given beside messages that "
            + ("have no user turn." if first is None else "hold images themselves.")
            + " Give the images in one of the two ways, with a user turn."
        )
    read[first] = user(read[first].text, *_images(images))
    return tuple(read)


def _images(images: Sequence[ImageLike]) -> list[Path | bytes | PIL.Image.Image]:
    if isinstance(images, str | bytes | Path):
        raise PumiceError(f"images is {images!r:.60}; a list of images is needed: images=[...].")
    return [Path(image) if isinstance(image, str) else image for image in images]
