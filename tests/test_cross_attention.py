"""Gated cross-attention: what a position sees, any decoder, and the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import tiny
from pumice.core.errors import PumiceError
from pumice.infer.cache import BufferCache
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.connectors import build_connector, connector_cost
from pumice.models.connectors.perceiver import Perceiver
from pumice.models.constants import IMAGE_ID
from pumice.models.cross_attention import (
    CrossAttentionLayers,
    GatedLayer,
    Media,
    build_cross_attention,
    by_row,
    decoder_blocks,
    media_for,
)
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM

DV, WIDTH, VOCAB, Q = 6, 16, 30, 3
FAMILIES = ("llama", "qwen2", "mistral", "phi3", "gemma", "gemma2", "qwen3", "gpt_neox")
SMALL: dict[str, Any] = {"queries": Q, "depth": 2, "heads": 2, "head_width": 4, "every": 2}
each_family = pytest.mark.parametrize("family", FAMILIES)


def language(family: str = "llama", blocks: int = 3) -> LanguageModel:
    torch.manual_seed(0)
    heads = {} if family == "gpt_neox" else {"num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        **heads,
    )
    model = LanguageModel.from_config(config)
    tiny.spread(model)
    return model.eval()


def perceiver(**options: Any) -> Perceiver:
    torch.manual_seed(1)
    connector = build_connector(
        "gated_cross_attention", DV, WIDTH, 16, {**SMALL, **options}, vocab_size=VOCAB
    )
    assert isinstance(connector, Perceiver)
    return connector


def gated(model: LanguageModel, *, opened: bool = True, **options: Any) -> CrossAttentionLayers:
    layers = build_cross_attention(perceiver(**options), model)
    assert layers is not None
    if opened:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layers.eval()


def image(seed: int, latents: int = Q) -> torch.Tensor:
    return torch.randn(latents, DV, generator=torch.Generator().manual_seed(seed))


def ids_of(*rows: list[int]) -> torch.Tensor:
    """Ids in which -1 stands for an image."""
    return torch.tensor([[IMAGE_ID if i < 0 else i for i in row] for row in rows])


def run(
    model: LanguageModel,
    layers: CrossAttentionLayers,
    ids: torch.Tensor,
    media: Media | None,
    **given: Any,
) -> torch.Tensor:
    shown = ids == IMAGE_ID
    embeds = layers.mark(model.embed(ids.masked_fill(shown, 0)), shown)
    with layers.using(media):
        return model(embeds, **given)


TWO_ROWS = ids_of([4, -1, 5, 6, -1, 7, 8], [9, 3, 5, -1, 2, 4, 6])
LATENTS = [[image(0), image(1, 5)], [image(2)]]


# what a position sees


def test_media_of_two_rows() -> None:
    media = media_for(TWO_ROWS, LATENTS)
    assert media is not None
    assert media.seen.tolist() == [[-1, 0, 0, 0, 1, 1, 1], [-1, -1, -1, 0, 0, 0, 0]]
    assert media.owner.tolist() == [[0] * 3 + [1] * 5, [0] * 3 + [-1] * 5]
    assert torch.equal(media.states[0], torch.cat(LATENTS[0]))
    assert torch.equal(media.states[1, :3], LATENTS[1][0]) and not media.states[1, 3:].any()
    assert media.after().seen.tolist() == [[1], [0]]
    assert media.window(2, 5).seen.tolist() == [[0, 0, 1], [-1, 0, 0]]


def test_a_packed_document_does_not_see_the_image_of_the_one_before() -> None:
    ids = ids_of([-1, 4, 5, 6, 7, -1, 8, 9])
    media = media_for(ids, [[image(0), image(1)]], torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]]))
    assert media is not None and media.seen.tolist() == [[0, 0, 0, -1, -1, 1, -1, -1]]


def test_a_batch_without_images_has_no_media() -> None:
    assert media_for(ids_of([1, 2, 3]), [[]]) is None
    assert by_row(ids_of([1, 2, 3]), None) == [[]]


def test_images_of_a_batch_are_dealt_out_in_reading_order() -> None:
    flat = torch.stack([image(i) for i in range(3)])
    rows = by_row(TWO_ROWS, flat)
    assert [len(row) for row in rows] == [2, 1]
    assert torch.equal(torch.stack([*rows[0], *rows[1]]), flat)


def test_counts_that_differ_are_named() -> None:
    with pytest.raises(PumiceError, match="row 1 has 1 image placeholders and 0 images"):
        media_for(TWO_ROWS, [LATENTS[0], []])
    with pytest.raises(PumiceError, match="3 image placeholders and 2 images"):
        by_row(TWO_ROWS, [image(0), image(1)])


# any decoder


@each_family
def test_a_fresh_model_is_its_language_model(family: str) -> None:
    model, bare = language(family), language(family)
    layers = gated(model, opened=False)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert len(layers.layers) == 2
    embeds = torch.randn(2, 7, WIDTH)
    with torch.no_grad(), layers.using(media_for(TWO_ROWS, LATENTS)):
        assert torch.equal(model(embeds), bare(embeds))


@each_family
def test_positions_see_their_image_and_no_other(family: str) -> None:
    model = language(family)
    layers = gated(model)
    other = [[image(0), image(7, 5)], [image(8)]]
    with torch.no_grad():
        logits = run(model, layers, TWO_ROWS, media_for(TWO_ROWS, LATENTS))
        changed = run(model, layers, TWO_ROWS, media_for(TWO_ROWS, other))
        without = run(model, layers, TWO_ROWS, None)
    assert torch.equal(logits[0, :4], changed[0, :4])
    assert torch.equal(logits[1, :3], without[1, :3]) and torch.equal(logits[0, 0], without[0, 0])
    differs = (logits - changed).abs().amax(-1) > 1e-4
    assert differs.tolist() == [[False] * 4 + [True] * 3, [False] * 3 + [True] * 4]


@each_family
def test_batched_is_single_and_cached_is_uncached(family: str) -> None:
    model = language(family)
    layers = gated(model)
    # Rows of unlike length, padded on the left, the last without any image.
    rows = [[4, -1, 5, 6, -1, 7, 8, 2], [3, 5, -1, 2, 4, 6], [7, 9, 2]]
    latents = [LATENTS[0], LATENTS[1], []]
    width, new = 6, 2
    heads = [row[: len(row) - new] for row in rows]
    ids = ids_of(*[[0] * (width - len(row)) + row for row in heads])
    mask = torch.arange(width) >= torch.tensor([[width - len(row)] for row in heads])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache = BufferCache()
    with torch.inference_mode():
        media = media_for(ids, latents)
        assert media is not None
        given = {"attention_mask": mask, "position_ids": positions, "cache": cache}
        logits = [run(model, layers, ids, media, **given)[:, -1]]
        media = media.after()
        for step in range(new):
            mask, positions = torch.nn.functional.pad(mask, (0, 1), value=True), positions + 1
            given = {"attention_mask": mask, "position_ids": positions[:, -1:], "cache": cache}
            token = ids_of(*[row[len(row) - new + step :][:1] for row in rows])
            logits.append(run(model, layers, token, media, **given)[:, -1])
        for i, row in enumerate(rows):
            alone = run(model, layers, ids_of(row), media_for(ids_of(row), [latents[i]]))
            found = torch.stack([step[i] for step in logits])
            torch.testing.assert_close(found, alone[0, -new - 1 :], atol=1e-5, rtol=1e-5)


def test_rows_stand_side_by_side_while_decoding() -> None:
    model = language()
    layers = gated(model)
    rows = [ids_of([4, -1, 5, 6, -1, 7]), ids_of([5, 4, 6]), ids_of([5, 4, -1, 6])]
    latents: list[list[torch.Tensor]] = [LATENTS[0], [], LATENTS[1]]
    tokens = ids_of([5], [6], [7])
    medias = []
    with torch.inference_mode():
        alone = []
        for number, ids in enumerate(rows):
            media = media_for(ids, [latents[number]])
            run(model, layers, ids, media)  # fills the projected keys and values
            medias.append(media and media.after())
            alone.append(run(model, layers, tokens[number : number + 1], medias[-1]))
        together = Media.side_by_side(medias)
        assert together is not None and set(together.projected) == {0, 1}
        assert together.seen.tolist() == [[1], [-1], [0]]
        torch.testing.assert_close(run(model, layers, tokens, together), torch.cat(alone))
    assert Media.side_by_side([None, None]) is None


@each_family
def test_every_weight_gets_a_gradient_also_when_blocks_recompute(family: str) -> None:
    grads, calls = [], []
    for recompute in (False, True):
        model, connector = language(family).train(), perceiver()
        layers = gated(model).train()
        if recompute:
            model.model.activation_checkpointing_enable()  # type: ignore[operator]
        model.requires_grad_(False)
        features = torch.randn(3, 16, DV, generator=torch.Generator().manual_seed(3))
        media = media_for(TWO_ROWS, by_row(TWO_ROWS, connector(features)))
        times: list[int] = []
        layers.layers[0].register_forward_pre_hook(lambda *_, times=times: times.append(1))
        run(model, layers, TWO_ROWS, media).square().sum().backward()
        calls.append(len(times))
        assert all(p.grad is None for p in model.parameters())
        named = [*layers.named_parameters(), *connector.named_parameters()]
        assert [name for name, p in named if p.grad is None or not p.grad.any()] == []
        grads.append([p.grad for _, p in named])
    torch.testing.assert_close(grads[0], grads[1])
    assert calls == [1, 2]


def test_a_copy_has_layers_of_its_own() -> None:
    pair = torch.nn.ModuleList([language(), torch.nn.Identity()])
    pair[1] = gated(pair[0])  # type: ignore[arg-type]
    media = media_for(TWO_ROWS, LATENTS)
    with torch.no_grad():
        before = run(*pair, TWO_ROWS, media)  # type: ignore[call-arg]
        twin = copy.deepcopy(pair)
        for parameter in twin[1].parameters():
            parameter.zero_()
        assert torch.equal(run(*pair, TWO_ROWS, media), before)  # type: ignore[call-arg]
        shut = run(*twin, TWO_ROWS, media)  # type: ignore[call-arg]
    assert not torch.allclose(shut, before)


def test_images_are_gone_when_the_block_ends() -> None:
    model = language()
    layers = gated(model)
    embeds = torch.randn(1, 3, WIDTH)
    with torch.no_grad():
        before = model(embeds)
        ids = ids_of([-1, 2, 3])
        with pytest.raises(ZeroDivisionError), layers.using(media_for(ids, [[image(0)]])):
            assert not torch.allclose(model(embeds), before)
            raise ZeroDivisionError
        assert torch.equal(model(embeds), before)


def test_media_of_another_text_is_refused() -> None:
    model = language()
    layers = gated(model)
    with pytest.raises(PumiceError, match=r"reads \(2, 1\).*laid out for \(2, 7\)"):
        run(model, layers, ids_of([1], [2]), media_for(TWO_ROWS, LATENTS))


def test_heads_must_share_the_width() -> None:
    with pytest.raises(PumiceError, match="has 3 heads.*width is 16"):
        gated(language(), cross_heads=3)
    gated(language(), cross_heads=3, cross_head_width=4)


def test_blocks_that_cannot_be_found_are_refused() -> None:
    model = language()
    model.config.num_hidden_layers = 9
    with pytest.raises(PumiceError, match="no list of 9 blocks"):
        decoder_blocks(model)


def test_other_connectors_need_no_layers() -> None:
    linear = build_connector("linear", DV, WIDTH, 16, vocab_size=VOCAB)
    assert build_cross_attention(linear, language()) is None
    merged = build_connector(
        "shuffle2x2+gated_cross_attention", DV, WIDTH, 16, SMALL, vocab_size=VOCAB
    )
    layers = build_cross_attention(merged, language())
    assert layers is not None
    first = layers.layers[0]
    assert isinstance(first, GatedLayer) and first.key.in_features == 4 * DV


def test_unknown_options_are_refused() -> None:
    with pytest.raises(PumiceError, match="no option 'evry'.*Did you mean 'every'"):
        perceiver(evry=2)
    with pytest.raises(PumiceError, match="'scalar' or 'vector' is needed"):
        perceiver(gate="tensor")


# in the model


@pytest.fixture(scope="module")
def lmm(tmp_path_factory: pytest.TempPathFactory) -> LMM:
    root = tmp_path_factory.mktemp("gated")
    vision, text = tiny.vision_folder(root / "vision"), tiny.language_folder(root / "language")
    torch.manual_seed(0)
    model = LMM.from_backbones(
        vision, text, "gated_cross_attention", -2, "patch", options={**SMALL, "every": 1}
    )
    assert model.cross_attention is not None
    with torch.no_grad():
        for layer in model.cross_attention.layers:
            assert isinstance(layer, GatedLayer)
            layer.attention_gate.fill_(1.0)
            layer.feed_gate.fill_(-0.5)
    return model.eval()


def test_packed_documents_keep_their_images_to_themselves(lmm: LMM) -> None:
    a, b = ids_of([1, 5, -1, 7, 8]), ids_of([1, 9, 6, 4, -1, 3])
    pixels = tiny.pixels(2)
    places = torch.cat([torch.arange(5), torch.arange(6)])[None]
    with torch.no_grad():
        packed = lmm(torch.cat([a, b], 1), position_ids=places, pixel_values=pixels)
        torch.testing.assert_close(packed[:, :5], lmm(a, pixel_values=pixels[:1]))
        torch.testing.assert_close(packed[:, 5:], lmm(b, pixel_values=pixels[1:]))


def test_a_checkpoint_holds_the_gated_layers(lmm: LMM, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "saved", lmm, None, {})
    again = load_lmm(tmp_path / "saved")
    assert [n for n in again.state_dict() if n.startswith("cross_attention.layers.1.")]
    ids, pixels = ids_of([1, 5, -1, 7, 8]), tiny.pixels(1)
    with torch.no_grad():
        assert torch.equal(again(ids, pixel_values=pixels), lmm(ids, pixel_values=pixels))
        assert not torch.allclose(lmm(ids, pixel_values=-pixels), lmm(ids, pixel_values=pixels))


def test_the_cost_is_the_perceivers() -> None:
    connector = perceiver()
    cost = connector_cost(connector)
    assert cost.tokens == Q and cost.flops > 0
    assert cost.params == sum(p.numel() for p in connector.parameters())


def test_perceiver_reads_no_padding() -> None:
    connector = perceiver()
    features = torch.randn(1, 16, DV)
    mask = torch.arange(16)[None] < 9
    other = torch.where(mask[..., None], features, 5.0)
    with torch.no_grad():
        whole, cut = connector(features, mask), connector(features[:, :9])
        torch.testing.assert_close(whole, cut)
        assert torch.equal(whole, connector(other, mask))
        assert not torch.allclose(connector(features), connector(other))
