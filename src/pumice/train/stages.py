"""A stage of a recipe: what is built, what is learnt, from which data, and what it leaves behind.

`run_stage` is the whole story of a stage; the loop itself is in `trainer`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.core.processes import ALONE, Processes
from pumice.train.adapters import (
    LoraTraining,
    adapter_files,
    attach_adapters,
    check_adapters,
    merge_adapters,
    should_move,
    weight_hashes,
)
from pumice.train.build import (
    PARTS,
    build_data,
    build_model,
    build_processor,
    check_images,
    match_connector_scale,
    seed_everything,
    set_trainable,
)
from pumice.train.data_card import data_card, rows_record
from pumice.train.fingerprint import spec_fingerprint, spec_record

if TYPE_CHECKING:
    from pumice.data.loader import Loader
    from pumice.data.packing import Packing
    from pumice.data.sources import Source
    from pumice.models.feature_cache import FeatureCache
    from pumice.models.lmm import LMM
    from pumice.processing.processor import Processor
    from pumice.train.run_log import Following
    from pumice.train.validation import ValidationSpec

log = logging.getLogger(__name__)


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
    checkpointing: str = "none"
    compile: bool = False
    validation: ValidationSpec | None = None
    seed: int = 0
    workers: int = 1
    save_every: int = 500
    watchdog_minutes: float | None = 30.0
    spike: float | None = None


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
    spec: StageSpec,
    out: Path,
    *,
    resume: bool = True,
    features: FeatureCache | None = None,
    group: Processes = ALONE,
    following: Following | None = None,
) -> StageResult:
    """Train one stage into `out/<name>` and give its checkpoint there.

    A finished stage with the same spec is not run again; a stopped one goes on where it stopped
    (`resume=False` starts over). What a frozen vision backbone gives is kept in `features`; that
    changes the time a stage takes, and nothing else. `following` says who looks at its losses.
    Several processes call it together, and the main one writes the files.
    """
    checkpoint = out / spec.name
    fingerprint, done = group.from_main(lambda: _known(spec, checkpoint, resume=resume))
    if done:
        log.info("stage %s is complete in %s", spec.name, checkpoint)
        return done
    from pumice.models.packed_attention import attend_to_documents, use_document_attention
    from pumice.train.parallel import SharedModel
    from pumice.train.trainer import Trainer

    check_adapters(spec)
    seed_everything(spec, group.rank)
    lmm, new_output = build_model(spec, group)
    processor = build_processor(spec, lmm)
    with group.main_first():
        loader, validator = build_data(spec, processor, group)
    group.from_main(lambda: check_images(spec, loader))
    if new_output:
        group.from_main(lambda: match_connector_scale(lmm, loader))
    if spec.lora is not None:
        attach_adapters(lmm, spec.lora)
    set_trainable(lmm, spec)
    if spec.packing is not None:
        group.from_main(lambda: attend_to_documents(lmm.language))
        use_document_attention(lmm.language)
    before = weight_hashes(lmm, PARTS) if group.is_main else {}
    model = SharedModel(lmm, group, checkpointing=spec.checkpointing, compiled=spec.compile)
    if "vision" not in spec.train:
        lmm.vision.use_cache(features)
    trainer = Trainer(
        spec, model, loader, out,
        fingerprint=fingerprint, validator=validator, following=following,
    )  # fmt: skip
    report = trainer.run(resume=resume)
    trained = model.whole()

    def finish() -> StageResult:
        assert trained is not None
        result = StageResult(checkpoint=checkpoint, **report)
        _finish(spec, out, trained, before, result, fingerprint, processor, loader, trainer.record)
        return result

    result = group.from_main(finish)
    trainer.discard_states()
    return result


def _finish(
    spec: StageSpec,
    out: Path,
    lmm: LMM,
    before: dict[str, str],
    result: StageResult,
    fingerprint: str,
    processor: Processor,
    loader: Loader,
    record: dict[str, Any],
) -> None:
    """Check what moved, and write the checkpoint with the record of how it was made."""
    after = weight_hashes(lmm, PARTS)
    _check_moved(spec, before, after)
    training = {
        "stage": spec.name,
        "spec": spec_record(spec, out),
        "fingerprint": fingerprint,
        "data": data_card(spec.data, out), "rows": rows_record(loader.mixture),
        "parts": {n: {"before": before[n], "after": after[n], "moved": before[n] != after[n]}
                  for n in before},
        "result": {k: v for k, v in asdict(result).items() if k != "checkpoint"},
        **record,
    }  # fmt: skip
    final = processor.with_template(spec.final_template, spec.final_system)
    _save(result.checkpoint, lmm, spec, final, training, loader)


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


def _known(spec: StageSpec, checkpoint: Path, *, resume: bool) -> tuple[str, StageResult | None]:
    """The fingerprint of a stage, and its result if it is finished and not to be run again."""
    fingerprint = spec_fingerprint(spec)
    return fingerprint, _finished(checkpoint, fingerprint) if resume else None


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


def _check_moved(spec: StageSpec, before: dict[str, str], after: dict[str, str]) -> None:
    """What was trained is what was asked: frozen parts are bit-equal, trained ones are not."""
    for name in before:
        moved = before[name] != after[name]
        if moved == should_move(spec, name):
            continue
        if moved:
            raise AssertionError(f"stage {spec.name}: part {name} moved, and was to stay as it is")
        raise PumiceError(
            f"stage {spec.name!r} was to train {name}, and after its last step the weights of "
            f"{name} are those before the first, bit for bit. No step had an image, or the rate in "
            f"`train` is too small to change any ({spec.train}). Change the rate or the data, or "
            f"take the part out of `train`."
        )
