"""Fixed products: what the layers say, for one row and several, with either copy of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pumice.infer import products
from pumice.infer.products import Norm, product


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(24,), (64, 16, 16)])
def test_a_product_is_that_of_its_layers(
    monkeypatch: pytest.MonkeyPatch, blocks: bool, rows: int, bias: bool, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(products, "_WORTH_A_CALL", 0)
    if not blocks:
        monkeypatch.setattr(products, "_blocks", lambda weight: None)
    torch.manual_seed(0)
    layers = [nn.Linear(48, size, bias=bias).requires_grad_(False) for size in sizes]
    order = torch.randperm(sum(sizes))
    x, plus = torch.randn(rows, 48), torch.randn(rows, sum(sizes))
    said = torch.cat([layer(x) for layer in layers], -1)
    kept = x.clone(), plus.clone()
    for wanted, made in ((said, product(layers)), (said[:, order], product(layers, order))):
        torch.testing.assert_close(made(x), wanted)
        torch.testing.assert_close(made(x, plus), wanted + plus)
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
