"""What a stage is built of: model, processor, loader, and which parts of it learn."""

from __future__ import annotations

import logging
import random
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal, cast

from pumice.core.errors import PumiceError
from pumice.core.files import sha256_bytes
from pumice.core.processes import ALONE, Processes
from pumice.train.adapters import attach_adapters, set_trained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

    from pumice.data.loader import Loader
    from pumice.data.sources import Source
    from pumice.models.config import LMMConfig
    from pumice.models.lmm import LMM
    from pumice.models.tiling import TilingSpec
    from pumice.processing.processor import Processor
    from pumice.train.stages import StageSpec
    from pumice.train.validation import Validator

log = logging.getLogger(__name__)
PARTS = ("vision", "connector", "language")


def seed_everything(spec: StageSpec, rank: int = 0) -> None:
    """Before anything is built: a connector's first weights belong to the seed.

    They are those of rank 0; the others draw dropout alone, each its own.
    """
    import numpy as np
    import torch

    number = (int(sha256_bytes(f"{spec.seed} {spec.name}".encode())[:8], 16) + rank) % 2**32
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def build_model(spec: StageSpec, group: Processes = ALONE) -> tuple[LMM, bool]:
    """The model a stage starts with, and whether new weights write its image tokens.

    Of several processes the main one alone reads weights; the model of the others has none until
    `SharedModel` deals them out, so that a machine holds it once and not once for each GPU.
    """
    from pumice.models.checkpoint import empty_lmm

    made: list[LMM] = []

    def build() -> tuple[LMMConfig, bool]:
        lmm, new_output = _read_model(spec)
        made.append(lmm)
        return lmm.config, new_output

    config, new_output = group.from_main(build)
    if not made:
        made.append(empty_lmm(config, quantize=None if spec.lora is None else spec.lora.quantize))
    return made[0], new_output


def _read_model(spec: StageSpec) -> tuple[LMM, bool]:
    from pumice.convert.adapter import load_checkpoint
    from pumice.convert.connector_weights import load_connector
    from pumice.models.lmm import LMM

    if spec.init is not None:
        quantize = None if spec.lora is None else spec.lora.quantize
        return load_checkpoint(spec.init, quantize=quantize), False
    lmm = LMM.from_backbones(
        spec.vision if len(spec.vision) > 1 else spec.vision[0],
        spec.language,
        spec.connector,
        spec.vision_layer,
        spec.vision_select,
        norm=spec.vision_norm,
        options=spec.connector_options,
        tiling=_tiling(spec),
    )
    if spec.connector_from is None:
        return lmm, True
    whole = load_connector(lmm, spec.connector_from)
    log.info("stage %s: the connector starts from %s", spec.name, spec.connector_from)
    return lmm, not whole


def check_model(spec: StageSpec) -> None:
    """Refuse, before anything is made, parts that do not fit each other; no weight is read.

    So are adapters that the language model has no place for, and blocks that nothing compiles.
    """
    import torch

    from pumice.convert.connector_weights import load_connector
    from pumice.models.lmm import LMM

    with torch.device("meta"):
        lmm = LMM.from_config(model_config(spec), init=False)
        if spec.lora is not None:
            attach_adapters(lmm, replace(spec.lora, quantize=None))
    if spec.compile:
        from pumice.models.compiled import check_compiler
        from pumice.train.parallel import training_device

        check_compiler(training_device().type)
    if spec.connector_from is not None:
        load_connector(lmm, spec.connector_from)


def model_config(spec: StageSpec) -> LMMConfig:
    """The architecture a stage without `init` builds, from the configs of its backbones alone."""
    from pumice.models.config import LMMConfig
    from pumice.models.pretrained import config_to_dict, read_config
    from pumice.models.vision_pair import vision_data

    return LMMConfig(
        vision=vision_data(spec.vision),
        vision_layer=spec.vision_layer,
        vision_select=spec.vision_select,
        vision_norm=spec.vision_norm,
        connector=spec.connector,
        connector_options=spec.connector_options,
        tiling=tiling.to_dict() if (tiling := _tiling(spec)) else None,
        language=config_to_dict(read_config(spec.language, part="language model")),
    )


def _tiling(spec: StageSpec) -> TilingSpec | None:
    """How the images of a stage are tiled: by default in tiles as large as the backbone's view."""
    from pumice.models.tiling import TilingSpec
    from pumice.models.vision import read_image_stats

    if spec.image_mode not in ("hd", "next"):
        return None
    view = read_image_stats(spec.vision)[0]
    return TilingSpec.from_dict({"scheme": spec.image_mode, "tile": view, **spec.tiling})


def build_processor(spec: StageSpec, lmm: LMM) -> Processor:
    """What turns rows into ids and pixels for this model."""
    from pumice.models.vision import read_image_stats
    from pumice.processing.images import ImageSpec, Mode
    from pumice.processing.processor import Processor
    from pumice.processing.sentencepiece_tokenizer import read_tokenizer

    modes: dict[str, Mode] = {"hd": "pad", "next": "resize"}
    mode = modes.get(spec.image_mode) or cast("Mode", spec.image_mode)
    if spec.init is not None:
        processor = Processor.load(spec.init).with_template(spec.template, spec.system)
        # LLaVA-1.5 crops its images to align and pads them to tune.
        processor.image_spec = replace(processor.image_spec, mode=mode)
        return processor
    size, mean, std = read_image_stats(spec.vision)
    image_spec = ImageSpec(mode=mode, size=size, mean=mean, std=std, tiling=lmm.tiling)
    return Processor(
        read_tokenizer(spec.language),
        image_spec,
        spec.template,
        spec.system,
        lmm.image_tokens,
        view_side=lmm.view_side,
        image_mark=lmm.cross_attention is not None,
        instruction=_instruction_reader(spec, lmm),
    )


def stage_processor(spec: StageSpec) -> Processor:
    """The processor a stage without `init` reads its data with; no weight is read."""
    import torch

    from pumice.models.lmm import LMM

    with torch.device("meta"):
        return build_processor(spec, LMM.from_config(model_config(spec), init=False))


def _instruction_reader(
    spec: StageSpec, lmm: LMM
) -> PreTrainedTokenizerFast | Literal["language"] | None:
    """The tokenizer in which the connector reads the question: released weights bring their own."""
    from pumice.convert.connector_weights import reads_bert_instructions
    from pumice.convert.instructblip import instruction_tokenizer

    if not lmm.connector.wants_instruction:
        return None
    if spec.connector_from is None or not reads_bert_instructions(spec.connector_from):
        return "language"
    return instruction_tokenizer(spec.connector_from)


def build_loader(
    spec: StageSpec,
    processor: Processor,
    group: Processes = ALONE,
    sources: Sequence[Source] | None = None,
) -> Loader:
    """The batches of the stage; of several processes each gets its share of every step.

    `sources` are those of the spec, or what is left of each to train on.
    """
    from pumice.data.lengths import RowSizes
    from pumice.data.loader import Loader
    from pumice.data.mixture import Mixture, Part

    opened = sources or [entry.open() for entry in spec.data]
    parts = [Part(s, e.weight, e.cap) for s, e in zip(opened, spec.data, strict=True)]
    mixture = Mixture(parts, spec.seed)
    return Loader(
        mixture, processor, spec.batch_size, seed=spec.seed, workers=spec.workers,
        group_by_length=spec.group_by_length, group_by_modality=spec.group_by_modality,
        max_tokens=spec.max_tokens, micro_batch_size=spec.micro_batch_size, packing=spec.packing,
        sizes=None if spec.packing is None else RowSizes(
            mixture, processor, [asdict(entry) for entry in spec.data]
        ),
        rank=group.rank, world_size=group.size,
    )  # fmt: skip


def build_data(
    spec: StageSpec, processor: Processor, group: Processes = ALONE
) -> tuple[Loader, Validator | None]:
    """The batches, and what is held out of them where the stage validates."""
    from pumice.data.held_out import split_sources
    from pumice.train.validation import Validator

    if spec.validation is None:
        return build_loader(spec, processor, group), None
    split = split_sources([entry.open() for entry in spec.data], spec.validation.fraction)
    loader = build_loader(spec, processor, group, split.train)
    return loader, Validator(spec.validation, processor, split.held, spec.max_tokens, group)


def check_images(spec: StageSpec, loader: Loader) -> None:
    """Refuse to train what looks at images on data that has none: no step would move it."""
    looking = [name for name in ("vision", "connector") if name in spec.train]
    sources = [part.source for part in loader.mixture.parts]
    if not looking or any(s.size(row)[1] for s in sources for row in range(len(s))):
        return
    raise PumiceError(
        f"stage {spec.name!r} trains {' and '.join(looking)}, and none of its "
        f"{sum(map(len, sources))} rows has an image: nothing of that would learn. Take "
        f"{'them' if looking[1:] else 'it'} out of `train`, or give rows with images."
    )


def match_connector_scale(lmm: LMM, loader: Loader) -> None:
    """Scale a new connector by the first step that has an image (text-only data has none)."""
    for step in range(loader.steps_per_epoch):
        # All of a step, so that nothing depends on the pieces in which it is computed.
        pixels = loader.pixels_at(step)
        if len(pixels):
            lmm.match_connector_scale(pixels.to(lmm.device))
            return


def set_trainable(lmm: LMM, spec: StageSpec) -> None:
    """Freeze every part that is not named in `train`, and say what is trained."""
    unknown = set(spec.train) - set(PARTS)
    if unknown:
        raise PumiceError(
            f"stage {spec.name!r} trains {', '.join(sorted(unknown))}; the parts of a model are "
            f"{', '.join(PARTS)}. Correct `train` in the recipe."
        )
    for name in PARTS:
        trained = name in spec.train
        count = set_trained(lmm, name, trained)
        rate = f"trained, learning rate {spec.train[name]:g}" if trained else "frozen"
        log.info("stage %s: %-9s %12s parameters, %s", spec.name, name, f"{count:,}", rate)
