"""The architecture: parity with transformers, and the invariances of checkpoints and fusion."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import tiny
from pumice.core.errors import PumiceError
from pumice.models import language
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.config import LMMConfig
from pumice.models.connectors import CONNECTORS, build_connector
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.fusion import fuse
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.models.vision import CLIP_MEAN, VisionBackbone, read_image_stats

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


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=generator)


def with_images(rows: list[list[int]]) -> torch.Tensor:
    """Ids in which -1 stands for one image."""
    return torch.tensor(
        [[t for i in row for t in ([IMAGE_ID] * P if i < 0 else [i])] for row in rows]
    )


# vision


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


# language


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("gathers", [True, False])
def test_keep_selects_before_the_head(
    model_type: str, gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Older releases of transformers cannot gather before the head; the answer must be the same.
    monkeypatch.setattr(language, "_GATHERS_BEFORE_HEAD", gathers)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    ours = LanguageModel.from_config(config).eval()
    embeds = torch.randn(2, 7, ours.hidden_size)
    keep = torch.rand(2, 7) < 0.5
    with torch.no_grad():
        every = ours.model(inputs_embeds=embeds, use_cache=False).logits
        torch.testing.assert_close(ours(embeds), every)
        torch.testing.assert_close(ours(embeds, keep=keep), every[keep], atol=1e-6, rtol=0)


def test_packed_documents_stay_apart(folders: SimpleNamespace) -> None:
    model = LanguageModel.from_folder(folders.language).eval()
    a, b = torch.randn(1, 6, 32), torch.randn(1, 4, 32)
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    with torch.no_grad():
        packed = model(torch.cat([a, b], 1), position_ids=places)
        torch.testing.assert_close(packed[:, :6], model(a), atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[:, 6:], model(b), atol=1e-5, rtol=0)


# connectors and fusion


@pytest.mark.parametrize("name", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_connectors_have_llavas_keys(name: str) -> None:
    connector = build_connector(name, 8, 12, 5)
    keys = [k for k in connector.state_dict() if k.endswith("weight")]
    assert (
        keys
        == {
            "linear": ["weight"],
            "mlp1x_gelu": ["0.weight"],
            "mlp2x_gelu": ["0.weight", "2.weight"],
            "mlp3x_gelu": ["0.weight", "2.weight", "4.weight"],
        }[name]
    )
    assert connector.num_tokens == 5
    assert connector(torch.randn(2, 5, 8)).shape == (2, 5, 12)


def test_mlp2x_gelu_is_llavas() -> None:
    ours = build_connector("mlp2x_gelu", 8, 12, 5)
    reference = nn.Sequential(nn.Linear(8, 12), nn.GELU(approximate="none"), nn.Linear(12, 12))
    reference.load_state_dict(ours.state_dict())
    x = 3 * torch.randn(2, 5, 8)
    assert torch.equal(ours(x), reference(x))


@pytest.mark.parametrize("name", ["mlpx_gelu", "mlp0x_gelu", "mlpNx_gelu", "qq"])
def test_unknown_connector(name: str) -> None:
    with pytest.raises(PumiceError, match=r"is unknown; known: linear, mlpNx_gelu") as caught:
        build_connector(name, 8, 12, 5)
    assert ("Did you mean 'mlp2x_gelu'" in str(caught.value)) == name.startswith("mlp")
    assert CONNECTORS.names() == ("linear", "mlpNx_gelu")


def test_fuse_fills_in_reading_order() -> None:
    text = torch.zeros(2, 4, 3)
    is_image = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool()
    features = torch.arange(12.0).view(2, 2, 3)
    fused = fuse(text, is_image, features)
    assert torch.equal(fused[0, 1:3], features[0]) and torch.equal(fused[1, :2], features[1])
    assert not fused[~is_image].any() and not text.any()


@pytest.mark.parametrize(("images", "message"), [(1, "1 images give 2"), (3, "3 images give 6")])
def test_fuse_mismatch_names_both_numbers(images: int, message: str) -> None:
    is_image = torch.tensor([[1, 1, 1, 1]]).bool()
    with pytest.raises(PumiceError, match=f"4 image placeholders, but {message}"):
        fuse(torch.zeros(1, 4, 3), is_image, torch.zeros(images, 2, 3))
    with pytest.raises(PumiceError, match="0 images give 0"):
        fuse(torch.zeros(1, 4, 3), is_image, None)


# the whole model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_llava(folders: SimpleNamespace, attention: str) -> None:
    torch.manual_seed(0)
    lmm = LMM.from_backbones(
        folders.vision, folders.language, "mlp2x_gelu", -2, "patch", attention=attention
    ).eval()
    text = lmm.language.config.to_dict()
    image_id = text["vocab_size"]
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tiny.vision_config().to_dict(),
            text_config={**text, "vocab_size": image_id + 1, "tie_word_embeddings": False},
            image_token_index=image_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
            image_seq_length=P,
        )
    ).eval()
    vision = AutoModel.from_pretrained(folders.vision)
    language = AutoModelForCausalLM.from_pretrained(folders.language)
    llava.model.vision_tower.load_state_dict(vision.state_dict())
    state = lmm.connector.state_dict()
    projector = llava.model.multi_modal_projector
    projector.linear_1.load_state_dict({k: state[f"0.{k}"] for k in ("weight", "bias")})
    projector.linear_2.load_state_dict({k: state[f"2.{k}"] for k in ("weight", "bias")})
    body = language.model.state_dict()
    body["embed_tokens.weight"] = nn.functional.pad(body["embed_tokens.weight"], (0, 0, 0, 1))
    llava.model.language_model.load_state_dict(body)
    llava.lm_head.weight.data = nn.functional.pad(language.lm_head.weight.data, (0, 0, 0, 1))

    ids = with_images([[1, 270, -1, 290, 300], [1, 271, -1, 291, 301]])
    with torch.no_grad():
        theirs = llava(
            input_ids=ids.masked_fill(ids == IMAGE_ID, image_id), pixel_values=pixels(2)
        ).logits
        ours = lmm(ids, pixel_values=pixels(2))
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs[..., :image_id], atol=1e-5, rtol=0)


def test_text_only_needs_no_image(lmm: LMM) -> None:
    ids = torch.tensor([[1, 270, 280]])
    with torch.no_grad():
        alone = lmm(ids)
        beside = lmm(ids, pixel_values=pixels(0))
    assert alone.shape == (1, 3, lmm.language.vocab_size) and torch.equal(alone, beside)


def test_features_replace_pixels(lmm: LMM) -> None:
    ids = with_images([[1, 270, -1, 290]])
    with torch.no_grad():
        features = lmm.encode_images(pixels(1))
        assert features.shape == (1, lmm.image_tokens, 32)
        assert torch.equal(lmm(ids, features=features), lmm(ids, pixel_values=pixels(1)))
        assert not torch.equal(lmm(ids, features=features), lmm(ids, pixel_values=pixels(1, 9)))


def batch_of(ids: torch.Tensor, labels: torch.Tensor, images: int) -> SimpleNamespace:
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    return SimpleNamespace(
        input_ids=ids, labels=labels, position_ids=places, pixel_values=pixels(images)
    )


def test_loss_is_the_shifted_sum(lmm: LMM) -> None:
    ids = with_images([[1, 270, -1, 290, 300, 2], [1, 271, -1, 291, 301, 2]])
    labels = torch.full_like(ids, IGNORE)
    labels[:, -3:] = ids[:, -3:]
    labels[1, -3] = IGNORE
    total, number = lmm.loss(batch_of(ids, labels, 2))
    logits = lmm(ids, pixel_values=pixels(2))
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert number == 5
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)


def test_padding_changes_no_loss_and_no_gradient(lmm: LMM) -> None:
    ids = with_images([[1, 270, -1, 290, 300, 2]])
    labels = ids.masked_fill(ids == IMAGE_ID, IGNORE)
    total, number = lmm.loss(batch_of(ids, labels, 1))
    total.backward()
    gradient = lmm.connector[0].weight.grad.clone()  # type: ignore[index]
    lmm.zero_grad()
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = batch_of(torch.cat([ids, pad], 1), torch.cat([labels, pad + IGNORE], 1), 1)
    padded.position_ids = torch.cat([torch.arange(ids.shape[1]), torch.arange(3)])[None]
    again, same = lmm.loss(padded)
    again.backward()
    assert number == same == 4
    torch.testing.assert_close(total, again, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        gradient,
        lmm.connector[0].weight.grad,
        atol=1e-4,
        rtol=1e-4,  # type: ignore[index]
    )


def test_loss_without_supervision_is_zero(lmm: LMM) -> None:
    ids = torch.tensor([[1, 270, 280]])
    total, number = lmm.loss(batch_of(ids, torch.full_like(ids, IGNORE), 0))
    total.backward()
    assert total.item() == 0 and number == 0


def test_match_connector_scale(lmm: LMM) -> None:
    factor = lmm.match_connector_scale(pixels(4))
    norm = lmm.encode_images(pixels(4)).norm(dim=-1).mean()
    wanted = lmm.language.token_embeddings.norm(dim=-1).mean()
    assert factor != pytest.approx(1, rel=0.01)
    assert norm.item() == pytest.approx(wanted.item(), rel=1e-4)


# checkpoints


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu"])
def test_saved_equals_loaded(tmp_path: Path, tied: bool, connector: str) -> None:
    vision = tiny.vision_folder(tmp_path / "v", "siglip_vision_model")
    language = tiny.language_folder(tmp_path / "l", tied=tied)
    lmm = LMM.from_backbones(vision, language, connector, -1, "patch").eval()
    place = tmp_path / "bert-base-lora-7b-qwen"
    save_checkpoint(place, lmm, lambda d: (d / "extra.txt").write_text("x"), {"steps": 3})  # type: ignore[arg-type,return-value]
    save_checkpoint(place, lmm, None, {"steps": 4})
    assert sorted(p.name for p in place.iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.json",
    ]
    assert json.loads((place / "training.json").read_text()) == {"steps": 4}
    assert sorted(os.listdir(tmp_path)) == ["bert-base-lora-7b-qwen", "l", "v"]
    assert str(tmp_path) not in (place / "config.json").read_text()
    stored = load_file(place / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"vision", "connector", "language"}
    assert any("lm_head" in name for name in stored) != tied

    loaded = load_lmm(place)
    assert not loaded.training and loaded.config == lmm.config
    for (name, a), (other, b) in zip(
        lmm.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    ids = with_images([[1, 270, -1, 290]])
    with torch.no_grad():
        assert torch.equal(lmm(ids, pixel_values=pixels(1)), loaded(ids, pixel_values=pixels(1)))


def test_half_precision_on_disk_and_in_memory(tmp_path: Path, lmm: LMM) -> None:
    save_checkpoint(tmp_path / "m", lmm, None, {}, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert load_lmm(tmp_path / "m").dtype == torch.float32
    half = load_lmm(tmp_path / "m", dtype=torch.bfloat16)
    ids = with_images([[1, 270, -1, 290]])
    with torch.no_grad():
        assert half(ids, pixel_values=pixels(1)).dtype == torch.bfloat16


def test_misfits_are_told_in_one_message(tmp_path: Path, lmm: LMM) -> None:
    save_checkpoint(tmp_path / "m", lmm, None, {})
    path = tmp_path / "m" / "model.safetensors"
    state = load_file(path)
    del state["connector.0.bias"]
    state["language.extra"] = torch.zeros(2)
    state["connector.2.weight"] = torch.zeros(3, 4)
    save_file(state, path)
    with pytest.raises(PumiceError) as caught:
        load_lmm(tmp_path / "m")
    for told in (
        "missing: connector.0.bias",
        "unexpected: language.extra",
        "connector.2.weight is (3, 4), expected (32, 32)",
    ):
        assert told in str(caught.value)


def test_other_directories_are_refused(tmp_path: Path, folders: SimpleNamespace, lmm: LMM) -> None:
    with pytest.raises(PumiceError, match="no such directory"):
        load_lmm(tmp_path / "nowhere")
    with pytest.raises(PumiceError, match="has no config.json"):
        load_lmm(tmp_path)
    with pytest.raises(PumiceError, match="Hugging Face config of model_type 'llama'"):
        load_lmm(folders.language)
    save_checkpoint(tmp_path / "m", lmm, None, {})
    (tmp_path / "m" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(PumiceError, match="cannot be read"):
        load_lmm(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(PumiceError, match="has no model.safetensors"):
        load_lmm(tmp_path / "m")


def test_config_is_strict(lmm: LMM) -> None:
    data = lmm.config.to_dict()
    assert LMMConfig.from_dict(json.loads(json.dumps(data))) == lmm.config
    with pytest.raises(PumiceError, match="unknown field 'conector'.*Did you mean 'connector'"):
        LMMConfig.from_dict({**data, "conector": "linear"})
    with pytest.raises(PumiceError, match="lacks vision_layer"):
        LMMConfig.from_dict({k: v for k, v in data.items() if k != "vision_layer"})
    with pytest.raises(PumiceError, match="vision_layer is 'x'; a int is needed"):
        LMMConfig.from_dict({**data, "vision_layer": "x"})


def test_failed_save_leaves_the_old_checkpoint(tmp_path: Path, lmm: LMM) -> None:
    def fails(folder: Path) -> None:
        raise RuntimeError("disk full")

    save_checkpoint(tmp_path / "m", lmm, None, {"steps": 1})
    with pytest.raises(RuntimeError, match="disk full"):
        save_checkpoint(tmp_path / "m", lmm, fails, {"steps": 2})
    assert json.loads((tmp_path / "m" / "training.json").read_text()) == {"steps": 1}
    assert os.listdir(tmp_path) == ["m"]
