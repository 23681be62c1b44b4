"""The sides of `train.py`: pumice's own step, and a transformers loop in three precisions.

A side gives a function from the number of a step to its loss. pumice's is the trainer's own,
packed; the other is LlavaForConditionalGeneration with padded batches, an attention mask, sdpa and
its own loss: float32, bfloat16 weights, or autocast over float32 weights as pumice computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from train_model import Shape, new_model, pack
from transformers_llava import TrainingStep, build_model, training_inputs

from pumice.models.lmm import LMM
from pumice.models.lora import LoraSpec, add_lora, linear_layers
from pumice.models.packed_attention import attend_to_documents
from pumice.processing.collate import collate
from pumice.processing.encoded import Encoded
from pumice.train.adapters import set_trained
from pumice.train.build import PARTS
from pumice.train.parallel import SharedModel
from pumice.train.stages import StageSpec
from pumice.train.trainer import Trainer

Step = Callable[[int], float]
RATE, CLIP = 2e-5, 1.0
# LLaVA-1.5's own adapters.
LORA = LoraSpec(r=128, alpha=256.0)
STAGES = {
    "align": ("connector",),
    "tune": ("connector", "language"),
    "lora": ("connector", "language"),
}
# What learns of transformers' model beside the connector.
LEARNS: dict[str, Literal["all", "adapters", "none"]] = {
    "align": "none",
    "tune": "all",
    "lora": "adapters",
}


@dataclass(frozen=True)
class Task:
    """What all sides are given."""

    shape: Shape
    stage: str
    device: str
    budget: int
    """Tokens of a packed row."""
    checkpointing: str
    """`none`, or what pumice computes again; then transformers computes each block again."""
    steps: list[list[Encoded]]
    """The conversations of each step."""


def own_step(task: Task, *, compiled: bool = False) -> Step:
    """pumice's step as a stage runs it."""
    lmm = new_model(task.shape, task.device)
    if task.stage == "lora":
        add_lora(lmm.language, LORA)
    for part in PARTS:
        set_trained(lmm, part, part in STAGES[task.stage])
    attend_to_documents(lmm.language)
    trainer = own_trainer(lmm, task.stage, checkpointing=task.checkpointing, compiled=compiled)
    packed = [pack(step, task.budget) for step in task.steps]
    return lambda number: float(trainer._step(1, packed[number])["loss"])


def own_trainer(
    lmm: LMM, stage: str, *, checkpointing: str = "none", compiled: bool = False
) -> Trainer:
    """The trainer of a run, whose step is measured as it is."""
    nowhere = Path()
    spec = StageSpec(
        name="train", vision=(nowhere,), vision_layer=-2, vision_select="patch",
        connector="mlp2x_gelu", language=nowhere, init=None, image_mode="pad",
        template="vicuna_v1", system="", final_template="vicuna_v1", final_system="",
        train=dict.fromkeys(STAGES[stage], RATE), data=(), steps=10**6, epochs=None,
        batch_size=1, warmup=0.0, schedule="constant", clip=CLIP,
    )  # fmt: skip
    model = SharedModel(lmm, checkpointing=checkpointing, compiled=compiled)
    # The steps are given by hand, so nothing is loaded.
    return Trainer(spec, model, cast("Any", None), nowhere, fingerprint="")


def peer_step(task: Task, dtype: torch.dtype, *, autocast: bool = False) -> Step:
    """transformers' step in one precision, on the same weights."""
    lmm = new_model(task.shape, task.device)
    # The last id of the vocabulary, which no drawn text holds.
    image_id = lmm.language.vocab_size - 1
    layers = sorted({name.rpartition(".")[2] for name, _ in linear_layers(lmm.language)})
    with torch.device(task.device):
        model = build_model(lmm, image_id)
    del lmm
    model = model.to(dtype)
    if task.stage == "lora":
        _adapt(model.model.language_model, layers)
    if task.checkpointing != "none":
        model.activation_checkpointing_enable({"use_reentrant": False})
    step = TrainingStep(model, RATE, CLIP, autocast, LEARNS[task.stage])
    batches = [collate(encoded, 0).to(task.device) for encoded in task.steps]
    inputs = [training_inputs(batch, image_id) for batch in batches]
    for one in inputs:
        if "pixel_values" in one:
            one["pixel_values"] = one["pixel_values"].to(dtype)
    return lambda number: step(inputs[number])


def _adapt(decoder: Any, layers: list[str]) -> None:
    """The adapters that pumice has, put on as peft's documentation does it."""
    import peft

    config = peft.LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules=layers)
    peft.inject_adapter_in_model(config, decoder)


SIDES: dict[str, Callable[[Task], Step]] = {
    "pumice": own_step,
    "pumice_compiled": lambda task: own_step(task, compiled=True),
    "transformers_float32": lambda task: peer_step(task, torch.float32),
    "transformers_autocast": lambda task: peer_step(task, torch.float32, autocast=True),
    "transformers_bfloat16": lambda task: peer_step(task, torch.bfloat16),
}
