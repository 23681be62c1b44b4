"""The architecture: parity with transformers, and the invariances of fusion and loss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import tiny
from pumice.core.errors import PumiceError
from pumice.models import language
from pumice.models.connectors import CONNECTORS, build_connector
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.fusion import fuse
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.models.modes import evaluating
from tiny import pixels, with_images

P = tiny.NUM_PATCHES


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
    connector = build_connector(name, 8, 12, 5, vocab_size=9)
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
    ours = build_connector("mlp2x_gelu", 8, 12, 5, vocab_size=9)
    reference = nn.Sequential(nn.Linear(8, 12), nn.GELU(approximate="none"), nn.Linear(12, 12))
    reference.load_state_dict(ours.state_dict())
    x = 3 * torch.randn(2, 5, 8)
    assert torch.equal(ours(x), reference(x))


@pytest.mark.parametrize("name", ["mlpx_gelu", "mlp0x_gelu", "mlpNx_gelu", "qq"])
def test_unknown_connector(name: str) -> None:
    with pytest.raises(PumiceError, match=r"is unknown; known: linear, mlpNx_gelu") as caught:
        build_connector(name, 8, 12, 5, vocab_size=9)
    assert ("Did you mean 'mlp2x_gelu'" in str(caught.value)) == name.startswith("mlp")
    assert CONNECTORS.names()[:2] == ("linear", "mlpNx_gelu")


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


@pytest.mark.parametrize(("attention", "tied"), [("eager", True), ("sdpa", False)])
def test_logits_equal_llava(
    folders: SimpleNamespace, tmp_path: Path, attention: str, tied: bool
) -> None:
    text_folder = tiny.language_folder(tmp_path, tied=tied)
    lmm = tiny.new_lmm(folders.vision, text_folder, attention=attention)
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
    language = AutoModelForCausalLM.from_pretrained(text_folder)
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
        input_ids=ids,
        labels=labels,
        position_ids=places,
        pixel_values=pixels(images),
        image_sizes=[],
        instruction=None,
        documents=None,
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


def test_every_part_has_its_mode_back() -> None:
    # As a stage leaves a model: the whole says one thing, the parts that learn another.
    parts = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    parts.eval()
    parts[1].train()
    before = [part.training for part in parts.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(parts):
        assert not any(part.training for part in parts.modules())
        raise ZeroDivisionError
    assert [part.training for part in parts.modules()] == before and any(before)
