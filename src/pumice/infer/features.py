"""Image features of one call: an image that several requests show is encoded once.

Shapes: I images, S side of the pixel square, Q image tokens of one image, D model width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pumice.core.errors import PumiceError
from pumice.core.types import ImagePart
from pumice.models.lmm import LMM

if TYPE_CHECKING:
    from pumice.processing.processor import Processor

# What may be kept of images that later requests of the same call may show again.
_KEPT_BYTES = 512 * 1024**2


class ImageFeatures:
    """Opens, prepares and encodes images in batches, and remembers them."""

    def __init__(self, lmm: LMM, processor: Processor, batch: int) -> None:
        self._lmm = lmm
        self._processor = processor
        self._batch = batch
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    @torch.inference_mode()
    def encode(self, groups: Sequence[tuple[str, Sequence[ImagePart]]]) -> list[str | None]:
        """Groups of (where, images) -> what went wrong with each group; afterwards `of` has them.

        Every `groups` of one call stays; what earlier calls left goes first when memory is short.
        """
        self._forget()
        wanted: dict[str, torch.Tensor] = {}
        errors: list[str | None] = []
        for where, images in groups:
            try:
                for image in images:
                    self._want(image, where, wanted)
            except PumiceError as error:
                errors.append(str(error))
            else:
                errors.append(None)
        keys = list(wanted)
        for start in range(0, len(keys), self._batch):
            part = keys[start : start + self._batch]
            pixels = torch.stack([wanted[key] for key in part]).to(self._lmm.device)
            for key, encoded in zip(part, self._lmm.encode_images(pixels), strict=True):
                self._known[key] = encoded
                self._bytes += encoded.numel() * encoded.element_size()
        return errors

    def of(self, images: Sequence[ImagePart]) -> torch.Tensor | None:
        """Images already encoded -> float[I, Q, D]; None without images."""
        if not images:
            return None
        return torch.stack([self._known[_key(image)] for image in images])

    def _want(self, image: ImagePart, where: str, wanted: dict[str, torch.Tensor]) -> None:
        key = _key(image)
        if key in self._known:
            self._known.move_to_end(key)
        elif key not in wanted:
            wanted[key] = self._processor.load_image(image, where)

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
