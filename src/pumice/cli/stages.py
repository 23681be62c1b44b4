"""A recipe's stages as the training room takes them: names become folders, sections its types."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pumice.recipe.schema import DataFile, Lora, Recipe, Stage, Validation
    from pumice.train.adapters import LoraTraining
    from pumice.train.stages import DataSpec, StageSpec
    from pumice.train.validation import ValidationSpec


def stage_specs(
    recipe: Recipe, data: Path, out: Path, find: Callable[[str], Path] | None = None
) -> list[StageSpec]:
    """The recipe's stages as the training room takes them, each starting from the one before.

    `find` gives the folder of a backbone by its name; left out, one with its weights.
    """
    specs: list[StageSpec] = []
    for name, stage in recipe.stage_list():
        init = out / specs[-1].name if specs else None
        specs.append(_stage_spec(recipe, name, stage, data, init, find))
    return specs


def check_shares(recipe: Recipe, processes: int) -> None:
    """Refuse a recipe whose steps so many processes cannot share evenly, before they begin."""
    for name, stage in recipe.stage_list():
        share, rest = divmod(stage.batch_size, processes)
        if rest:
            raise PumiceError(
                f"stage {name!r} has batch_size {stage.batch_size}, and {processes} processes take "
                f"equal shares of a step: a multiple of {processes} is allowed. Change "
                f"stages.{name}.batch_size, or how many processes there are."
            )
        if stage.micro_batch_size is not None and share % stage.micro_batch_size:
            raise PumiceError(
                f"stage {name!r} has micro_batch_size {stage.micro_batch_size}, and each of "
                f"{processes} processes has {share} rows of a step: a divisor of that is allowed. "
                f"Set stages.{name}.micro_batch_size."
            )


def first_stage_spec(recipe: Recipe, stage: str, data: Path | None = None) -> StageSpec:
    """A stage as if no other came before it: what reads its data, without any checkpoint."""
    chosen = dict(recipe.stage_list())[stage]
    return _stage_spec(recipe, stage, chosen, data=data or Path(), init=None)


def _stage_spec(
    recipe: Recipe,
    name: str,
    stage: Stage,
    data: Path,
    init: Path | None,
    find: Callable[[str], Path] | None = None,
) -> StageSpec:
    from pumice.core.shipped import resolve_backbone
    from pumice.data.packing import Packing
    from pumice.train.stages import StageSpec

    model, names, source = recipe.model, recipe.model.vision, recipe.model.connector_from
    find = find or resolve_backbone
    return StageSpec(
        name=name,
        vision=tuple(map(find, [names] if isinstance(names, str) else names)),
        vision_layer=model.vision_layer,
        vision_select=model.vision_select,
        vision_norm=model.vision_norm,
        connector=model.connector,
        connector_options=dict(model.connector_options),
        # What a stage before this one trained is not started anew.
        connector_from=None if init or source is None else connector_source(source),
        language=find(model.language),
        init=init,
        image_mode=stage.image or model.image,
        tiling=dict(model.tiling),
        template=stage.template or model.template,
        system=model.system if stage.system is None else stage.system,
        final_template=model.template,
        final_system=model.system,
        train={part: float(rate) for part, rate in stage.train.items()},
        lora=None if stage.lora is None else _lora(stage.lora),
        data=tuple(_data_spec(entry, data) for entry in stage.data),
        steps=stage.steps,
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        warmup=stage.warmup,
        schedule=stage.schedule,
        weight_decay=stage.weight_decay,
        clip=stage.clip,
        max_tokens=stage.max_tokens,
        group_by_length=stage.group_by_length,
        group_by_modality=stage.group_by_modality,
        packing=None if stage.packing is None else Packing(**stage.packing.model_dump()),
        micro_batch_size=stage.micro_batch_size,
        checkpointing=stage.checkpointing,
        compile=stage.compile,
        validation=None if stage.validation is None else _validation(stage.validation),
        seed=recipe.seed,
        save_every=stage.save_every,
        watchdog_minutes=stage.watchdog_minutes,
        spike=stage.spike,
    )


def _validation(chosen: Validation) -> ValidationSpec:
    from pumice.train.validation import ValidationSpec

    return ValidationSpec(**chosen.model_dump())


def _data_spec(entry: DataFile, data: Path) -> DataSpec:
    from pumice.train.stages import DataSpec

    return DataSpec(
        path=data / entry.path,
        images=None if entry.images is None else data / entry.images,
        weight=entry.weight,
        cap=entry.cap,
        kind=entry.kind,
        question=entry.question,
    )


def _lora(chosen: Lora) -> LoraTraining:
    from pumice.train.adapters import LoraTraining

    settings = chosen.model_dump()
    targets = settings.pop("targets")
    return LoraTraining(targets=None if targets is None else tuple(targets), **settings)


def connector_source(name: str) -> Path:
    """The folder, or the file of weights, that a recipe's `connector_from` names."""
    from pumice.core.shipped import resolve_backbone

    file = Path(name).expanduser()
    return file if file.is_file() else resolve_backbone(name)
