"""Fixed products: what the layers say, for one row and several, with either copy of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pumice.infer import products
from pumice.infer.byte_rows import ByteRows
from pumice.infer.digit_row import DigitRow
from pumice.infer.onednn import BlockedLinear
from pumice.infer.pages import Pages, empty_like
from pumice.infer.products import Norm, Quantized, product
from pumice.models.quantize import QuantizedLinear


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(24,), (64, 16, 16)])
def test_a_product_is_that_of_its_layers(
    monkeypatch: pytest.MonkeyPatch, blocks: bool, rows: int, bias: bool, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(products, "_WORTH_A_CALL", 0)
    if not blocks:
        monkeypatch.setattr(BlockedLinear, "can_hold", lambda weight: False)
    torch.manual_seed(0)
    layers = [nn.Linear(48, size, bias=bias).requires_grad_(False) for size in sizes]
    order = torch.randperm(sum(sizes))
    x, plus = torch.randn(rows, 48), torch.randn(rows, sum(sizes))
    said = torch.cat([layer(x) for layer in layers], -1)
    kept = x.clone(), plus.clone()
    for wanted, made in (
        (said, product(layers, Pages())),
        (said[:, order], product(layers, Pages(), order)),
    ):
        torch.testing.assert_close(made(x), wanted)
        torch.testing.assert_close(made(x, plus), wanted + plus)
        for alone, added, row in zip(x.numpy(), plus.numpy(), wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(made.one(alone)), row)
            torch.testing.assert_close(torch.from_numpy(made.one(alone, added) - added), row)
    assert torch.equal(x, kept[0]) and torch.equal(plus, kept[1])


def test_a_norm_is_the_root_mean_square_norm() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(32), requires_grad=False)
    module.variance_epsilon = 1e-5  # type: ignore[assignment]
    x = torch.randn(5, 32) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 1e4]).unsqueeze(1)
    wanted = torch.nn.functional.rms_norm(x, (32,), module.weight, 1e-5)
    torch.testing.assert_close(Norm(module)(x), wanted)
    heads = x.view(5, 1, 32)
    torch.testing.assert_close(Norm(module)(heads), wanted.view(5, 1, 32))
    alone = np.stack([Norm(module).one(row) for row in x.numpy()])
    torch.testing.assert_close(torch.from_numpy(alone), wanted)
    torch.testing.assert_close(torch.from_numpy(Norm(module).heads(x.numpy())), wanted)


def eight_bits(sizes: tuple[int, ...], bias: bool) -> list[QuantizedLinear]:
    torch.manual_seed(0)
    layers = [QuantizedLinear(48, size, bias, "int8") for size in sizes]
    for layer in layers:
        added = torch.randn(layer.out_features) if bias else None
        layer.fill(torch.randn(layer.out_features, 48), added)
        layer.pack()
    return layers


@pytest.mark.parametrize("worth", [0, products._WORTH_BYTES])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(24,), (300, 16, 16), (256, 256)])
def test_a_row_of_eight_bits_is_that_of_the_weights_they_stand_for(
    monkeypatch: pytest.MonkeyPatch, worth: int, bias: bool, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(products, "_WORTH_BYTES", worth)
    layers = eight_bits(sizes, bias)
    order = torch.randperm(sum(sizes)) if len(sizes) > 1 else None
    x, plus = 40 * torch.randn(48), torch.randn(sum(sizes))
    wanted = torch.cat([F.linear(x, layer.dequantized(), layer.bias) for layer in layers])
    wanted = wanted if order is None else wanted[order]
    made = product(layers, Pages(), order)
    assert isinstance(made, Quantized) == (worth == 0)
    for copies in (True, False):
        close = {"rtol": 1e-5, "atol": 1e-3} if copies else {"rtol": 1e-3, "atol": 0.3}
        made = product(layers, Pages(), order, copies)
        torch.testing.assert_close(torch.from_numpy(made.one(x.numpy())), wanted, **close)
        found = torch.from_numpy(made.one(x.numpy(), plus.numpy()))
        torch.testing.assert_close(found, wanted + plus, **close)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_of_many_eight_bits_is_computed_in_integers(
    monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    monkeypatch.setattr(products, "_WORTH_BYTES", 0)
    monkeypatch.setattr(products, "_WORTH_DIGITS", 48 * 300)
    [large], [small] = eight_bits((300,), bias), eight_bits((299,), bias)
    assert isinstance(product([large], Pages())._rows, DigitRow)  # type: ignore[attr-defined]
    assert isinstance(product([small], Pages())._rows, ByteRows)  # type: ignore[attr-defined]
    made = product([large], Pages())
    for size in (1e-3, 1.0, 1e4, 0.0):
        x = size * torch.randn(48)
        wanted = F.linear(x, large.dequantized(), large.bias)
        found = torch.from_numpy(made.one(x.numpy()))
        # The last digit is worth 1 in 126 times 126 of the largest input.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-3 * size)
        torch.testing.assert_close(found, made(x.unsqueeze(0))[0], rtol=1e-4, atol=1e-3 * size)
    for wrong in (float("nan"), float("inf")):
        x = torch.randn(48)
        x[5] = wrong
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(made.one(x.numpy())).any()


def test_rows_of_eight_bits_that_share_their_memory_do_not_mix() -> None:
    pages = Pages()
    layers = [QuantizedLinear(inputs, 300, False, "int8") for inputs in (16, 48, 24)]
    inputs = [torch.randn(layer.in_features) for layer in layers]
    for layer in layers:
        layer.fill(torch.randn(300, layer.in_features))
        layer.pack()
    made = [ByteRows.of(layer, pages) for layer in layers]
    for _ in range(2):
        for layer, rows, x in zip(layers, made, inputs, strict=True):
            assert rows is not None
            found = torch.from_numpy(rows(x.numpy()))
            torch.testing.assert_close(found, F.linear(x, layer.dequantized()))


def test_large_pages_are_for_what_is_large_and_on_the_cpu() -> None:
    for shape, kind in (((3, 5), torch.float32), ((1 << 20, 9), torch.bfloat16)):
        made = empty_like(torch.empty(2, dtype=kind), shape)
        assert made.shape == shape and made.dtype == kind and made.is_contiguous()
    assert empty_like(torch.empty(1, device="meta"), (1 << 20, 9)).is_meta


def test_a_row_of_eight_bits_needs_no_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_WORTH_BYTES", 0)
    monkeypatch.setattr(ByteRows, "of", lambda layer, pages: None)
    [layer] = eight_bits((24,), False)
    x = torch.randn(48)
    found = torch.from_numpy(product([layer], Pages()).one(x.numpy()))
    torch.testing.assert_close(found, F.linear(x, layer.dequantized()), rtol=1e-3, atol=1e-2)


def test_what_lies_in_pages_is_apart_and_aligned() -> None:
    pages = Pages()
    shapes = [(3, 5), (1 << 20, 9), (7,), (2, 4, 8)]
    made = [pages.copy(torch.full(shape, float(n))) for n, shape in enumerate(shapes)]
    for number, (tensor, shape) in enumerate(zip(made, shapes, strict=True)):
        assert tensor.shape == shape and tensor.data_ptr() % 64 == 0
        assert torch.equal(tensor, torch.full(shape, float(number)))
    flipped = torch.randn(4, 6).t()
    assert torch.equal(pages.copy(flipped), flipped) and pages.copy(flipped).is_contiguous()
