"""A stage of a recipe: what is built, what is learnt, from which data, and what it leaves behind.

`run_stage` is the whole story of a stage; the loop itself is in `trainer`.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pumice.core.errors import PumiceError
from pumice.core.files import read_json, sha256_bytes
from pumice.train.adapters import (
    LoraTraining,
    adapter_files,
    attach_adapters,
    check_adapters,
    merge_adapters,
    set_trained,
    should_move,
    weight_hashes,
)
from pumice.train.data_card import data_card, rows_record
from pumice.train.fingerprint import spec_fingerprint, spec_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pumice.data.loader import Loader
    from pumice.data.packing import Packing
    from pumice.data.sources import Source
    from pumice.models.config import LMMConfig
    from pumice.models.feature_cache import FeatureCache
    from pumice.models.lmm import LMM
    from pumice.models.tiling import TilingSpec
    from pumice.processing.processor import Processor

log = logging.getLogger(__name__)
PARTS = ("vision", "connector", "language")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """One source of rows, the directory of its images and its share of the mixture.

    `kind` is a name of the table in `data.open_source` (None: the content decides), `question` is
    what a caption without a conversation answers.
    """

    path: Path
    images: Path | None
    weight: float | None = None
    cap: int | None = None
    kind: str | None = None
    question: str | None = None

    def open(self) -> Source:
        """Its rows."""
        from pumice.data.open_source import open_source

        return open_source(self.path, self.images, kind=self.kind, question=self.question)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Everything a stage depends on. `train` maps a part to its peak learning rate; others freeze.

    `vision` is one backbone, or two that are fused. `init` is the checkpoint to start from; without
    it the backbones are read and the connector is new, or filled from `connector_from`. The stage
    trains with `template`; the saved model answers with `final_template`.
    """

    name: str
    vision: tuple[Path, ...]
    vision_layer: int
    vision_select: Literal["patch", "cls_patch"]
    vision_norm: bool = False
    connector: str
    connector_options: dict[str, Any] = field(default_factory=dict)
    connector_from: Path | None = None
    language: Path
    init: Path | None
    image_mode: Literal["pad", "crop", "resize", "hd", "next"]
    tiling: dict[str, Any] = field(default_factory=dict)
    template: str
    system: str | None
    final_template: str
    final_system: str | None
    train: dict[str, float]
    lora: LoraTraining | None = None
    data: tuple[DataSpec, ...]
    steps: int | None
    epochs: float | None
    batch_size: int
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float | None = 1.0
    max_tokens: int = 2048
    group_by_length: bool = False
    group_by_modality: bool = False
    packing: Packing | None = None
    micro_batch_size: int | None = None
    seed: int = 0
    workers: int = 1
    save_every: int = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What a stage left: its checkpoint, and the figures that also stand in training.json."""

    checkpoint: Path
    steps: int
    seconds: float
    final_loss: float
    supervised_tokens: int
    resumed_from: int
    peak_memory_bytes: int


def run_stage(
    spec: StageSpec, out: Path, *, resume: bool = True, features: FeatureCache | None = None
) -> StageResult:
    """Train one stage into `out/<name>` and give its checkpoint there.

    A finished stage with the same spec is not run again; a stopped one goes on where it stopped
    (`resume=False` starts over). What a frozen vision backbone gives is kept in `features`; that
    changes the time a stage takes, and nothing else.
    """
    checkpoint = out / spec.name
    fingerprint = spec_fingerprint(spec)
    done = _finished(checkpoint, fingerprint) if resume else None
    if done:
        log.info("stage %s is complete in %s", spec.name, checkpoint)
        return done
    from pumice.models.packed_attention import attend_to_documents
    from pumice.train.trainer import Trainer

    check_adapters(spec)
    _seed_everything(spec)
    lmm, new_output = _build_model(spec)
    processor = _build_processor(spec, lmm)
    loader = _build_loader(spec, processor)
    if new_output:
        _match_connector_scale(lmm, loader)
    if spec.lora is not None:
        attach_adapters(lmm, spec.lora)
    _set_trainable(lmm, spec)
    if spec.packing is not None:
        attend_to_documents(lmm.language)
    if "vision" not in spec.train:
        lmm.vision.use_cache(features)
    before = weight_hashes(lmm, PARTS)
    trainer = Trainer(spec, lmm, loader, out, fingerprint=fingerprint)
    start = time.monotonic()
    report = trainer.run(resume=resume)
    after = weight_hashes(lmm, PARTS)
    _check_moved(spec, before, after)
    result = StageResult(checkpoint=checkpoint, seconds=time.monotonic() - start, **report)
    final = processor.with_template(spec.final_template, spec.final_system)
    training = {
        "stage": spec.name,
        "spec": spec_record(spec, out),
        "fingerprint": fingerprint,
        "data": data_card(spec.data, out), "rows": rows_record(loader.mixture),
        "parts": {n: {"before": before[n], "after": after[n], "moved": before[n] != after[n]}
                  for n in before},
        "result": {k: v for k, v in asdict(result).items() if k != "checkpoint"},
    }  # fmt: skip
    _save(checkpoint, lmm, spec, final, training, loader)
    trainer.discard_states()
    return result


def _save(
    checkpoint: Path,
    lmm: LMM,
    spec: StageSpec,
    processor: Processor,
    training: dict[str, Any],
    loader: Loader,
) -> None:
    """The whole model, or all but the language model and the adapter that changes it."""
    from pumice.convert.adapter import language_tensors
    from pumice.models.checkpoint import save_checkpoint

    if spec.lora is None:
        save_checkpoint(checkpoint, lmm, processor.save, training)
    elif spec.lora.save == "merged":
        training["lora"] = merge_adapters(lmm, loader.micro_batches_at(0)[0].to(lmm.device))
        save_checkpoint(checkpoint, lmm, processor.save, training)
    else:
        training["lora"], write = adapter_files(lmm, spec, checkpoint, language_tensors)

        def save(folder: Path) -> None:
            processor.save(folder)
            write(folder)

        save_checkpoint(checkpoint, lmm, save, training, without="language.")


def _finished(checkpoint: Path, fingerprint: str) -> StageResult | None:
    path = checkpoint / "training.json"
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("fingerprint") != fingerprint:
        raise PumiceError(
            f"{checkpoint} was trained with another recipe, other data or other backbones. Going "
            "on needs the same ones, wherever they lie; give another --out directory, or --resume "
            "never to train it again."
        )
    return StageResult(checkpoint=checkpoint, **record["result"])


def _seed_everything(spec: StageSpec) -> None:
    """Before anything is built: a connector's first weights belong to the seed."""
    import numpy as np
    import torch

    number = int(sha256_bytes(f"{spec.seed} {spec.name}".encode())[:8], 16)
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _build_model(spec: StageSpec) -> tuple[LMM, bool]:
    """The model a stage starts with, and whether new weights write its image tokens."""
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
    """Refuse, before anything is made, parts that do not fit each other; no weight is read."""
    import torch

    from pumice.convert.connector_weights import load_connector
    from pumice.models.lmm import LMM

    with torch.device("meta"):
        lmm = LMM.from_config(model_config(spec), init=False)
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


def _build_processor(spec: StageSpec, lmm: LMM) -> Processor:
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
        return _build_processor(spec, LMM.from_config(model_config(spec), init=False))


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


def _build_loader(spec: StageSpec, processor: Processor) -> Loader:
    from pumice.data.lengths import RowSizes
    from pumice.data.loader import Loader
    from pumice.data.mixture import Mixture, Part

    parts = [Part(entry.open(), entry.weight, entry.cap) for entry in spec.data]
    mixture = Mixture(parts, spec.seed)
    return Loader(
        mixture, processor, spec.batch_size, seed=spec.seed, workers=spec.workers,
        group_by_length=spec.group_by_length, group_by_modality=spec.group_by_modality,
        max_tokens=spec.max_tokens, micro_batch_size=spec.micro_batch_size, packing=spec.packing,
        sizes=None if spec.packing is None else RowSizes(
            mixture, processor, [asdict(entry) for entry in spec.data]
        ),
    )  # fmt: skip


def _match_connector_scale(lmm: LMM, loader: Loader) -> None:
    """Scale a new connector by the first step that has an image (text-only data has none)."""
    import torch

    for step in range(loader.steps_per_epoch):
        # All of a step, so that nothing depends on the pieces in which it is computed.
        pixels = torch.cat([batch.pixel_values for batch in loader.micro_batches_at(step)])
        if len(pixels):
            lmm.match_connector_scale(pixels.to(lmm.device))
            return


def _set_trainable(lmm: LMM, spec: StageSpec) -> None:
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


def _check_moved(spec: StageSpec, before: dict[str, str], after: dict[str, str]) -> None:
    """What was trained is what was asked: frozen parts are bit-equal, trained ones are not."""
    for name in before:
        moved = before[name] != after[name]
        if moved != should_move(spec, name):
            raise AssertionError(f"stage {spec.name}: part {name} moved={moved}")
