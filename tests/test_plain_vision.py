"""The vision blocks with fewer operations: what transformers computes, or transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from pumice.infer.engine import Engine
from pumice.infer.plain_vision import PlainEncoder, plain_encoders, standing_in
from pumice.models.lmm import LMM
from pumice.models.vision import VisionBackbone
from pumice.processing.processor import Processor
from small_requests import mixed

ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")


def backbone(family: str, activation: str, **more: Any) -> VisionBackbone:
    config = tiny.vision_config(family)
    config.hidden_act = activation
    torch.manual_seed(0)
    vision = VisionBackbone(config, -2, "patch", **more).eval()
    tiny.spread(vision.model)
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return vision


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("more", [{}, {"norm": True}, {"image_size": 48}])
@torch.inference_mode()
def test_it_computes_what_transformers_computes(
    family: str, activation: str, more: dict[str, Any]
) -> None:
    vision = backbone(family, activation, **more)
    encoders = plain_encoders(vision)
    assert len(encoders) == 1
    pixels = torch.randn(3, 3, vision.image_size, vision.image_size)
    expected = vision(pixels)
    calls = _counted(encoders[0])
    with standing_in(encoders):
        found = vision(pixels)
    assert calls == [1]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(vision(pixels), expected) and calls == [1]


def test_answers_are_those_of_transformers_own_blocks(
    lmm: LMM, processor: Processor, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = mixed(pictures)
    fast = Engine(lmm, processor, 4)
    answers = fast.generate(requests)
    assert fast.memory.features._encoders
    monkeypatch.setattr("pumice.infer.features.plain_encoders", lambda vision: [])
    assert Engine(lmm, processor, 4).generate(requests) == answers


def test_other_weights_get_another_stand_in(lmm: LMM, processor: Processor, pictures: Path) -> None:
    engine = Engine(lmm, processor, 4)
    engine.generate(mixed(pictures))
    features = engine.memory.features
    encoders = features._encoders
    features.clear()  # of images; weights stay as they are laid out
    assert encoders and features._encoders is encoders and not features.bytes
    with torch.no_grad():
        for parameter in lmm.vision.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    assert engine.generate(mixed(pictures)) == Engine(lmm, processor, 4).generate(mixed(pictures))


def test_an_error_leaves_the_backbone_as_it_was() -> None:
    vision = backbone("clip_vision_model", "gelu")
    with pytest.raises(ZeroDivisionError), standing_in(plain_encoders(vision)):
        raise ZeroDivisionError
    assert "forward" not in vars(vision.model.encoder)


@pytest.mark.parametrize("change", ["dinov2", "relu", "hook", "bfloat16", "subclass"])
def test_other_backbones_run_through_transformers(change: str) -> None:
    family = "dinov2" if change == "dinov2" else "clip_vision_model"
    vision = backbone(family, "relu" if change == "relu" else "gelu")
    if change == "hook":
        vision.model.encoder.layers[0].register_forward_hook(lambda *_: None)
    if change == "bfloat16":
        vision.to(torch.bfloat16)
    if change == "subclass":
        vision.model.encoder.layers[1].mlp.fc1 = _Doubled(32, 64)
    assert plain_encoders(vision) == []


def test_blocks_that_are_not_their_familys_run_through_transformers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vision = backbone("clip_vision_model", "gelu")
    vision.model.encoder.layers[1].mlp.activation_fn = nn.ReLU()
    assert plain_encoders(vision) == []
    assert "does not compute what its family does" in caplog.text


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _counted(encoder: PlainEncoder) -> list[int]:
    calls = [0]
    real = encoder._blocks[0].qkv

    def count(x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return real(x)

    encoder._blocks[0].qkv = count  # type: ignore[assignment]
    return calls
