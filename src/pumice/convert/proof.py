"""The proof of one conversion: source, result, and transformers' own model, one after the other.

Only one model's files are open at a time, so that the proof takes the memory of one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pumice.convert.gguf_read import GGUFTensors
from pumice.convert.open import build, open_parts
from pumice.convert.opened import Opened
from pumice.convert.parity import (
    LMMSpeaker,
    Measured,
    Probe,
    check_prompts,
    compare,
    make_probes,
    measure_each,
)
from pumice.convert.parity_hf import TransformersSpeaker
from pumice.core.errors import PumiceError
from pumice.core.log import get_logger
from pumice.core.memory import give_back_memory
from pumice.models.config import LMMConfig
from pumice.processing.processor import Processor

log = get_logger(__name__)

# Memory that transformers' own model takes, in sizes of its weights.
_ROOM = 1.15


@dataclass(frozen=True)
class Source:
    """What is kept of a source whose files are closed: how it reads, and what it answered."""

    config: LMMConfig
    processor: Processor
    dtype: torch.dtype
    probes: list[Probe]
    answers: list[Measured]


def ask_source(opened: Opened) -> Source:
    """Asks the source the questions of the proof."""
    probes = make_probes(opened.processor)
    answers = list(_ask(opened, probes))
    return Source(opened.config, opened.processor, opened.dtype, probes, answers)


def prove(source: Source, written: Path, to: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What the result in `written` answers beside the source, by who was asked.

    `dtype` is the type it is stored in, if another than the source's. A result that reads its input
    otherwise than the source is an error.
    """
    kept = dtype or source.dtype
    compared = max((source.dtype, kept), key=lambda kind: torch.finfo(kind).eps)
    return {
        against: compare(source.answers, answers, compared)
        for against, answers in _results(source, written, to, kept)
    }


def check_proof(proof: dict[str, Any]) -> None:
    """Raises PumiceError when a result of `prove` is not the source's within its tolerance."""
    for against, found in proof.items():
        if not found["ok"]:
            raise PumiceError(
                f"the converted model does not answer as the source does ({against}): largest "
                f"difference of a logit {found['max_logit_difference']:.3g}, "
                f"{found['token_agreement']:.0%} of greedy tokens equal. Nothing was kept. Please "
                f"report it with the source's config.json."
            )


def _results(
    source: Source, written: Path, to: str, dtype: torch.dtype
) -> Iterator[tuple[str, Iterator[Measured]]]:
    """The result opened here again, and by transformers where it is its format.

    Each model's answers are to be taken in full before the next is asked for: it goes with them.
    """
    if to == "gguf":
        [language] = written.glob("model-*.gguf")
        [mmproj] = written.glob("mmproj-*.gguf")
        tensors = GGUFTensors(source.config, language, mmproj)
        again = Opened("GGUF", written, source.config, source.processor, tensors)
        yield "opened again", _ask(again, source.probes, torch.float32)
        return
    yield "opened again", _ask_result(source, written, to)
    give_back_memory()
    if to == "hf" and _has_room(written):
        yield "transformers", _ask_transformers(source, written, dtype)


def _ask_result(source: Source, written: Path, to: str) -> Iterator[Measured]:
    again = open_parts(written)
    given, read = source.processor, again.processor
    if to == "llava":
        # Its files do not say the template: who uses them chooses it.
        read = read.with_template(given.template, given.system)
    differs = check_prompts(source.probes, make_probes(read))
    if differs is not None:
        raise PumiceError(
            f"the converted model would read its input otherwise than the source: {differs}. "
            f"Nothing was kept. The template is {given.template.name!r} there and "
            f"{read.template.name!r} in the result; choose one that the target can say with "
            f"--template."
        )
    return _ask(again, source.probes)


def _ask_transformers(source: Source, written: Path, dtype: torch.dtype) -> Iterator[Measured]:
    return measure_each(TransformersSpeaker(written, source.processor, dtype), source.probes)


def _ask(
    opened: Opened, probes: list[Probe], dtype: torch.dtype | None = None
) -> Iterator[Measured]:
    return measure_each(LMMSpeaker(build(opened, dtype)), probes)


def _has_room(written: Path) -> bool:
    """Whether there is memory for transformers' own model of the result."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return True
    needed = _ROOM * sum(file.stat().st_size for file in written.glob("*.safetensors"))
    lines = dict(line.split(":") for line in path.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    if free < needed:
        log.warning(
            "transformers' own model is not asked: it needs %.1f GB of memory and %.1f GB are "
            "free; the proof is that of the result opened here",
            needed / 1e9,
            free / 1e9,
        )
    return free >= needed
