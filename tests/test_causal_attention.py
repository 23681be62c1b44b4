"""Attention out of products beside torch's own kernel: values, gradients, and who is asked when."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from pumice.models import causal_attention
from pumice.models.packed_attention import Documents, document_attention

# One block, several, a block that is cut, one token, a last block of the smallest size.
LENGTHS = [(128,), (391, 257), (1, 300, 2), (200, 31, 193), (130,)]
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def states(total: int, heads: int = 3, width: int = 64) -> States:
    generator = torch.Generator().manual_seed(total)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, total, heads, width, generator=generator).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )


def by_torch(given: States, lengths: tuple[int, ...], scale: float) -> torch.Tensor:
    """The same in float64, a document after the other."""
    parts = zip(*(torch.split(x.double(), list(lengths), 2) for x in given), strict=True)
    mixed = [F.scaled_dot_product_attention(*p, is_causal=True, scale=scale) for p in parts]
    return torch.cat(mixed, 2).transpose(1, 2)


def values_and_gradients(mixed: torch.Tensor, given: States) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(mixed.shape, generator=generator).to(mixed.dtype)
    gradients = torch.autograd.grad((mixed * weights).sum(), given)
    return [mixed.detach(), *gradients]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_values_and_gradients_are_those_of_torch(lengths: tuple[int, ...]) -> None:
    given = states(sum(lengths))
    mixed = causal_attention.attend(*given, lengths, 0.2, torch.float32)
    assert mixed.is_contiguous()
    ours = values_and_gradients(mixed, given)
    theirs = values_and_gradients(by_torch(given, lengths, 0.2), given)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.double(), other.double(), atol=2e-5, rtol=1e-5)


def test_in_bfloat16_the_error_is_that_of_its_rounding() -> None:
    lengths = (391, 257)
    given = states(sum(lengths))
    mixed = causal_attention.attend(*given, lengths, 0.125, torch.bfloat16)
    ours = values_and_gradients(mixed, given)
    theirs = values_and_gradients(by_torch(given, lengths, 0.125), given)
    for own, other in zip(ours, theirs, strict=True):
        assert float((own.double() - other).norm() / other.norm()) < 6e-3
        assert own.dtype == torch.float32


def test_a_document_does_not_hang_on_its_neighbours() -> None:
    first, second = states(300), states(200)
    query, key, value = (torch.cat(pair, 2) for pair in zip(second, first, strict=True))
    packed = causal_attention.attend(query, key, value, (200, 300), 0.125, torch.bfloat16)
    alone = causal_attention.attend(*first, (300,), 0.125, torch.bfloat16)
    assert torch.equal(packed[:, 200:], alone)


def attended(lengths: tuple[int, ...], width: int, **more: Any) -> bool:
    """Whether a row of these documents is computed out of products."""
    given = states(sum(lengths), width=width)
    with mock.patch.object(causal_attention, "attend", wraps=causal_attention.attend) as asked:
        mixed, _ = document_attention(
            torch.nn.Module(), *given, None, documents=Documents(lengths), **more
        )
    if not more:
        expected = by_torch(given, lengths, width**-0.5)
        torch.testing.assert_close(mixed.double(), expected, atol=1e-5, rtol=1e-5)
    return bool(asked.called)


def test_it_is_asked_where_it_pays_and_where_it_may_be() -> None:
    assert attended((300, 200), 64)
    assert not attended((300, 200), 32)
    assert not attended((50, 60, 100), 64)
    assert not attended((300, 200), 64, dropout=0.5)
    assert not attended((300, 200), 64, softcap=20.0)
    assert not attended((300, 200), 64, sliding_window=250)
    assert attended((300, 200), 64, sliding_window=300)


def test_the_value_gives_the_type_and_autocast_the_precision() -> None:
    query, key, value = states(300)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        lower, _ = document_attention(torch.nn.Module(), query, key, value.bfloat16(), None)
        wide, _ = document_attention(torch.nn.Module(), query, key, value, None)
    exact = by_torch((query, key, value), (300,), 0.125).detach()
    assert lower.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    assert 1e-4 < float((wide - exact).norm() / exact.norm()) < 6e-3


def test_a_simulated_step_leaves_nothing_behind_for_a_real_one() -> None:
    with FakeTensorMode():
        causal_attention.attend(*states(300), (300,), 0.125, torch.bfloat16)
    given = states(300)
    mixed = causal_attention.attend(*given, (300,), 0.125, torch.float32)
    expected = by_torch(given, (300,), 0.125)
    torch.testing.assert_close(mixed.double(), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_without_documents_are_all_attended_to() -> None:
    """As validation reads its rows after a packed step."""
    first, second = states(300), states(301)
    given = [torch.cat([a, b[:, :, :300]]).detach() for a, b in zip(first, second, strict=True)]
    mixed, _ = document_attention(torch.nn.Module(), *given, None)
    expected = F.scaled_dot_product_attention(*given, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, {"sliding_window": 50}, {"softcap": 20.0}])
@pytest.mark.parametrize("new", [1, 3, 200])
def test_behind_a_cache_the_last_positions_are_those_of_the_whole(
    more: dict[str, Any], new: int
) -> None:
    query, key, value = (x.detach() for x in states(300))
    whole, _ = document_attention(torch.nn.Module(), query, key, value, None, **more)
    last, _ = document_attention(torch.nn.Module(), query[:, :, -new:], key, value, None, **more)
    torch.testing.assert_close(last, whole[:, -new:], atol=1e-5, rtol=1e-5)
