"""The memory of a training step, by running it on tensors that have shapes and no numbers.

Forward and backward pass are those of the model, so every family, connector and precision counts
what it really keeps; nothing is estimated from widths. What lives is followed storage by storage.
Weights and the optimizer's states are the caller's arithmetic.
Shapes: B rows, T positions, N views, K supervised positions, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from pumice.models.config import LMMConfig
from pumice.models.connectors import Instruction
from pumice.models.costs import Trained
from pumice.models.cross_attention import Media
from pumice.models.head_loss import WHOLE, head_loss
from pumice.models.lmm import LMM
from pumice.models.lora import LoraSpec, adapter_parameters, add_lora
from pumice.models.packed_attention import NAME as DOCUMENTS
from pumice.models.packed_attention import Documents
from pumice.models.recompute import block_lists, checkpoint_blocks

# Blocks that are simulated of a deep decoder; what more of them take is in proportion.
_DEPTHS = (2, 4)
_INSTRUCTION = 32
FUSED = "pumice_fused_shapes"


@dataclass(frozen=True, slots=True)
class Work:
    """What one micro-batch holds: B rows of T positions, or one row of documents."""

    rows: int
    positions: int
    views: int
    """Of all its images."""
    image_tokens: int
    """Of all its images, row ends among them."""
    supervised: int
    documents: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """How a step is computed: `mixed` is bfloat16 autocast over float32 weights.

    `sharded` holds the blocks' weights in bfloat16, as FSDP2 gathers them, and gives every gradient
    away once it is complete. `attention` is a name of transformers' table: what the step
    really uses, or `FUSED` for a GPU's, which keeps no scores.
    """

    learns: Trained
    mixed: bool
    attention: str = FUSED
    sharded: bool = False
    accumulates: bool = False
    """Gradients of an earlier micro-batch are there already."""
    checkpointing: str = "none"
    lora: LoraSpec | None = None


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes beyond the model's weights: `activations` as they stand when the loss is known.

    `peak` is the most that lives at a time, gradients among it.
    """

    activations: int
    peak: int


def step_memory(config: LMMConfig, work: Work, setting: Setting) -> StepMemory:
    """What a micro-batch takes beyond weights and optimizer states."""
    blocks = config.language.get("num_hidden_layers")
    if not isinstance(blocks, int) or blocks <= max(_DEPTHS):
        return _simulated(config, work, setting)
    few, more = (_simulated(_cut(config, depth), work, setting) for depth in _DEPTHS)
    times = (blocks - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
    return StepMemory(
        int(few.activations + times * (more.activations - few.activations)),
        int(few.peak + times * (more.peak - few.peak)),
    )


def _cut(config: LMMConfig, blocks: int) -> LMMConfig:
    language = copy.deepcopy(config.language)
    language["num_hidden_layers"] = blocks
    if isinstance(language.get("layer_types"), list):
        language["layer_types"] = language["layer_types"][:blocks]
    return replace(config, language=language)


def _simulated(config: LMMConfig, work: Work, setting: Setting) -> StepMemory:
    lmm = _model(config, setting)
    with FakeTensorMode():
        _fill(lmm, [*block_lists(lmm)] if setting.sharded else [])
        if setting.sharded:
            for parameter in lmm.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_give_away)  # type: ignore[no-untyped-call]
        live = Live([*lmm.parameters(), *lmm.buffers()])
        with live:
            if setting.accumulates:
                for parameter in lmm.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.empty_like(parameter)
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.mixed):
                loss = _loss(lmm, work)
            activations = live.now
            loss.backward()  # type: ignore[no-untyped-call]
    return StepMemory(activations, live.peak)


def _model(config: LMMConfig, setting: Setting) -> LMM:
    """The model on the meta device, as a stage prepares it."""
    learns, vision = setting.learns, "sdpa" if setting.attention == FUSED else "eager"
    with torch.device("meta"):
        lmm = LMM.from_config(config, attention=vision, init=False)
    lmm.language.model.set_attn_implementation(setting.attention)  # type: ignore[operator]
    if setting.lora is not None:
        add_lora(lmm.language, setting.lora)
    for part in ("vision", "connector", "language"):
        lmm.part(part).train(getattr(learns, part)).requires_grad_(getattr(learns, part))
    if learns.adapters:
        lmm.language.requires_grad_(False)
        for _, parameter in adapter_parameters(lmm.language):
            parameter.requires_grad_(True)
    checkpoint_blocks(lmm, setting.checkpointing)
    return lmm


def _fill(module: nn.Module, halved: Sequence[nn.Module]) -> None:
    """A tensor without numbers in place of each on the meta device; shared ones stay shared.

    Float32, but bfloat16 for the weights below `halved`.
    """
    halves = {id(weight) for part in halved for weight in part.parameters()}
    fresh: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, weight in child._parameters.items():
            if weight is not None:
                if id(weight) not in fresh:
                    half = id(weight) in halves
                    made = torch.empty(weight.shape, dtype=torch.bfloat16 if half else None)
                    fresh[id(weight)] = nn.Parameter(made, weight.requires_grad)
                child._parameters[name] = fresh[id(weight)]
        for name, value in child._buffers.items():
            if value is not None:
                child._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _give_away(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _loss(lmm: LMM, work: Work) -> torch.Tensor:
    """The summed cross entropy, as `LMM.loss` has it, of ids that have no values."""
    language = lmm.language
    features = _features(lmm, work)
    embeds = language.embed(torch.empty(work.rows, work.positions, dtype=torch.long))
    media = None
    if lmm.cross_attention is not None and features is not None:
        media = _media(features, work)
    elif features is not None:
        flat = embeds.flatten(0, 1)
        places = torch.empty(len(features), dtype=torch.long)
        embeds = flat.index_copy(0, places, features.to(flat.dtype)).view_as(embeds)
    with lmm.looking_at(media):
        hidden = language(embeds, **_places(lmm, work, embeds), head=False)
    kept = hidden.flatten(0, 1).index_select(0, torch.empty(work.supervised, dtype=torch.long))
    targets = torch.empty(work.supervised, dtype=torch.long)
    head = language.model.get_output_embeddings()  # type: ignore[operator]
    if work.supervised * language.vocab_size <= WHOLE or type(head) is not nn.Linear:
        return F.cross_entropy(head(kept).float(), targets, reduction="sum")
    return head_loss(kept, head.weight, head.bias, targets)


def _features(lmm: LMM, work: Work) -> torch.Tensor | None:
    """float[image tokens, D], or the latents float[N, Q, Dm] of gated layers."""
    if not work.views:
        return None
    side = lmm.vision.image_size
    weight = next(lmm.vision.parameters())
    patches = lmm.vision(torch.empty(work.views, 3, side, side).to(weight.dtype))
    asked = None
    if lmm.connector.wants_instruction:
        ids = torch.empty(work.views, _INSTRUCTION, dtype=torch.long)
        asked = Instruction(ids, torch.empty_like(ids, dtype=torch.bool))
    features: torch.Tensor = lmm.connector(patches, mask=None, instruction=asked)
    if lmm.cross_attention is not None:
        return features
    # Row ends come to them, and features of pure padding go.
    flat = features.flatten(0, 1)
    missing = work.image_tokens - len(flat)
    return F.pad(flat, (0, 0, 0, missing)) if missing > 0 else flat[: work.image_tokens]


def _media(features: torch.Tensor, work: Work) -> Media:
    states = features.flatten(0, 1)
    each = len(states) // work.rows
    states = states[: each * work.rows].view(work.rows, each, -1)
    owner = torch.empty(*states.shape[:2], dtype=torch.long)
    return Media(states, owner, torch.empty(work.rows, work.positions, dtype=torch.long))


def _places(lmm: LMM, work: Work, embeds: torch.Tensor) -> dict[str, Any]:
    positions = torch.empty(work.rows, work.positions, dtype=torch.long)
    name = lmm.language.config._attn_implementation
    if name in (FUSED, DOCUMENTS):
        documents = work.documents
        return {"position_ids": positions} | ({"documents": documents} if documents else {})
    # A mask that is ready: making one would look at values, and there are none.
    mask = torch.empty(work.rows, 1, work.positions, work.positions, dtype=embeds.dtype)
    return {"position_ids": positions, "attention_mask": mask}


def _fused(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    documents: Documents | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """float[B, H, T, Dh], twice float[B, Hk, T, Dh] -> float[B, T, H, Dh] without kept scores."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query, key = query.to(value.dtype), key.to(value.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Its shape would be the row's length squared, and fused attention needs none."""


AttentionInterface.register(FUSED, _fused)
AttentionMaskInterface.register(FUSED, _no_mask)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make, from the first tensor on them to the last."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._there = {tensor.untyped_storage()._cdata for tensor in known}
        # Held, so that no new storage takes the place of one of them.
        self._known = list(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._there:
            return
        size = storage.nbytes()
        self._there.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._there.discard(place)
        self.now -= size
