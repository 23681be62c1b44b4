"""Writing small videos with PyAV, which is optional; the same pictures give the same bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_BITS_PER_SECOND = 2_000_000


def can_write_videos() -> bool:
    """True when PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def write_video(path: Path, pictures: Sequence[Image.Image], fps: int) -> None:
    """An MP4 file of RGB pictures of equal size."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the encoder's version in the file, and on one thread, equal input gives equal bytes.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = _BITS_PER_SECOND
        stream.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
