"""A stage that trains adapters (LoRA) in place of the language model's own weights.

The base may be held in 8 or 4 bits meanwhile; what it was is proven by hash, never assumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pumice.core.errors import PumiceError
from pumice.core.shipped import SHIPPED_DIR

if TYPE_CHECKING:
    from pumice.models.lmm import LMM
    from pumice.models.lora import LoraSpec
    from pumice.processing.collate import Batch
    from pumice.train.stages import StageSpec

ADAPTERS = "adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTraining:
    """The adapters of a stage; `train.language` is their learning rate."""

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    rslora: bool = False
    quantize: Literal["int8", "int4"] | None = None
    """How the frozen base is held in memory; None for full precision."""
    save: Literal["merged", "adapter"] = "merged"
    """A whole model, or the adapter with the name of its base."""

    def spec(self) -> LoraSpec:
        """What the model room takes."""
        from pumice.models.lora import LoraSpec

        return LoraSpec(
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
            rslora=self.rslora,
        )


def check_adapters(spec: StageSpec) -> None:
    """Settings of a stage that cannot go together, told before anything is loaded."""
    lora = spec.lora
    if lora is None:
        return
    if "language" not in spec.train:
        raise PumiceError(
            f"stage {spec.name!r} has lora but trains {', '.join(spec.train)}: adapters sit on the "
            f"language model and learn at its rate. Set train.language, or leave lora out."
        )
    if lora.quantize is not None and lora.save == "merged":
        raise PumiceError(
            f"stage {spec.name!r} has lora.quantize={lora.quantize} and lora.save=merged: adapters "
            f"are merged into full precision only. Set lora.save=adapter; the model that is "
            f"loaded from it is merged into the full-precision base."
        )


def attach_adapters(lmm: LMM, lora: LoraTraining) -> None:
    """Quantises the language model if asked, and puts new adapters on it."""
    from pumice.models.checkpoint import weightless
    from pumice.models.lora import add_lora
    from pumice.models.quantize import quantize_language, quantized_as

    # A model that came out of a checkpoint was quantised while it was read.
    if lora.quantize is not None and quantized_as(lmm.language) is None:
        quantize_language(lmm.language, lora.quantize)
    # Adapters of a model that waits for its weights wait for theirs.
    with weightless() if lmm.device.type == "meta" else nullcontext():
        add_lora(lmm.language, lora.spec())


def set_trained(lmm: LMM, part: str, trained: bool) -> int:
    """Lets a part learn, or freezes it; of a part with adapters only they learn.

    Gives the number of parameters that learn, or of all of them when none does.
    """
    from pumice.models.lora import adapter_parameters, has_lora

    module = lmm.part(part)
    module.requires_grad_(trained)
    module.train(trained)
    if trained and has_lora(module):
        module.requires_grad_(False)
        for _, parameter in adapter_parameters(module):
            parameter.requires_grad_(True)
    learning = [p for p in module.parameters() if p.requires_grad or not trained]
    return sum(parameter.numel() for parameter in learning)


def weight_hashes(lmm: LMM, parts: tuple[str, ...]) -> dict[str, str]:
    """A hash of each part's own weights, and one of the adapters if there are any."""
    from pumice.models.lora import adapter_parameters, base_parameters, has_lora
    from pumice.train.metrics import part_hash, tensors_hash

    hashes = {}
    for name in parts:
        part = lmm.part(name)
        if has_lora(part):
            hashes[name] = tensors_hash(base_parameters(part))
            hashes[ADAPTERS] = tensors_hash(adapter_parameters(part))
        else:
            hashes[name] = part_hash(part)
    return hashes


def should_move(spec: StageSpec, name: str) -> bool:
    """Whether the stage must change the weights that `weight_hashes` names so."""
    if spec.lora is not None and name in ("language", ADAPTERS):
        return name == ADAPTERS
    return name in spec.train


def merge_adapters(lmm: LMM, batch: Batch) -> dict[str, Any]:
    """Merges the adapters into the language model; gives what that changed on a batch.

    The largest difference of a logit, and the share of positions whose likeliest token stayed.
    """
    import torch

    from pumice.models.lora import merge_lora

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return lmm.logits(batch).float()

    lmm.eval()
    before = logits()
    merge_lora(lmm.language)
    after = logits()
    same = (before.argmax(-1) == after.argmax(-1)).float().mean()
    return {
        "merged": True,
        "positions": len(before),
        "max_logit_difference": float((before - after).abs().max()),
        "greedy_agreement": float(same),
    }


def adapter_files(
    lmm: LMM, spec: StageSpec, checkpoint: Path, base_tensors: Callable[[Path], Any]
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """What training.json says of an adapter that is kept, and the function that writes its files.

    `base_tensors` opens the language model's weights of a directory, by their names in it.
    """
    from pumice.models.lora import adapter_weight_names, save_adapter, weights_sample

    assert spec.lora is not None
    directory = spec.init or spec.language
    base = base_name(directory, checkpoint)
    sample = weights_sample(base_tensors(directory), adapter_weight_names(lmm.language))
    lora = spec.lora.spec()

    def write(folder: Path) -> None:
        save_adapter(folder, lmm.language, lora, base=base, base_sample=sample)

    return {"merged": False, "base": base, "base_sample": sample}, write


def base_name(directory: Path, checkpoint: Path) -> str:
    """How an adapter's file names its base: a shipped name, or the way there from the checkpoint.

    A run directory that is moved as a whole keeps it; an absolute path would tell a home directory.
    """
    if directory.resolve().parent == SHIPPED_DIR.resolve():
        return directory.name
    return Path(os.path.relpath(directory.resolve(), checkpoint.resolve())).as_posix()
