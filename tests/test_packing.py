"""Packed rows: as if each conversation were alone, in every family, and the same training."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedTokenizerFast

import tiny
from pumice.core.errors import DataError, PumiceError
from pumice.core.types import ImagePart, Message, Sample, TextPart, assistant, user
from pumice.data.lengths import RowSizes
from pumice.data.mixture import Mixture, Part
from pumice.data.packing import Packing, Size, pack_rows
from pumice.models.config import LMMConfig
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.models.lora import LoraSpec, add_lora
from pumice.models.packed_attention import attend_to_documents
from pumice.models.pretrained import config_to_dict
from pumice.models.tiling import TilingSpec
from pumice.processing.collate import Batch, collate, collate_packed
from pumice.processing.processor import Processor
from pumice.recipe.schema import Stage
from pumice.train import parallel
from pumice.train.stages import StageSpec, run_stage
from pumice.world.datasets import make_world
from stage_specs import align_spec, tune_spec

# Which rows


def test_every_conversation_has_its_place_within_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(200):
        budget = Packing(tokens=rng.randint(100, 400), tiles=rng.choice([None, 6, 12]))
        sizes = [Size(rng.randint(1, 100), rng.randint(0, 6)) for _ in range(rng.randint(1, 40))]
        multiple = rng.choice([1, 2, 4])
        rows = pack_rows(sizes, budget, multiple)
        assert sorted(place for row in rows for place in row) == list(range(len(sizes)))
        assert len(rows) % multiple == 0
        held = [Size(sum(sizes[p].tokens for p in r), sum(sizes[p].views for p in r)) for r in rows]
        assert all(budget.holds(size) for size in held)
        assert rows == pack_rows(sizes, budget, multiple)


def test_rows_are_few_and_evenly_filled() -> None:
    rng = random.Random(1)
    sizes = [Size(int(rng.gauss(700, 250)) % 2000 + 20, 1) for _ in range(128)]
    rows = pack_rows(sizes, Packing(tokens=4096), multiple=8)
    held = [sum(sizes[place].tokens for place in row) for row in rows]
    total = sum(held)
    # The fewest that 8 processes can share, and none has a tenth more to do than another.
    assert len(rows) == -(-total // (4096 * 8)) * 8
    assert max(held) < 1.1 * min(held)


def test_what_no_row_can_hold_is_refused() -> None:
    with pytest.raises(DataError, match="5 tokens and 9 views.*at most 10 tokens and 8 views"):
        pack_rows([Size(3, 1), Size(5, 9)], Packing(10, 8))


# What a packed row computes

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "attn_logit_softcapping": 2.0},
    "phi3": {},
    "olmo2": {},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32, "dropout": 0.0},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 7},
}
CONNECTORS: dict[str, dict[str, Any]] = {
    "mlp2x_gelu": {},
    "resampler": {"queries": 3, "heads": 2},
    "qformer": {"queries": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0},
    "average2x2+linear": {},
    "gated_cross_attention": {
        "queries": 3, "depth": 1, "heads": 2, "head_width": 8, "every": 1, "cross_heads": 2,
    },
}  # fmt: skip
# Every family once, every connector with and without tiles.
PAIRS = [(family, "mlp2x_gelu", "pad") for family in FAMILIES]
PAIRS += [("llama", connector, view) for connector in CONNECTORS for view in ("pad", "hd")]
PAIRS += [("gemma2", "gated_cross_attention", "hd"), ("opt", "gated_cross_attention", "pad")]
PICTURES = [Image.effect_noise(size, 90).convert("RGB") for size in ((90, 40), (33, 32), (20, 61))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def language_config(family: str, vocab_size: int) -> Any:
    grouped = {"num_key_value_heads": 1, "head_dim": 8}
    if family in ("gpt2", "gpt_neox", "opt", "bloom", "mamba"):
        grouped = {}
    return AutoConfig.for_model(
        family, vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **grouped, **FAMILIES.get(family, {}),
    )  # fmt: skip


def build(
    family: str, connector: str, view: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[LMM, Processor]:
    tiling = TilingSpec("hd", tiny.IMAGE_SIZE, max_tiles=4) if view == "hd" else None
    torch.manual_seed(0)
    lmm = LMM.from_config(
        LMMConfig(
            vision=config_to_dict(tiny.vision_config()),
            vision_layer=-2,
            vision_select="patch",
            connector=connector,
            connector_options=CONNECTORS[connector],
            tiling=tiling.to_dict() if tiling else None,
            language=config_to_dict(language_config(family, len(tokenizer))),
        )
    )
    tiny.spread(lmm)
    for name, parameter in lmm.named_parameters():
        if name.endswith("_gate"):  # open enough for pictures to come in
            torch.nn.init.constant_(parameter, 0.7)
    lmm.vision.requires_grad_(False)
    processor = tiny.processor_for(lmm, Path(tokenizer.name_or_path), tiling=tiling)
    processor.view_side = lmm.view_side
    processor.image_mark = lmm.cross_attention is not None
    processor.instruction = "language" if lmm.connector.wants_instruction else None
    return lmm.eval(), processor


def samples() -> list[Sample]:
    """One picture; none; two pictures; a long text without any, so that windows are left."""
    rows: list[tuple[tuple[Image.Image, ...], str, str]] = [
        ((PICTURES[0],), "What is in the red circle?", "a dog"),
        ((), "Is it a cat?", "no"),
        ((PICTURES[1], PICTURES[2]), "red or blue?", "blue, red, blue, red and blue"),
        ((), "What is it? " * 40, "a cat " * 30),
    ]
    return [
        Sample(
            str(i),
            (
                Message("user", (*map(ImagePart, pictures), TextPart(question))),
                assistant(answer),
            ),
        )
        for i, (pictures, question, answer) in enumerate(rows)
    ]


def loss_and_gradients(lmm: LMM, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    lmm.zero_grad()
    loss, count = lmm.loss(batch)
    assert count == batch.num_supervised
    (loss / count).backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.clone() for n, p in lmm.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(ours[name], gradient, atol=1e-5 * scale, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("family", "connector", "view"), PAIRS)
def test_packed_gradients_are_those_of_padded_rows(
    family: str, connector: str, view: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    lmm, processor = build(family, connector, view, tokenizer)
    encoded = [processor.encode(sample) for sample in samples()]
    # One by one, because OPT takes padding for text when its positions restart.
    rows = [collate([one], processor.pad_id) for one in encoded]
    losses, gradients = zip(*(loss_and_gradients(lmm, row) for row in rows), strict=True)
    counts = [row.num_supervised for row in rows]
    expected: dict[str, torch.Tensor] = {}
    for one, count in zip(gradients, counts, strict=True):
        for name, gradient in one.items():
            expected[name] = expected.get(name, 0) + gradient * count / sum(counts)
    attend_to_documents(lmm.language)
    batch = collate_packed(encoded, processor.pad_id)
    assert batch.input_ids.shape == (1, sum(len(one.input_ids) for one in encoded))
    assert batch.num_supervised == sum(counts)
    loss, found = loss_and_gradients(lmm, batch)
    assert loss == pytest.approx(sum(losses), rel=1e-5)
    # A part no conversation of its own row used has a gradient of zeros in the packed one.
    found = {name: g for name, g in found.items() if name in expected or g.any()}
    assert_close(found, expected)


def test_a_packed_picture_is_not_seen_from_the_next_conversation(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for connector in ("mlp2x_gelu", "gated_cross_attention"):
        lmm, processor = build("llama", connector, "pad", tokenizer)
        attend_to_documents(lmm.language)
        batch = collate_packed([processor.encode(s) for s in samples()], processor.pad_id)
        other = dataclasses.replace(batch, pixel_values=batch.pixel_values.clone())
        other.pixel_values[0] += 1.0
        with torch.no_grad():
            first, second = (
                lmm(b.input_ids, b.position_ids, b.pixel_values, documents=b.documents)[0]
                for b in (batch, other)
            )
        assert batch.documents is not None
        end = batch.documents[0]
        assert not torch.equal(first[:end], second[:end])
        assert torch.equal(first[end:], second[end:])


def test_gated_layers_learn_the_same_where_the_loss_is_computed_in_pieces(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lmm, processor = build("llama", "gated_cross_attention", "pad", tokenizer)
    batch = collate([processor.encode(sample) for sample in samples()], processor.pad_id)
    whole, expected = loss_and_gradients(lmm, batch)
    monkeypatch.setattr("pumice.models.language.WHOLE", 0)
    pieces, found = loss_and_gradients(lmm, batch)
    assert lmm.language.plain_head
    assert pieces == pytest.approx(whole, rel=1e-6)
    assert_close(found, expected)


def test_adapters_learn_the_same_from_packed_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    lmm, processor = build("llama", "mlp2x_gelu", "pad", tokenizer)
    add_lora(lmm.language, LoraSpec(r=2, alpha=4.0, dropout=0.0))
    encoded = [processor.encode(sample) for sample in samples()]
    _, padded = loss_and_gradients(lmm, collate(encoded, processor.pad_id))
    attend_to_documents(lmm.language)
    _, packed = loss_and_gradients(lmm, collate_packed(encoded, processor.pad_id))
    assert_close(packed, padded)


def test_recomputed_blocks_attend_to_their_documents_as_well(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    lmm, processor = build("llama", "gated_cross_attention", "pad", tokenizer)
    attend_to_documents(lmm.language)
    batch = collate_packed([processor.encode(s) for s in samples()], processor.pad_id)
    _, kept = loss_and_gradients(lmm, batch)
    lmm.language.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    lmm.language.train()
    _, recomputed = loss_and_gradients(lmm, batch)
    assert_close(recomputed, kept)


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_a_decoder_that_mixes_documents_is_refused(family: str) -> None:
    torch.manual_seed(0)
    language = LanguageModel.from_config(language_config(family, 60)).train()
    tiny.spread(language)
    with pytest.raises(PumiceError, match=rf"(?i)packing cannot be used with {family}ForCausalLM"):
        attend_to_documents(language)
    assert all(module.training for module in language.modules())


def test_rows_are_one_document_where_none_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    lmm, processor = build("llama", "mlp2x_gelu", "pad", tokenizer)
    batch = collate([processor.encode(s) for s in samples()], processor.pad_id)
    with torch.no_grad():
        before = lmm.loss(batch)[0]
        attend_to_documents(lmm.language)
        torch.testing.assert_close(lmm.loss(batch)[0], before, atol=1e-3, rtol=1e-5)


# Lengths


class Rows:
    """A source of these samples."""

    name = "rows"

    def __init__(self, rows: list[Sample]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        return self.rows[row]

    def size(self, row: int) -> tuple[int, int]:
        return 0, 0

    def fingerprint(self) -> str:
        return "rows"


@pytest.mark.parametrize("view", ["pad", "hd"])
def test_lengths_are_measured_without_pixels_and_kept(
    view: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    lmm, processor = build("llama", "mlp2x_gelu", view, tokenizer)
    path = tmp_path / "wide.png"
    PICTURES[0].save(path)
    mixture = Mixture([Part(Rows([*samples(), Sample("f", (user("?", path), assistant("a")))]))], 0)
    encoded = [processor.encode(mixture.parts[0].source[row]) for row in range(5)]
    sizes = RowSizes(mixture, processor)
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "load_image", None)
        measured = [sizes((0, row)) for row in range(5)]
    assert measured == [Size(len(one.input_ids), len(one.pixel_values)) for one in encoded]
    sizes.keep()
    again = RowSizes(mixture, processor)
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "encode", None)
        assert [again((0, row)) for row in range(5)] == measured
    # Another template reads other lengths.
    other = RowSizes(mixture, processor.with_template("plain"))
    assert not other._tables[0].any()
    if view == "hd":
        PICTURES[2].resize((200, 200)).save(path)
        with pytest.raises(DataError, match="one of its images changed.*give the same command"):
            again.check((0, 4), processor.encode(mixture.parts[0].source[4]))
        assert not RowSizes(mixture, processor)._tables[0].any()


# Training


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, images=24, eval_images=4)
    return folder


@pytest.fixture(scope="module")
def tune(world: Path, tmp_path_factory: pytest.TempPathFactory) -> StageSpec:
    folder = tmp_path_factory.mktemp("backbones")
    vision, language = tiny.vision_folder(folder / "v"), tiny.language_folder(folder / "l")
    align = run_stage(align_spec(vision, language, world, steps=2), folder / "run").checkpoint
    return tune_spec(align_spec(vision, language, world), world, align, steps=4, warmup=0.0)


def trained(spec: StageSpec, out: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    checkpoint = run_stage(spec, out).checkpoint
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], load_file(checkpoint / "model.safetensors")


def test_a_step_is_the_same_in_whatever_pieces_it_is_computed(
    tune: StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "mixed_precision_pays", lambda: False)
    losses, weights = trained(tune, tmp_path / "1x4")
    pieces: dict[str, dict[str, Any]] = {
        "2x2": {"micro_batch_size": 2},
        "4x1": {"micro_batch_size": 1},
        "packed": {"packing": Packing(4096)},
        "packed in several": {"packing": Packing(512, tiles=2)},
    }
    for name, change in pieces.items():
        found, moved = trained(dataclasses.replace(tune, **change), tmp_path / name)
        assert found == pytest.approx(losses, abs=1e-5, rel=1e-6), name
        for key, tensor in weights.items():
            torch.testing.assert_close(
                moved[key], tensor, atol=2e-5, rtol=1e-4, msg=f"{name} {key}"
            )


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_step(
    micro: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Conversations of very different numbers of learnt tokens weigh as in one batch."""
    lmm, processor = build("llama", "mlp2x_gelu", "pad", tokenizer)
    encoded = [processor.encode(sample) for sample in samples()]
    whole = collate(encoded, processor.pad_id)
    _, expected = loss_and_gradients(lmm, whole)
    lmm.zero_grad()
    for start in range(0, 4, micro):
        loss, _ = lmm.loss(collate(encoded[start : start + micro], processor.pad_id))
        (loss / whole.num_supervised).backward()  # type: ignore[no-untyped-call]
    for name, gradient in expected.items():
        found = lmm.get_parameter(name).grad
        assert found is not None
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found, gradient, atol=1e-6 * scale, rtol=1e-5)


def test_a_stage_refuses_to_pack_for_a_decoder_that_mixes(tune: StageSpec, tmp_path: Path) -> None:
    folder = tiny.language_folder(tmp_path / "bloom")
    config = language_config("bloom", 450)
    torch.manual_seed(0)
    model = LanguageModel.from_config(config).model
    tiny.spread(model)
    model.save_pretrained(folder)  # type: ignore[operator]
    spec = dataclasses.replace(
        tune, language=folder, init=None, packing=Packing(4096), connector="linear"
    )
    with pytest.raises(PumiceError, match="packing cannot be used with BloomForCausalLM"):
        run_stage(spec, tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"packing": {"tokens": 100}, "max_tokens": 200}, "must hold the longest"),
        ({"packing": {"tokens": 4096}, "micro_batch_size": 2}, "set one of them to null"),
        ({"micro_batch_size": 3}, "a divisor of batch_size"),
    ],
)
def test_recipe_lines_that_contradict_each_other(given: dict[str, Any], expected: str) -> None:
    stage = {
        "train": {"connector": 1e-3}, "data": [{"path": "a.json", "images": "."}],
        "steps": 1, "batch_size": 8,
    }  # fmt: skip
    Stage.model_validate({**stage, "packing": {"tokens": 4096, "tiles": 32}})
    with pytest.raises(ValidationError, match=expected):
        Stage.model_validate({**stage, **given})
