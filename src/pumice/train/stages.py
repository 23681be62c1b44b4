"""A stage of a recipe: what is built, what is learnt, from which data, and what it leaves behind.

`run_stage` is the whole story of a stage; the loop itself is in `trainer`.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pumice.core.errors import PumiceError
from pumice.core.files import read_json, sha256_bytes
from pumice.train.fingerprint import spec_fingerprint, spec_record

if TYPE_CHECKING:
    from pumice.data.loader import Loader
    from pumice.models.lmm import LMM
    from pumice.processing.processor import Processor

log = logging.getLogger(__name__)
PARTS = ("vision", "connector", "language")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """One LLaVA JSON or JSONL file, its image directory and its share of the mixture."""

    path: Path
    images: Path
    weight: float | None = None
    cap: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Everything a stage depends on. `train` maps a part to its peak learning rate; others freeze.

    `init` is the checkpoint to start from; without it the backbones are read and the connector is
    new. The stage trains with `template`; the saved model answers with `final_template`.
    """

    name: str
    vision: Path
    vision_layer: int
    vision_select: Literal["patch", "cls_patch"]
    connector: str
    language: Path
    init: Path | None
    image_mode: Literal["pad", "crop", "resize"]
    template: str
    system: str | None
    final_template: str
    final_system: str | None
    train: dict[str, float]
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


def run_stage(spec: StageSpec, out: Path, *, resume: bool = True) -> StageResult:
    """Train one stage into `out/<name>` and give its checkpoint there.

    A finished stage with the same spec is not run again; a stopped one goes on where it stopped
    (`resume=False` starts over).
    """
    checkpoint = out / spec.name
    fingerprint = spec_fingerprint(spec)
    done = _finished(checkpoint, fingerprint) if resume else None
    if done:
        log.info("stage %s is complete in %s", spec.name, checkpoint)
        return done
    from pumice.models.checkpoint import save_checkpoint
    from pumice.train.metrics import part_hash
    from pumice.train.trainer import Trainer

    _seed_everything(spec)
    lmm = _build_model(spec)
    processor = _build_processor(spec, lmm)
    loader = _build_loader(spec, processor)
    if spec.init is None:
        _match_connector_scale(lmm, loader)
    _set_trainable(lmm, spec)
    parts = {name: getattr(lmm, name) for name in PARTS}
    before = {name: part_hash(part) for name, part in parts.items()}
    trainer = Trainer(spec, lmm, loader, out, fingerprint=fingerprint)
    start = time.monotonic()
    report = trainer.run(resume=resume)
    after = {name: part_hash(part) for name, part in parts.items()}
    _check_moved(spec, before, after)
    result = StageResult(checkpoint=checkpoint, seconds=time.monotonic() - start, **report)
    final = processor.with_template(spec.final_template, spec.final_system)
    training = {
        "stage": spec.name,
        "spec": spec_record(spec, out),
        "fingerprint": fingerprint,
        "parts": {n: {"before": before[n], "after": after[n], "moved": before[n] != after[n]}
                  for n in PARTS},
        "result": {k: v for k, v in asdict(result).items() if k != "checkpoint"},
    }  # fmt: skip
    save_checkpoint(checkpoint, lmm, final.save, training)
    trainer.discard_states()
    return result


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


def _build_model(spec: StageSpec) -> LMM:
    from pumice.models.checkpoint import load_lmm
    from pumice.models.lmm import LMM

    if spec.init is not None:
        return load_lmm(spec.init)
    return LMM.from_backbones(
        spec.vision, spec.language, spec.connector, spec.vision_layer, spec.vision_select
    )


def _build_processor(spec: StageSpec, lmm: LMM) -> Processor:
    from transformers import AutoTokenizer

    from pumice.models.vision import read_image_stats
    from pumice.processing.images import ImageSpec
    from pumice.processing.processor import Processor

    if spec.init is not None:
        return Processor.load(spec.init).with_template(spec.template, spec.system)
    size, mean, std = read_image_stats(spec.vision)
    image_spec = ImageSpec(mode=spec.image_mode, size=size, mean=mean, std=std)
    return Processor(
        AutoTokenizer.from_pretrained(spec.language), image_spec, spec.template, spec.system,
        lmm.image_tokens,
    )  # fmt: skip


def _build_loader(spec: StageSpec, processor: Processor) -> Loader:
    from pumice.data.loader import Loader
    from pumice.data.mixture import Mixture, Part
    from pumice.data.sources import LlavaJson

    parts = [Part(LlavaJson(d.path, d.images), d.weight, d.cap) for d in spec.data]
    return Loader(
        Mixture(parts, spec.seed), processor, spec.batch_size, seed=spec.seed,
        workers=spec.workers, group_by_length=spec.group_by_length, max_tokens=spec.max_tokens,
    )  # fmt: skip


def _match_connector_scale(lmm: LMM, loader: Loader) -> None:
    """Scale a new connector by the first batch that has an image (text-only data has none)."""
    for step in range(loader.steps_per_epoch):
        pixels = loader.batch_at(step).pixel_values
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
        part = getattr(lmm, name)
        trained = name in spec.train
        part.requires_grad_(trained)
        part.train(trained)
        count = sum(parameter.numel() for parameter in part.parameters())
        rate = f"trained, learning rate {spec.train[name]:g}" if trained else "frozen"
        log.info("stage %s: %-9s %12s parameters, %s", spec.name, name, f"{count:,}", rate)


def _check_moved(spec: StageSpec, before: dict[str, str], after: dict[str, str]) -> None:
    """What was trained is what was asked: frozen parts are bit-equal, trained ones are not."""
    for name in PARTS:
        moved = before[name] != after[name]
        if moved != (name in spec.train):
            raise AssertionError(f"stage {spec.name}: part {name} moved={moved}")
