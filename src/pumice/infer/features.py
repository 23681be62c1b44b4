"""Image features by what the image holds: an image that several requests show is encoded once.

A connector that reads the question gives other features for another question, so there the
question belongs to what is remembered. Shapes: Qi features of an image, D model width.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.ExifTags
import PIL.Image
import torch

from pumice.core.errors import PumiceError
from pumice.core.images import MAX_PIXELS
from pumice.core.types import ImagePart
from pumice.infer.plain_vision import PlainEncoder, plain_encoders, standing_in
from pumice.models.connectors import Instruction
from pumice.models.fusion import Features
from pumice.models.lmm import LMM
from pumice.processing.collate import pad_instructions
from pumice.processing.encoded import images_named

if TYPE_CHECKING:
    from pumice.processing.processor import Processor

Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Shown:
    """An image in a request, and the ids of what is asked of it (for connectors that read it)."""

    image: ImagePart
    content: str
    """The hash of what the image holds."""
    instruction: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        """Equal for what has equal features."""
        return self.content, self.instruction


@dataclass(frozen=True, slots=True)
class Opened:
    """An image that is decoded and prepared."""

    views: torch.Tensor
    """float[V, 3, S, S]"""
    size: tuple[int, int]
    instruction: tuple[int, ...]


class ImageFeatures:
    """Opens, prepares and encodes images in batches, and remembers them."""

    def __init__(self, lmm: LMM, processor: Processor, batch: int, max_bytes: int) -> None:
        self._lmm = lmm
        self._processor = processor
        self._batch = batch
        self.max_bytes = max_bytes
        self.encoded = 0
        """Images that went through the vision backbone."""
        self._encoders: list[PlainEncoder] | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets every image."""
        self._known: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self.bytes = 0

    def renew(self) -> None:
        """For other weights: of these neither what they computed nor how they lay is of use."""
        self.clear()
        self._encoders = None

    def prepare(self) -> None:
        """Lays the weights of the vision backbone out for encoding, unless that is done."""
        if self._encoders is None:
            self._encoders = plain_encoders(self._lmm.vision)

    def open(self, shown: Shown, where: str) -> Opened:
        """The image decoded and prepared; raises DataError for what is no image."""
        views, size = self._processor.load_image(shown.image, where)
        return Opened(views, size, shown.instruction)

    @torch.inference_mode()
    def encode(
        self,
        groups: Sequence[tuple[str, Sequence[Shown]]],
        opened: Mapping[Key, Opened] | None = None,
    ) -> list[str | None]:
        """Groups of (where, images) -> what went wrong with each group; afterwards `get` has them.

        Every image of one call stays; what earlier calls left goes first when memory is short.
        `opened` holds images that are decoded already.
        """
        self._forget()
        opened = opened or {}
        wanted: dict[Key, Opened] = {}
        errors: list[str | None] = []
        for where, images in groups:
            try:
                for shown, at in images_named(images, where):
                    if shown.key in self._known:
                        self._known.move_to_end(shown.key)
                    elif shown.key not in wanted:
                        wanted[shown.key] = opened.get(shown.key) or self.open(shown, at)
            except PumiceError as error:
                errors.append(str(error))
            else:
                errors.append(None)
        for keys in self._batches(wanted):
            encoded = self._encode([wanted[key] for key in keys])
            self.encoded += len(keys)
            for key, features in zip(keys, encoded, strict=True):
                # A view would hold the images that were encoded with it, forgotten or not.
                view = features.untyped_storage().nbytes() > features.nbytes
                self._known[key] = features.clone() if view else features
                self.bytes += features.nbytes
        return errors

    def get(self, shown: Shown) -> torch.Tensor | None:
        """float[Qi, D] of an image; None when it is not remembered."""
        return self._known.get(shown.key)

    def _batches(self, wanted: dict[Key, Opened]) -> Iterator[list[Key]]:
        """Keys in groups of about as many views as a batch has rows; an image stays whole."""
        group: list[Key] = []
        views = 0
        for key, opened in wanted.items():
            if group and views + len(opened.views) > self._batch:
                yield group
                group, views = [], 0
            group.append(key)
            views += len(opened.views)
        if group:
            yield group

    def _encode(self, images: Sequence[Opened]) -> Features:
        pixels = torch.cat([image.views for image in images]).to(self._lmm.device)
        instruction = None
        if self._processor.instruction is not None:
            padded = pad_instructions([image.instruction for image in images])
            instruction = padded and Instruction(*(p.to(self._lmm.device) for p in padded))
        self.prepare()
        with standing_in(self._encoders or ()):
            return self._lmm.encode_images(pixels, [image.size for image in images], instruction)

    def _forget(self) -> None:
        while self.bytes > self.max_bytes:
            _, encoded = self._known.popitem(last=False)
            self.bytes -= encoded.nbytes


class ContentHashes:
    """Hashes of what images hold; a file is read again only when it has changed."""

    def __init__(self, size: int = 65536) -> None:
        self._size = size
        self._files: OrderedDict[tuple[Path, int, int], str] = OrderedDict()

    def of(self, part: ImagePart) -> str:
        """Equal for equal files, encoded bytes or pixels.

        What cannot be read gets a hash that nothing else has: opening it says what is wrong.
        """
        image = part.image
        try:
            if isinstance(image, bytes):
                return hashlib.sha256(image).hexdigest()
            if isinstance(image, Path):
                return self._file(image)
            return _pixels(image)
        except (OSError, ValueError, PIL.Image.DecompressionBombError):
            return f"unread:{uuid.uuid4()}"

    def _file(self, path: Path) -> str:
        state = path.stat()
        known = (path, state.st_mtime_ns, state.st_size)
        if known not in self._files:
            self._files[known] = hashlib.sha256(path.read_bytes()).hexdigest()
            if len(self._files) > self._size:
                self._files.popitem(last=False)
        return self._files[known]


def _pixels(image: PIL.Image.Image) -> str:
    """The pixels of an opened picture, and what else decides how they are seen."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("refused when it is opened")
    palette = image.getpalette() if image.mode == "P" else None
    orientation = image.getexif().get(PIL.ExifTags.Base.Orientation)
    seen = (image.mode, image.size, palette, image.info.get("transparency"), orientation)
    return hashlib.sha256(repr(seen).encode() + image.tobytes()).hexdigest()
