"""Opens a model directory whoever wrote it, by what lies in it and never by its name.

A new format is one line of `FORMATS`: how its directories are recognised, and how one is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pumice.convert import huggingface, idefics, instructblip, llava, pumice_format
from pumice.convert.opened import Facts, Format, Opened, Options, arranged
from pumice.convert.text_only import is_language_folder, open_language_folder
from pumice.core.errors import PumiceError
from pumice.models.checkpoint import build_lmm
from pumice.models.live_adapter import keep_adapter as put_adapter_on
from pumice.models.quantize import Method
from pumice.models.tensor_files import RenamedTensors, TensorFiles

if TYPE_CHECKING:
    from pumice.models.lmm import LMM
    from pumice.processing.processor import Processor


def _read_instructblip(facts: Facts, options: Options) -> Opened:
    directory = facts.directory
    config = instructblip.instructblip_config(directory)
    files = TensorFiles.of_folder(directory)
    depth = config.connector_options["depth"]
    named = ((instructblip.pumice_name(name, depth), name) for name in files)
    tensors = RenamedTensors(files, {ours: name for ours, name in named if ours is not None})
    processor = instructblip.instructblip_processor(directory)
    return arranged(Opened("InstructBLIP", directory, config, processor, tensors))


def _read_idefics(facts: Facts, options: Options) -> Opened:
    directory = facts.directory
    config = idefics.idefics_config(directory)
    files = TensorFiles.of_folder(directory)
    processor = idefics.idefics_processor(directory)
    tensors = idefics.IdeficsTensors(
        files,
        files.__getitem__,
        image_id=idefics.idefics_image_id(processor.tokenizer),
        tied=config.language["tie_word_embeddings"],
    )
    return arranged(Opened("IDEFICS", directory, config, processor, tensors))


FORMATS: tuple[Format, ...] = (
    Format("pumice (whole, or an adapter with its base)", pumice_format.detect, pumice_format.read),
    Format("transformers LLaVA-1.5 and LLaVA-NeXT", huggingface.detect, huggingface.read),
    Format(
        "transformers InstructBLIP with a decoder such as Vicuna",
        lambda facts: instructblip.detect(facts.config),
        _read_instructblip,
    ),
    Format(
        "transformers IDEFICS (the first)",
        lambda facts: idefics.detect(facts.config),
        _read_idefics,
    ),
    Format(
        "original LLaVA (whole, mm_projector.bin, or LoRA)",
        llava.detect,
        llava.read,
    ),
)


def open_parts(
    directory: Path | str,
    *,
    base: Path | str | None = None,
    vision: Path | str | None = None,
    template: str | None = None,
    keep_adapter: bool = False,
) -> Opened:
    """What lies in a model directory; its tensors stay on disk until they are asked for.

    `base` is the language model of a connector or an adapter alone, `vision` the vision backbone's
    folder where a checkpoint only names it, `template` the name of a conversation template.
    `keep_adapter` leaves an adapter beside its base; without it the base's tensors have it merged.
    An unknown directory is an error that lists what was found and what can be opened.
    """
    facts = Facts.of(directory)
    options = Options(
        base=Path(base) if base is not None else None,
        vision=Path(vision) if vision is not None else None,
        template=template,
        keep_adapter=keep_adapter,
    )
    for known in FORMATS:
        if known.detect(facts):
            return _with_adapter_if_asked(known.read(facts, options), options)
    raise _unknown(facts)


def open_model(
    directory: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    quantize: Method | None = None,
    base: Path | str | None = None,
    vision: Path | str | None = None,
    template: str | None = None,
    keep_adapter: bool = False,
) -> tuple[LMM, Processor]:
    """The model of a directory in any format of `FORMATS`, or a language model's folder alone.

    In the type it is stored in, unless `dtype` is given. `quantize` holds the language model's
    linear layers in 8 or 4 bits, each as it is read, but not an adapter that is kept.
    """
    if is_language_folder(directory):
        return open_language_folder(directory, dtype, device, quantize=quantize)
    opened = open_parts(
        directory, base=base, vision=vision, template=template, keep_adapter=keep_adapter
    )
    return build(opened, dtype, device, quantize=quantize), opened.processor


def build(
    opened: Opened,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    quantize: Method | None = None,
) -> LMM:
    """The model itself, in evaluation mode; where it can, it stays mapped from the files."""
    lmm = build_lmm(
        opened.config,
        opened.tensors,
        opened.directory,
        dtype=dtype or opened.dtype,
        device=device,
        quantize=quantize,
    )
    if opened.adapter is not None:
        put_adapter_on(lmm.language, opened.adapter, dtype or opened.dtype)
    return lmm


def _with_adapter_if_asked(opened: Opened, options: Options) -> Opened:
    if options.keep_adapter and opened.adapter is None:
        raise PumiceError(
            f"{opened.directory} is {opened.format} and has no adapter to keep. Leave the wish to "
            f"keep it out, or give the directory of the adapter."
        )
    return opened


def _unknown(facts: Facts) -> PumiceError:
    kind = facts.config.get("model_type")
    found = ", ".join(sorted(facts.files)[:10]) or "nothing"
    said = f"its config.json says model_type {kind!r}" if kind else "no config.json says what it is"
    if "config.json" in facts.files and not kind:
        said = "its config.json has no model_type"
    return PumiceError(
        f"{facts.directory} cannot be opened: {said} (found: {found}). What can be opened: "
        f"{'; '.join(known.name for known in FORMATS)}; a language model's Hugging Face folder."
    )
