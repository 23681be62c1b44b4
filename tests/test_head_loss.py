"""The loss in pieces is the loss as a whole, with its gradients; heads that do more keep theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

import tiny
from pumice.models import head_loss as module
from pumice.models import language as language_module
from pumice.models.head_loss import has_plain_head, head_loss
from pumice.models.language import LanguageModel

K, D, V = 23, 16, 40
# What a family does to its logits behind the linear layer.
HEADS: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "qwen2": ({"num_key_value_heads": 1}, True),
    "gpt2": ({}, True),
    "phi": ({}, True),
    "opt": ({"word_embed_proj_dim": 16, "ffn_dim": 24}, True),
    "gemma2": ({"final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 1}, False),
    "cohere": ({"logit_scale": 0.3, "eos_token_id": 1}, True),
    "granite": ({"logits_scaling": 3.0}, True),
}


def model(family: str) -> LanguageModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, **HEADS[family][0],
    )  # fmt: skip
    made = LanguageModel.from_config(config)
    tiny.spread(made)
    return made


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven positions a piece, so that the last one is not whole."""
    monkeypatch.setattr(module, "PIECE", 7 * V)
    monkeypatch.setattr(language_module, "WHOLE", 7 * V)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_pieces_are_the_whole(trained: tuple[bool, bool], bias: bool, lower: bool) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(K, D), torch.randn(V, D)
    shift = torch.randn(V) if bias else None
    targets = torch.randint(V, (K,))
    inputs = [hidden, weight] if shift is None else [hidden, weight, shift]
    results = []
    for pieces in (True, False):
        ours = [x.clone() for x in inputs]
        for x, learns in zip(ours, (*trained, trained[1]), strict=False):
            x.requires_grad_(learns)
        h, w, b = (*ours, None)[:3]
        assert h is not None and w is not None
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            if pieces:
                loss = head_loss(h, w, b, targets)
            else:
                loss = F.cross_entropy(F.linear(h, w, b).float(), targets, reduction="sum")
            (loss / 3).backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), [x.grad for x in ours]))
    (loss, gradients), (expected, wanted) = results
    tolerance = 3e-2 if lower else 1e-5
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for found, other in zip(gradients, wanted, strict=True):
        assert (found is None) == (other is None)
        if found is not None and other is not None:
            torch.testing.assert_close(found, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", HEADS)
def test_every_family_has_the_loss_of_its_own_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(family).eval()
    assert has_plain_head(made) == HEADS[family][1]
    torch.manual_seed(2)
    embeds = torch.randn(2, 9, D)
    keep = torch.rand(2, 9) < 0.8
    targets = torch.randint(V, (int(keep.sum()),))
    assert len(targets) > 7
    results = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(language_module, "WHOLE", 10**6)
        made.zero_grad()
        loss = made.loss(embeds, targets, keep)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-4)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_no_tensor_of_all_logits_is_made() -> None:
    hidden, weight = torch.randn(200, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        sizes: list[int] = []
        head_loss(hidden, weight, None, torch.randint(V, (200,)))
    assert sizes and max(sizes) <= 200 * D
