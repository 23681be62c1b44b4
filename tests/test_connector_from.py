"""`connector_from`: a new model whose connector starts from released weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import tiny
from pumice.cli.run import check_choices
from pumice.cli.stages import connector_source, stage_specs
from pumice.convert.connector_weights import load_connector
from pumice.core.errors import PumiceError
from pumice.models.checkpoint import load_lmm
from pumice.models.lmm import LMM
from pumice.models.tiling import TilingSpec
from pumice.processing.processor import Processor
from pumice.recipe.load import load_recipe
from pumice.train import build, stages
from pumice.train.fingerprint import spec_fingerprint
from pumice.train.stages import DataSpec, StageSpec, run_stage
from pumice.world.datasets import make_world

QFORMER = {"queries": 5, "width": 16, "depth": 3, "heads": 2, "hidden": 24, "vocab_size": 11}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("connector_from")
    make_world(folder / "world", images=8, eval_images=2)
    tiny.vision_folder(folder / "vision")
    tiny.language_folder(folder / "language")
    save_instructblip(folder / "instructblip")
    return folder


def save_instructblip(folder: Path) -> None:
    torch.manual_seed(3)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    qformer = {
        "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 512,
    }  # fmt: skip
    text = tiny.language_config(400, tied=False).to_dict()
    config = InstructBlipConfig(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=5
    )
    model = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate("[PAD] [UNK] what is the".split())}
    bert = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece(words, unk_token="[UNK]")), unk_token="[UNK]"
    )
    bert.save_pretrained(folder / "qformer_tokenizer")


def spec_of(folder: Path, **changes: Any) -> StageSpec:
    world = folder / "world"
    spec = StageSpec(
        name="align",
        vision=(folder / "vision",),
        vision_layer=-2,
        vision_select="patch",
        connector="mlp2x_gelu",
        language=folder / "language",
        init=None,
        image_mode="pad",
        template="plain",
        system=None,
        final_template="vicuna_v1",
        final_system="",
        train={"connector": 1e-6},
        data=(DataSpec(path=world / "llava" / "pretrain.json", images=world / "images"),),
        steps=1,
        epochs=None,
        batch_size=2,
    )
    return dataclasses.replace(spec, **changes)


def qformer_spec(folder: Path) -> StageSpec:
    return spec_of(
        folder,
        vision=(folder / "instructblip",), vision_layer=-1, vision_select="cls_patch",
        vision_norm=True, connector="qformer", connector_options=QFORMER,
        connector_from=folder / "instructblip", image_mode="resize",
    )  # fmt: skip


def test_the_vision_half_and_the_qformer_of_an_instructblip(folder: Path, tmp_path: Path) -> None:
    spec = qformer_spec(folder)
    build.check_model(spec)
    result = run_stage(spec, tmp_path)
    lmm, processor = load_lmm(result.checkpoint), Processor.load(result.checkpoint)
    theirs = InstructBlipForConditionalGeneration.from_pretrained(folder / "instructblip")
    own, state = lmm.connector.state_dict(), theirs.state_dict()
    kept = [name for name in own if not name.startswith("language_projection.")]
    assert len(kept) > 40
    for name in kept:
        # The stage has learnt a little since.
        torch.testing.assert_close(own[name], state[name], atol=1e-5, rtol=0)
    # The released Q-Former reads the question in its own words, not in the language model's.
    assert isinstance(processor.instruction, PreTrainedTokenizerFast)
    assert len(processor.instruction) == 5
    # The projection is new, and begins at the scale of the language model's embeddings.
    assert not torch.equal(own["language_projection.weight"], state["language_projection.weight"])


def test_only_a_new_projection_is_scaled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matched: list[str] = []
    monkeypatch.setattr(stages, "match_connector_scale", lambda lmm, _: matched.append("yes"))
    run_stage(qformer_spec(folder), tmp_path / "qformer")
    assert matched == ["yes"]
    source = run_stage(spec_of(folder), tmp_path / "mlp").checkpoint
    assert matched == ["yes"] * 2
    run_stage(spec_of(folder, connector_from=source), tmp_path / "again")
    assert matched == ["yes"] * 2


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return run_stage(spec_of(folder, train={"connector": 0.1}), folder / "trained").checkpoint


def new_model(folder: Path, **settings: Any) -> LMM:
    torch.manual_seed(9)
    connector = settings.pop("connector", "mlp2x_gelu")
    return LMM.from_backbones(
        folder / "vision", folder / "language", connector, -2, "patch", **settings
    )


def equal_connectors(lmm: LMM, checkpoint: Path) -> bool:
    own, theirs = lmm.connector.state_dict(), load_lmm(checkpoint).connector.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[n], theirs[n]) for n in own)


def test_a_checkpoint_and_a_projector_file(folder: Path, trained: Path, tmp_path: Path) -> None:
    state = load_lmm(trained).connector.state_dict()
    named = {f"model.mm_projector.{name}": tensor for name, tensor in state.items()}
    torch.save(named, tmp_path / "mm_projector.bin")
    ours = {f"connector.{name}": tensor for name, tensor in state.items()}
    save_file(ours, tmp_path / "ours.safetensors")
    sources = (trained, tmp_path / "mm_projector.bin", tmp_path, tmp_path / "ours.safetensors")
    for source in sources:
        lmm = new_model(folder)
        assert not equal_connectors(lmm, trained)
        assert load_connector(lmm, source)
        assert equal_connectors(lmm, trained), source


def test_a_connector_learnt_on_single_views_serves_tiles(folder: Path, trained: Path) -> None:
    """What the HD paper does: the row ends alone are new."""
    lmm = new_model(folder, tiling=TilingSpec("hd", tiny.IMAGE_SIZE))
    assert lmm.row_end is not None
    before = lmm.row_end.detach().clone()
    assert load_connector(lmm, trained)
    assert equal_connectors(lmm, trained) and torch.equal(lmm.row_end, before)


def test_gated_layers_come_along(folder: Path, tmp_path: Path) -> None:
    options = {"queries": 3, "depth": 1, "heads": 2, "head_width": 8, "every": 1}
    gated = {"connector": "gated_cross_attention", "connector_options": options}
    source = run_stage(spec_of(folder, **gated, train={"connector": 0.1}), tmp_path).checkpoint
    lmm = new_model(folder, connector="gated_cross_attention", options=options)
    assert load_connector(lmm, source)
    theirs = load_lmm(source).state_dict()
    filled = [name for name in theirs if name.startswith(("connector.", "cross_attention."))]
    assert any(name.endswith("_gate") for name in filled)
    assert all(torch.equal(lmm.state_dict()[name], theirs[name]) for name in filled)


def test_what_does_not_fit_is_refused_and_nothing_changes(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    lmm = new_model(folder, connector="linear")
    before = lmm.connector.state_dict()["weight"].clone()
    with pytest.raises(
        PumiceError, match=r"does not fit a linear from 32 to 32: connector.bias is missing"
    ):
        load_connector(lmm, trained)
    with pytest.raises(
        PumiceError, match=r"is an InstructBLIP and holds a qformer, but .*'linear'"
    ):
        load_connector(lmm, folder / "instructblip")
    with pytest.raises(PumiceError, match="holds no connector that is known"):
        load_connector(lmm, folder / "vision")
    assert torch.equal(lmm.connector.state_dict()["weight"], before)
    state = load_lmm(trained).connector.state_dict()
    wide = {f"model.mm_projector.{name}": torch.cat([t, t]) for name, t in state.items()}
    torch.save(wide, tmp_path / "mm_projector.bin")
    with pytest.raises(PumiceError, match=r"connector.0.weight is \(64, 32\), needed \(32, 32\)"):
        load_connector(new_model(folder), tmp_path)
    with pytest.raises(PumiceError, match="do not fit this qformer.* checkpoint's own options"):
        options = QFORMER | {"queries": 4}
        build.check_model(dataclasses.replace(qformer_spec(folder), connector_options=options))


def test_the_fingerprint_names_the_weights_and_not_their_place(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    plain = spec_of(folder)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for place, value in (("a", 1.0), ("b", 1.0), ("c.bin", 2.0)):
        file = tmp_path / place if place.endswith("bin") else tmp_path / place / "mm_projector.bin"
        torch.save({"model.mm_projector.0.weight": torch.full((2, 2), value)}, file)
    marks = [
        spec_fingerprint(dataclasses.replace(plain, connector_from=source))
        for source in (None, tmp_path / "a", tmp_path / "b", tmp_path / "c.bin", trained)
    ]
    assert marks[1] == marks[2] and len(set(marks)) == 4
    assert marks[0] == spec_fingerprint(plain)


def test_a_recipe_names_it_for_the_first_stage(folder: Path, trained: Path) -> None:
    changes = [
        f"model.vision={folder / 'vision'}", f"model.language={folder / 'language'}",
        "model.vision_layer=-2", f"model.connector_from={trained}",
    ]  # fmt: skip
    recipe = load_recipe("pocket-quick", changes)
    check_choices(recipe, None)
    first, second = stage_specs(recipe, folder, folder)
    assert (first.connector_from, second.connector_from) == (trained, None)
    assert json.loads(recipe.model_dump_json())["model"]["connector_from"] == str(trained)
    file = trained / "model.safetensors"
    assert connector_source(str(file)) == file
    with pytest.raises(PumiceError, match="does not fit a linear"):
        check_choices(load_recipe("pocket-quick", [*changes, "model.connector=linear"]), None)
    with pytest.raises(PumiceError, match="'nowhere' is unknown"):
        check_choices(load_recipe("pocket-quick", ["model.connector_from=nowhere"]), None)
