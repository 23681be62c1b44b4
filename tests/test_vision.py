"""The vision backbone: equal to transformers' hidden states, strict about its weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

import tiny
from pumice.core.errors import PumiceError
from pumice.models.lmm import LMM
from pumice.models.vision import CLIP_MEAN, VisionBackbone, read_image_stats
from tiny import pixels

P = tiny.NUM_PATCHES


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


# Backbones whose config the tests build; the two last are halves that AutoModel does not know.
FAMILIES = {
    "clip_vision_model": "post_layernorm",
    "siglip_vision_model": "post_layernorm",
    "dinov2": "layernorm",
    "dinov2_with_registers": "layernorm",
    "dinov3_vit": "norm",
    "vit": "layernorm",
    "aimv2_vision_model": "rms_norm",
    "instructblip_vision_model": "post_layernorm",
    "idefics_vision": "post_layernorm",
}
# Tokens no forward of ours touches: they stand for patches hidden in their own pre-training.
UNUSED = "embeddings.mask_token"


def new_backbone(model_type: str, layer: int, **options: Any) -> VisionBackbone:
    """A backbone of random weights, also where a family starts with zeros."""
    torch.manual_seed(3)
    width = "embed_dim" if model_type == "idefics_vision" else "hidden_size"
    config = AutoConfig.for_model(
        model_type, **{width: 32}, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, image_size=tiny.IMAGE_SIZE, patch_size=tiny.PATCH_SIZE,
    )  # fmt: skip
    backbone = VisionBackbone(config, layer, "patch", **options).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.2)
    return backbone


@pytest.mark.parametrize(("model_type", "norm"), FAMILIES.items())
def test_vision_norm_is_the_final_norm_of_the_used_layer(model_type: str, norm: str) -> None:
    normed = new_backbone(model_type, -2, norm=True)
    plain = new_backbone(model_type, -2)
    missing, extra = plain.load_state_dict(normed.state_dict(), strict=False)
    assert not missing and extra and all(name.startswith(f"model.{norm}.") for name in extra)
    with torch.no_grad():
        wanted = normed.model.get_submodule(norm)(plain(pixels(2)))
        torch.testing.assert_close(normed(pixels(2)), wanted, atol=1e-5, rtol=0)
        assert not torch.allclose(plain(pixels(2)), wanted, atol=1e-2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_reach_every_block_that_is_there(model_type: str) -> None:
    backbone = new_backbone(model_type, 3)
    blocks = [m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList)]
    assert [len(entries) for entries in blocks] == [3]
    backbone(pixels(1)).square().sum().backward()
    unreached = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert not [name for name in unreached if not name.endswith(UNUSED)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_backbones_are_rebuilt_from_their_data(model_type: str) -> None:
    side = None if model_type == "aimv2_vision_model" else 48
    backbone = new_backbone(model_type, -2, norm=True, image_size=side)
    data = json.loads(json.dumps(backbone.config_data))
    again = VisionBackbone.build(data, -2, "patch", True, init=False).eval()
    again.load_state_dict(backbone.state_dict())
    pictures = torch.randn(1, 3, side or 32, side or 32)
    with torch.no_grad():
        assert torch.equal(again(pictures), backbone(pictures))
    assert again.config_data == backbone.config_data
    assert again.num_tokens == (36 if side else 16)


def test_building_leaves_the_random_numbers_to_the_seed() -> None:
    """The look at a family must not shift what a new connector starts with."""
    config = tiny.vision_config("dinov2")
    model = AutoModel.from_config(config)
    before = torch.get_rng_state()
    VisionBackbone(config, -1, "patch", model=model)
    assert torch.equal(torch.get_rng_state(), before)


def test_vision_half_of_an_instructblip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "initializer_range": 0.2,
    }  # fmt: skip
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 99, **small}
    whole = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=vision,
            qformer_config={"encoder_hidden_size": 32, "intermediate_size": 16, **small},
            text_config={"intermediate_size": 32, **text},
        )
    ).eval()
    torch.nn.init.normal_(whole.vision_model.post_layernorm.weight)
    whole.save_pretrained(tmp_path)
    ours = VisionBackbone.from_folder(tmp_path, -1, "cls_patch", norm=True).eval()
    with torch.no_grad():
        wanted = whole.vision_model(pixels(2)).last_hidden_state
        torch.testing.assert_close(ours(pixels(2)), wanted, atol=1e-5, rtol=0)
    assert any("qkv.bias" in name for name in ours.state_dict())


def test_vision_half_of_an_idefics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {
        "embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    whole = IdeficsForVisionText2Text(
        IdeficsConfig(
            vision_config=vision, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, vocab_size=99, use_resampler=False,
        )
    ).eval()  # fmt: skip
    whole.save_pretrained(tmp_path)
    ours = VisionBackbone.from_folder(tmp_path, -1, "cls_patch").eval()
    with torch.no_grad():
        wanted = whole.model.vision_model(pixel_values=pixels(2)).last_hidden_state
        torch.testing.assert_close(ours(pixels(2)), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_pictures_of_another_side(tmp_path: Path, model_type: str) -> None:
    """The folder's preprocessing decides; positions are interpolated as transformers does."""
    folder = tiny.vision_folder(tmp_path, model_type)
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 48}}))
    ours = VisionBackbone.from_folder(folder, -1, "patch").eval()
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    options = {} if model_type == "dinov2" else {"interpolate_pos_encoding": True}
    pictures = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        states = theirs(pictures, output_hidden_states=True, **options).hidden_states
        features = ours(pictures)
    assert (ours.image_size, ours.num_tokens) == (48, 36)
    wanted = states[-1][:, ours.num_prefix_tokens :]
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=0)


def test_a_side_a_family_cannot_read_is_refused() -> None:
    with pytest.raises(PumiceError, match=r"32 pixels \(16 patches\).* of 48 \(36 patches\)"):
        new_backbone("aimv2_vision_model", -1, image_size=48)
