"""The vision backbone: equal to transformers' hidden states, strict about its weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
)

import tiny
from pumice.core.errors import PumiceError
from pumice.models.lmm import LMM
from pumice.models.vision import CLIP_MEAN, VisionBackbone, read_image_stats
from tiny import pixels

P = tiny.NUM_PATCHES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("backbones")
    return SimpleNamespace(
        vision=tiny.vision_folder(root / "vision"), language=tiny.language_folder(root / "language")
    )


@pytest.fixture
def lmm(folders: SimpleNamespace) -> LMM:
    torch.manual_seed(0)
    return LMM.from_backbones(folders.vision, folders.language, "mlp2x_gelu", -2, "patch").eval()


@pytest.mark.parametrize("layer", [-1, -2, 1, 4])
@pytest.mark.parametrize(
    ("model_type", "prefix"),
    [
        ("clip_vision_model", 1),
        ("siglip_vision_model", 0),
        ("dinov2", 1),
        ("dinov2_with_registers", 5),
        ("dinov3_vit", 1),
        ("vit", 1),
    ],
)
def test_vision_equals_hidden_states(
    tmp_path: Path, model_type: str, prefix: int, layer: int
) -> None:
    folder = tiny.vision_folder(tmp_path, model_type)
    ours = VisionBackbone.from_folder(folder, layer, "patch").eval()
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        states = theirs(pixels(2), output_hidden_states=True).hidden_states
        features = ours(pixels(2))
    assert len(states) == 5
    assert ours.num_prefix_tokens == prefix
    assert features.shape == (2, P, 32)
    torch.testing.assert_close(features, states[layer][:, prefix:], atol=1e-5, rtol=0)


def test_vision_keeps_only_what_runs(folders: SimpleNamespace) -> None:
    ours = VisionBackbone.from_folder(folders.vision, -2, "cls_patch")
    names = list(ours.state_dict())
    assert not [n for n in names if "layers.3" in n or "post_layernorm" in n]
    assert [n for n in names if "layers.2" in n]
    assert ours(pixels(1)).shape == (1, P + 1, 32) and ours.num_tokens == P + 1


def test_vision_of_a_whole_clip(tmp_path: Path) -> None:
    config = CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config=tiny.vision_config().to_dict(),
    )
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    ours = VisionBackbone.from_folder(tmp_path, -2, "patch")
    with torch.no_grad():
        states = whole.vision_model(pixels(1), output_hidden_states=True).hidden_states
        torch.testing.assert_close(ours(pixels(1)), states[-2][:, 1:], atol=1e-5, rtol=0)


def test_vision_errors_name_the_way_out(folders: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(PumiceError, match=r"vision_layer is -9, .* has 4 blocks; allowed: 1 to 4"):
        VisionBackbone.from_folder(folders.vision, -9, "patch")
    with pytest.raises(PumiceError, match="allowed: patch"):
        VisionBackbone.from_folder(folders.vision, -1, "all")  # type: ignore[arg-type]
    with pytest.raises(PumiceError, match="a siglip_vision_model has none"):
        VisionBackbone(tiny.vision_config("siglip_vision_model"), -1, "cls_patch")
    with pytest.raises(PumiceError, match="no such directory"):
        VisionBackbone.from_folder(tmp_path / "nowhere", -1, "patch")
    with pytest.raises(PumiceError, match="cannot be a vision backbone"):
        VisionBackbone.from_folder(folders.language, -1, "patch")


def test_vision_weights_are_strict(folders: SimpleNamespace, tmp_path: Path) -> None:
    state = load_file(folders.vision / "model.safetensors")
    config = (folders.vision / "config.json").read_text()
    name = next(n for n in state if n.endswith("layers.0.mlp.fc1.weight"))
    for broken, complaint in (
        ({k: v for k, v in state.items() if k != name}, "missing: .*layers.0.mlp.fc1.weight"),
        ({**state, name: state[name][:3].clone()}, r"fc1.weight is \(3, 32\), expected \(64, 32\)"),
    ):
        (tmp_path / "config.json").write_text(config)
        save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PumiceError, match=complaint):
            VisionBackbone.from_folder(tmp_path, -1, "patch")


def test_frozen_vision_keeps_no_graph(lmm: LMM) -> None:
    lmm.vision.requires_grad_(False)
    assert not lmm.vision(pixels(1)).requires_grad
    assert lmm.encode_images(pixels(1)).requires_grad
    lmm.vision.requires_grad_(True)
    assert lmm.vision(pixels(1)).requires_grad


def test_image_stats(tmp_path: Path, folders: SimpleNamespace) -> None:
    assert read_image_stats(folders.vision)[:2] == (tiny.IMAGE_SIZE, CLIP_MEAN)
    stats = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 96}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stats))
    assert read_image_stats(tmp_path) == (96, (0.5,) * 3, (0.25,) * 3)
