"""Image features of one call: an image that several requests show is encoded once.

A connector that reads the question gives other features for another question, so there the
question belongs to what is remembered. Shapes: Qi features of an image, D model width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pumice.core.errors import PumiceError
from pumice.core.types import ImagePart
from pumice.models.connectors import Instruction
from pumice.models.fusion import Features
from pumice.models.lmm import LMM
from pumice.processing.collate import pad_instructions

if TYPE_CHECKING:
    from pumice.processing.processor import Processor

# What may be kept of images that later requests of the same call may show again.
_KEPT_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True)
class Shown:
    """An image in a request, and the ids of what is asked of it (for connectors that read it)."""

    image: ImagePart
    instruction: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Equal for what has equal features."""
        return _key(self.image), self.instruction


@dataclass(frozen=True, slots=True)
class _Opened:
    views: torch.Tensor
    size: tuple[int, int]
    instruction: tuple[int, ...]


class ImageFeatures:
    """Opens, prepares and encodes images in batches, and remembers them."""

    def __init__(self, lmm: LMM, processor: Processor, batch: int) -> None:
        self._lmm = lmm
        self._processor = processor
        self._batch = batch
        self._known: OrderedDict[tuple[str, tuple[int, ...]], torch.Tensor] = OrderedDict()
        self._bytes = 0

    @torch.inference_mode()
    def encode(self, groups: Sequence[tuple[str, Sequence[Shown]]]) -> list[str | None]:
        """Groups of (where, images) -> what went wrong with each group; afterwards `of` has them.

        Every `groups` of one call stays; what earlier calls left goes first when memory is short.
        """
        self._forget()
        wanted: dict[tuple[str, tuple[int, ...]], _Opened] = {}
        errors: list[str | None] = []
        for where, images in groups:
            try:
                for shown in images:
                    self._want(shown, where, wanted)
            except PumiceError as error:
                errors.append(str(error))
            else:
                errors.append(None)
        for keys in self._batches(wanted):
            encoded = self._encode([wanted[key] for key in keys])
            for key, features in zip(keys, encoded, strict=True):
                self._known[key] = features
                self._bytes += features.numel() * features.element_size()
        return errors

    def of(self, images: Sequence[Shown]) -> list[torch.Tensor]:
        """Images already encoded -> float[Qi, D] of each."""
        return [self._known[shown.key] for shown in images]

    def _want(
        self,
        shown: Shown,
        where: str,
        wanted: dict[tuple[str, tuple[int, ...]], _Opened],
    ) -> None:
        if shown.key in self._known:
            self._known.move_to_end(shown.key)
        elif shown.key not in wanted:
            views, size = self._processor.load_image(shown.image, where)
            wanted[shown.key] = _Opened(views, size, shown.instruction)

    def _batches(
        self, wanted: dict[tuple[str, tuple[int, ...]], _Opened]
    ) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
        """Keys in groups of about as many views as a batch has rows; an image stays whole."""
        group: list[tuple[str, tuple[int, ...]]] = []
        views = 0
        for key, opened in wanted.items():
            if group and views + len(opened.views) > self._batch:
                yield group
                group, views = [], 0
            group.append(key)
            views += len(opened.views)
        if group:
            yield group

    def _encode(self, images: Sequence[_Opened]) -> Features:
        pixels = torch.cat([image.views for image in images]).to(self._lmm.device)
        instruction = None
        if self._processor.instruction is not None:
            padded = pad_instructions([image.instruction for image in images])
            instruction = padded and Instruction(*(p.to(self._lmm.device) for p in padded))
        return self._lmm.encode_images(pixels, [image.size for image in images], instruction)

    def _forget(self) -> None:
        while self._bytes > _KEPT_BYTES:
            _, encoded = self._known.popitem(last=False)
            self._bytes -= encoded.numel() * encoded.element_size()


def _key(part: ImagePart) -> str:
    image = part.image
    if isinstance(image, Path):
        return f"file:{image}"
    if isinstance(image, bytes):
        return f"bytes:{hashlib.sha256(image).hexdigest()}"
    # An opened picture; the request holds it for the whole call, so no other can get its id.
    return f"picture:{id(image)}"
