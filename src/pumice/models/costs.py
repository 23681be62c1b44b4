"""What a model costs before it is built: weights, arithmetic and image tokens of each part.

Everything is run on shapes alone (the meta device). FLOPs are those of matrix products, 2 a
multiplication; attention is counted in full, although a decoder could skip half of it.
Shapes: T positions, K latents, Dm their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pumice.core.errors import PumiceError
from pumice.models.config import LMMConfig
from pumice.models.connectors import (
    CONNECTORS,
    REDUCTIONS,
    Connector,
    build_connector,
    connector_cost,
)
from pumice.models.connectors.perceiver import Perceiver
from pumice.models.cross_attention import CrossAttentionLayers, GatedLayer, Media
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.models.lora import linear_layers
from pumice.models.tiling import plan_image

# A training step beyond the forward pass: as much again to pass a gradient on to a part's inputs,
# and as much again for that of its weights.
_INPUTS, _WEIGHTS = 1, 1


class ImageCost(NamedTuple):
    """What one image of a size takes."""

    size: tuple[int, int]
    """Width and height."""
    views: int
    """S x S pictures that go through the vision backbone."""
    tokens: int
    """Positions in the language model."""
    latents: int
    """What gated layers look at; 0 without them."""
    vision_flops: int
    connector_flops: int


class ShelfRow(NamedTuple):
    """One connector between a recipe's backbones, for one image, tiled as the recipe tiles it."""

    name: str
    own: bool
    """Whether it is the recipe's, with the recipe's options; others have their defaults."""
    params: int
    """Its weights, those of gated layers among them."""
    views: int
    flops: int
    """Over all views."""
    tokens: int
    """Positions in the language model, row ends among them."""
    gated_params: int
    refused: str = ""
    """Why it cannot stand between these backbones."""


class Counts(NamedTuple):
    """FLOPs of one forward pass over a conversation with one image."""

    vision: int
    connector: int
    gated: int
    language: int


@dataclass(frozen=True, slots=True)
class Trained:
    """Which parts a stage trains; `adapters` when the language model learns through them."""

    vision: bool
    connector: bool
    language: bool
    adapters: bool = False


def blank_model(config: LMMConfig) -> LMM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return LMM.from_config(config, attention="eager", init=False)


def num_parameters(module: nn.Module | None) -> int:
    """How many weights a module has; shared ones count once."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def connector_parameters(lmm: LMM) -> int:
    """Weights of the connector with row ends, without gated layers."""
    ends = 0 if lmm.row_end is None else lmm.row_end.numel()
    return num_parameters(lmm.connector) + ends


def adapter_size(lmm: LMM, r: int, targets: Iterable[str] | None) -> int:
    """Weights of LoRA adapters of rank r on the language model."""
    wanted = None if targets is None else set(targets)
    layers = (
        layer
        for name, layer in linear_layers(lmm.language)
        if wanted is None or name.rpartition(".")[2] in wanted
    )
    return sum(r * (layer.in_features + layer.out_features) for layer in layers)


def vision_flops(lmm: LMM) -> int:
    """FLOPs of one view through the vision backbone, up to the block that is used."""
    side = lmm.vision.image_size
    with _counted() as counter:
        lmm.vision(torch.empty(1, 3, side, side, device="meta"))
    return int(counter.get_total_flops())


def image_costs(lmm: LMM, sizes: Iterable[tuple[int, int]]) -> Iterator[ImageCost]:
    """What images of these sizes (width, height) take."""
    one_view, connector = vision_flops(lmm), connector_cost(lmm.connector)
    for size in sizes:
        views, tokens = _views_and_tokens(lmm, lmm.connector, size)
        latents = 0
        if lmm.cross_attention is not None:
            tokens, latents = 1, views * connector.tokens
        yield ImageCost(
            size, views, tokens, latents, views * one_view, views * connector.flops
        )  # fmt: skip


def _views_and_tokens(lmm: LMM, connector: Connector, size: tuple[int, int]) -> tuple[int, int]:
    """Views of an image, tiled as `lmm` does, and the tokens that this connector makes of them."""
    if lmm.tiling is None:
        return 1, connector.num_tokens
    plan = plan_image(size, lmm.tiling, connector.side, connector.num_tokens)
    return plan.views, plan.tokens.total


def language_flops(lmm: LMM, positions: int) -> int:
    """FLOPs of the language model over so many positions, logits at each; no gated layers."""
    language = lmm.language
    if lmm.cross_attention is not None:
        # Gated layers hang on the blocks and would be counted here too.
        with torch.device("meta"):
            language = LanguageModel.from_config(language.config, attention="eager", init=False)
    hidden = torch.empty(1, positions, language.hidden_size, device="meta")
    # A mask that is ready: making one would look at values, and there are none.
    mask = torch.empty(1, 1, positions, positions, device="meta")
    with _counted() as counter:
        language(hidden, attention_mask=mask)
    return int(counter.get_total_flops())


def gated_flops(lmm: LMM, positions: int, latents: int) -> int:
    """FLOPs of the gated layers over so many positions; 0 without such layers."""
    layers = lmm.cross_attention
    if layers is None:
        return 0
    first = layers.layers[0]
    assert isinstance(first, GatedLayer)
    width = first.key.in_features
    hidden = torch.empty(1, positions, lmm.language.hidden_size, device="meta")
    media = Media(
        torch.empty(1, latents, width, device="meta"),
        torch.empty(1, latents, dtype=torch.long, device="meta"),
        torch.empty(1, positions, dtype=torch.long, device="meta"),
    )
    with _counted() as counter:
        for layer in layers.layers:
            layer(hidden, media.states, media.owner, media.seen)
    return int(counter.get_total_flops())


def conversation_flops(lmm: LMM, image: ImageCost, text_tokens: int) -> Counts:
    """One forward pass over a conversation of one image and so many tokens of text."""
    positions = image.tokens + text_tokens
    return Counts(
        image.vision_flops,
        image.connector_flops,
        gated_flops(lmm, positions, image.latents),
        language_flops(lmm, positions),
    )


def training_flops(counts: Counts, trained: Trained) -> int:
    """Forward and backward: a gradient goes from the logits down to the first part that learns."""
    below = trained.vision or trained.connector
    weights = trained.language and not trained.adapters
    learns = {
        "vision": (trained.vision, trained.vision),
        "connector": (trained.connector, below),
        "gated": (trained.connector, below or trained.language),
        "language": (weights, below or trained.language),
    }
    total = 0
    for part, flops in counts._asdict().items():
        own, passes_on = learns[part]
        total += flops * (1 + own * _WEIGHTS + passes_on * _INPUTS)
    return total


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        yield counter


def shelf(lmm: LMM, size: tuple[int, int]) -> Iterator[ShelfRow]:
    """The recipe's connector, then every one of the shelf with its default options.

    For one image of `size` (width, height).
    """
    yield _row(lmm, lmm.connector_name, lmm.connector, size, own=True)
    for name in shelf_names():
        try:
            with torch.device("meta"):
                connector = build_connector(
                    name,
                    lmm.vision.hidden_size,
                    lmm.language.hidden_size,
                    lmm.vision.num_tokens,
                    vocab_size=lmm.language.vocab_size,
                )
                row = _row(lmm, name, connector, size, own=False)
        except PumiceError as error:
            row = ShelfRow(name, False, 0, 0, 0, 0, 0, str(error))
        yield row


def shelf_names() -> list[str]:
    """Every connector once; the MLP with two layers, and after each merge of patches."""
    names = [name.replace("mlpNx", "mlp2x") for name in CONNECTORS]
    return names + [f"{merge}+mlp2x_gelu" for merge in REDUCTIONS]


def _row(
    lmm: LMM, name: str, connector: Connector, size: tuple[int, int], *, own: bool
) -> ShelfRow:
    cost, gated = connector_cost(connector), 0
    views, tokens = _views_and_tokens(lmm, connector, size)
    if isinstance(connector, Perceiver):
        layers = lmm.cross_attention if own else None
        if layers is None:
            layers = CrossAttentionLayers(lmm.language, connector.media_width, connector.gated)
        gated, tokens = num_parameters(layers), 1
    return ShelfRow(name, own, cost.params + gated, views, views * cost.flops, tokens, gated)
