"""How long each row of a mixture is, measured once and kept on disk.

A row is measured when it is first asked for: its text is tokenised, and of its images only width
and height are read, from which the plan of their tiles counts views and image tokens.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pumice.core.errors import DataError
from pumice.core.files import cache_dir, sha256_bytes, write_atomic
from pumice.core.log import get_logger
from pumice.data.mixture import Mixture
from pumice.data.packing import Size

if TYPE_CHECKING:
    from pathlib import Path

    from pumice.processing.encoded import Encoded
    from pumice.processing.processor import Processor

log = get_logger(__name__)


class RowSizes:
    """Tokens and views of rows, by (index of the source, row); several threads may ask."""

    def __init__(
        self, mixture: Mixture, processor: Processor, settings: Sequence[object] | None = None
    ) -> None:
        """`settings` of each source decide how its rows are read, beside what is in them."""
        self.mixture, self.processor = mixture, processor
        reader = _fingerprint(processor)
        self._files = [
            _file([part.source.fingerprint(), str(setting), reader])
            for part, setting in zip(
                mixture.parts, settings or [None] * len(mixture.parts), strict=True
            )
        ]
        # int32[rows, 2], zeros where nothing was measured yet.
        self._tables = [
            _read(file, len(part.source))
            for file, part in zip(self._files, mixture.parts, strict=True)
        ]
        self._known = self._measured()

    def __call__(self, row: tuple[int, int]) -> Size:
        """The size of a row."""
        table = self._tables[row[0]]
        if not table[row[1], 0]:
            sample = self.mixture.parts[row[0]].source[row[1]]
            table[row[1]] = self._size(self.processor.encode(sample, pixels=False))
        tokens, views = table[row[1]].tolist()
        return Size(tokens, views)

    def check(self, row: tuple[int, int], encoded: Encoded) -> None:
        """Refuse a row that is no longer as it was measured, which its image may have caused."""
        known, found = self(row), self._size(encoded)
        if known != found:
            file = self._files[row[0]]
            file.unlink(missing_ok=True)
            self._tables[row[0]][:] = 0
            raise DataError(
                f"sample {encoded.sample_id!r} has {found.tokens} tokens and {found.views} views, "
                f"and had {known.tokens} and {known.views} when it was measured: one of its images "
                f"changed since. The lengths kept in {file} are dropped; give the same command "
                f"again to measure anew."
            )

    def keep(self) -> None:
        """Write what was measured since the last time; without a place for it nothing is kept."""
        if (known := self._measured()) == self._known:
            return
        self._known = known
        for file, table in zip(self._files, self._tables, strict=True):
            buffer = io.BytesIO()
            np.save(buffer, table)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, buffer.getvalue())
            except OSError as error:
                log.warning("the lengths of rows cannot be kept in %s (%s)", file, error)

    def _size(self, encoded: Encoded) -> Size:
        plans = [self.processor.plan(size) for size in encoded.image_sizes]
        views = sum(1 if plan is None else plan.views for plan in plans)
        # Sizes are read before the pixels only where there are tiles to plan.
        return Size(len(encoded.input_ids), views if plans else encoded.num_images)

    def _measured(self) -> int:
        return sum(int(np.count_nonzero(table[:, 0])) for table in self._tables)


def _fingerprint(processor: Processor) -> list[Any]:
    """Everything by which a processor decides how long a conversation is."""
    return [
        processor.tokenizer.backend_tokenizer.to_str(),
        processor.template.to_dict(),
        processor.system,
        processor.image_spec.to_dict(),
        processor.image_tokens,
        processor.view_side,
        processor.image_mark,
    ]


def _file(content: list[Any]) -> Path:
    name = sha256_bytes(json.dumps(content, sort_keys=True).encode())[:24]
    return cache_dir() / "lengths" / f"{name}.npy"


def _read(file: Path, rows: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    if file.is_file():
        try:
            table: np.ndarray[Any, np.dtype[np.int32]] = np.load(file)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read and is made again: %s", file, error)
        else:
            if table.shape == (rows, 2):
                return table
    return np.zeros((rows, 2), np.int32)
