"""What a training step must compute and move: counted from the shapes, and what this machine can.

A lower bound for bytes: every matrix product reads its operands and writes its result once; AdamW
reads weight, gradient and two moments and writes three of them. Everything else (norms, activation
functions, the softmax, launches) is what separates an achieved figure from the bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pumice.models.lmm import LMM
from pumice.processing.collate import Batch

_ADAMW_BYTES = 7 * 4
_SIDE = 1024
_COPY = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Product:
    """`times` products of [rows, inner] by [inner, columns]; `passes` 3 where it is learnt."""

    rows: int
    inner: int
    columns: int
    times: int = 1
    passes: int = 3

    @property
    def flop(self) -> int:
        """Multiplications and additions, forward and backward."""
        return 2 * self.rows * self.inner * self.columns * self.times * self.passes

    @property
    def numbers(self) -> int:
        """Numbers read and written."""
        r, i, c = self.rows, self.inner, self.columns
        return (r * i + i * c + r * c) * self.times * self.passes


def step_products(lmm: LMM, batch: Batch, head_rows: int) -> list[Product]:
    """Every matrix product of a step in which vision is frozen; full attention squares counted."""
    vision, language = lmm.vision, lmm.language.config
    images = len(batch.pixel_values)
    tokens = vision.num_patches + vision.num_prefix_tokens
    blocks = lmm.vision.model.config.num_hidden_layers
    width, inner = vision.hidden_size, vision.config.intermediate_size
    rows = images * tokens
    pixels = 3 * vision.patch_size**2
    products = [Product(images * vision.num_patches, pixels, width, passes=1)]
    products += [Product(rows, width, width, 4 * blocks, 1)]
    products += [Product(rows, width, inner, 2 * blocks, 1)]
    heads = vision.config.num_attention_heads
    products += [Product(tokens, width // heads, tokens, 2 * blocks * images * heads, 1)]
    for layer in lmm.connector.modules():
        if isinstance(layer, nn.Linear):
            patches = images * lmm.image_tokens
            products.append(Product(patches, layer.in_features, layer.out_features))
    conversations, length = batch.input_ids.shape
    rows, width, blocks = conversations * length, language.hidden_size, language.num_hidden_layers
    heads = language.num_attention_heads
    keys = width * language.num_key_value_heads // heads
    return [
        *products,
        Product(rows, width, width, 2 * blocks),
        Product(rows, width, keys, 2 * blocks),
        Product(rows, width, language.intermediate_size, 3 * blocks),
        Product(length, width // heads, length, 2 * blocks * conversations * heads),
        Product(head_rows, width, lmm.language.vocab_size),
    ]


def step_cost(lmm: LMM, batch: Batch, head_rows: int, number_bytes: int) -> dict[str, float]:
    """GFLOP and least GB of a step, and the FLOP per byte."""
    products = step_products(lmm, batch, head_rows)
    trained = sum(p.numel() for p in lmm.parameters() if p.requires_grad)
    flop = sum(product.flop for product in products)
    moved = number_bytes * sum(product.numbers for product in products) + _ADAMW_BYTES * trained
    return {"gflop": flop / 1e9, "least_gbyte": moved / 1e9, "flop_per_byte": flop / moved}


def gemm_gflops(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """GFLOP/s of one square matrix product of side 1024, the best of three."""
    a, b = torch.randn(2, _SIDE, _SIDE).to(dtype)
    return 2 * _SIDE**3 / 1e9 / _best(lambda: a @ b, clock)


def copy_gbytes(clock: Callable[[], float] = time.perf_counter) -> float:
    """GB/s read and written when 64 MiB are copied, the best of three."""
    source = torch.zeros(_COPY, dtype=torch.uint8)
    target = torch.ones_like(source)
    return 2 * _COPY / 1e9 / _best(lambda: target.copy_(source), clock)


def _best(work: Callable[[], object], clock: Callable[[], float]) -> float:
    work()
    seconds = []
    for _ in range(3):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)
