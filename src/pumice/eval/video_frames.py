"""The frame in the middle of a video, as LLaVA-1.5 shows videos to a model that reads images.

Decoding is PyAV's (the optional extra `benchmarks`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import cache_dir, sha256_bytes, write_atomic

Span = Literal["whole", "seconds", "frames"]
"""What a segment counts: nothing (the whole video), seconds, or frames."""


def middle_index(frames: int, fps: float, span: Span, segment: Sequence[float] = ()) -> int:
    """Which frame LLaVA takes from a video of so many frames, counted from 0.

    Its middle is that of SEED-Bench's sampler with one piece: half of (length - 1), cut. A whole
    video counts as one frame shorter than it is; a segment in seconds is cut to the last frame.
    """
    if span == "whole":
        start, length = 0, frames - 1
    elif span == "seconds":
        start, end = (int(min(max(time * fps, 0), frames - 1)) for time in segment)
        length = end - start
    else:
        start, end = int(segment[0]), int(min(segment[1], frames))
        length = end - start
    return start + max(0, (length - 1) // 2)


def frame_file(video: Path, name: str) -> Path:
    """Where a frame of this very file (its place, size and time) is kept under this name."""
    stat = video.stat() if video.is_file() else None
    key = f"{video.resolve()} {stat and (stat.st_size, stat.st_mtime_ns)}"
    return cache_dir() / "frames" / sha256_bytes(key.encode())[:16] / name


def save_middle_frame(video: Path, span: Span, segment: Sequence[float], out: Path) -> None:
    """Writes that frame as a PNG file."""
    if span != "whole" and not _has_ends(segment):
        raise DataError(
            f"{video}: the question's segment is {segment!r:.80}; two numbers, a start and an end, "
            f"are needed. Take the official SEED-Bench.json."
        )
    if not video.is_file():
        raise DataError(
            f"{video}: this video is not there. Put SEED-Bench's videos there, or LLaVA's frames "
            f"into SEED-Bench-video-image, or leave videos out: --option seed_bench.part=image"
        )
    av = _pyav()
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            # Counted, not taken from the header: some containers do not say, others say wrong.
            frames = sum(1 for packet in container.demux(stream) if packet.size)
            fps = float(stream.average_rate or 0)
        wanted = middle_index(frames, fps, span, segment)
        with av.open(str(video)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number == wanted:
                    buffer = io.BytesIO()
                    frame.to_image().save(buffer, "PNG")
                    write_atomic(out, buffer.getvalue(), sync=False)
                    return
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{video}: this video cannot be read ({error}). Get it again.") from error
    raise DataError(f"{video}: it has no frame {wanted}, only {frames}. Get it again.")


def _has_ends(segment: object) -> bool:
    pair = segment if isinstance(segment, Sequence) and len(segment) == 2 else [None]
    return all(isinstance(end, int | float) and not isinstance(end, bool) for end in pair)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise PumiceError(
            "reading videos needs the library PyAV, which is not installed. Install it with "
            "`pip install 'pumice[benchmarks]'`, or leave videos out: "
            "--option seed_bench.part=image"
        ) from error
    return av
