"""The gated layer and the perceiver against Flamingo's equations, on fixed numbers in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pumice.models.connectors import build_connector
from pumice.models.connectors.perceiver import GatedOptions
from pumice.models.cross_attention import GatedLayer

DV = 6


def _softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def _layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def _attention(
    asks: np.ndarray, shows: np.ndarray, w: dict[str, np.ndarray], heads: int
) -> np.ndarray:
    """One sequence: float[A, W], float[K, W'] -> float[A, W]."""
    query, key, value = asks @ w["query"].T, shows @ w["key"].T, shows @ w["value"].T
    size = query.shape[1] // heads
    parts = []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        weights = _softmax(query[:, own] @ key[:, own].T / np.sqrt(size))
        parts.append(weights @ value[:, own])
    return np.concatenate(parts, axis=1) @ w["out"].T


def _weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    found = {}
    for place, (name, parameter) in enumerate(module.named_parameters()):
        count = np.arange(parameter.numel(), dtype=np.float64)
        numbers = (np.sin(count * (0.7 + 0.1 * place)) * 0.5 + 0.1).reshape(parameter.shape)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(numbers))
        found[name.removesuffix(".weight")] = numbers
    return found


def test_gated_layer_is_flamingos_equation() -> None:
    options = GatedOptions(activation="squared_relu", cross_heads=2, cross_head_width=3)
    layer = GatedLayer(8, DV, 2, options).double()
    w = _weights(layer)
    text, pictures = np.cos(np.arange(40.0)).reshape(5, 8), np.sin(np.arange(24.0)).reshape(4, DV)
    owner, seen = np.array([0, 0, 1, 1]), np.array([-1, 0, 0, 1, 1])

    asked = _layer_norm(text, w["attention_norm"], w["attention_norm.bias"])
    mixed = np.zeros_like(text)
    for t in range(5):
        if seen[t] >= 0:
            mixed[t] = _attention(asked[t : t + 1], pictures[owner == seen[t]], w, 2)
    y = text + np.tanh(w["attention_gate"]) * mixed
    inner = _layer_norm(y, w["feed_norm"], w["feed_norm.bias"]) @ w["up"].T
    y = y + np.tanh(w["feed_gate"]) * (np.maximum(inner, 0) ** 2 @ w["down"].T)

    found = layer(
        torch.from_numpy(text)[None],
        torch.from_numpy(pictures)[None],
        torch.from_numpy(owner)[None],
        torch.from_numpy(seen)[None],
    )
    np.testing.assert_allclose(found[0].detach().numpy(), y, atol=1e-12)


def test_perceiver_is_flamingos_equation() -> None:
    options: dict[str, Any] = {"queries": 3, "heads": 2, "head_width": 4, "depth": 2}
    options["latent_activation"] = "squared_relu"
    connector = build_connector("gated_cross_attention", DV, 8, 5, options, vocab_size=1).double()
    w = _weights(connector)
    features = np.cos(np.arange(5.0 * DV) * 1.3).reshape(5, DV)
    x = w["latents"]
    for block in range(2):
        b = {n.removeprefix(f"blocks.{block}."): v for n, v in w.items()}
        own = _layer_norm(x, b["latent_norm"], b["latent_norm.bias"])
        shown = _layer_norm(features, b["feature_norm"], b["feature_norm.bias"])
        x = x + _attention(own, np.concatenate([shown, own]), b, 2)
        inner = _layer_norm(x, b["feed_norm"], b["feed_norm.bias"]) @ b["up"].T
        x = x + np.maximum(inner, 0) ** 2 @ b["down"].T
    x = _layer_norm(x, w["norm"], w["norm.bias"])
    found = connector(torch.from_numpy(features)[None])
    np.testing.assert_allclose(found[0].detach().numpy(), x, atol=1e-12)
