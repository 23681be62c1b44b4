"""haotian-liu/LLaVA's layouts: whole with and without the vision tower, connector, LoRA, 1.6."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

import hf_folders
import tiny
from pumice.convert.open import open_model, open_parts
from pumice.convert.parity import LMMSpeaker, Measured, make_probes, measure
from pumice.core.errors import PumiceError
from pumice.infer.model import load
from pumice.models.tiling import TilingSpec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One model in every layout, its vision backbone and language model in folders of their own."""
    base = tmp_path_factory.mktemp("llava")
    model = hf_folders.llava(base / "hf")
    state = hf_folders.original_state(model)
    vision = hf_folders.clip_folder(base / "clip", model)
    whole = hf_folders.original(base / "whole", model)
    return SimpleNamespace(
        base=base, model=model, state=state, vision=vision, whole=whole, language=language(base)
    )


def language(base: Path) -> Path:
    """A Vicuna: other weights than the LLaVA's, so that a mix-up shows."""
    folder = base / "vicuna"
    tiny.language_folder(folder, vocab_size=448, tied=False, positions=1024)
    return folder


def ask(folder: Path, **options: Any) -> list[Measured]:
    lmm, processor = open_model(folder, template="vicuna_v1", **options)
    return measure(LMMSpeaker(lmm), make_probes(processor))


def same(one: list[Measured], two: list[Measured]) -> bool:
    return all(torch.equal(a.logits, b.logits) for a, b in zip(one, two, strict=True))


def test_whole_with_the_tower_inside(root: SimpleNamespace) -> None:
    lmm, processor = open_model(root.whole, vision=root.vision)
    assert processor.template.name == "vicuna_v1" and processor.system is None
    assert processor.image_spec.mode == "pad" and processor.image_spec.pad_color is None
    reference, _ = open_model(root.base / "hf")
    state = reference.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in lmm.state_dict().items())


def test_pickled_with_rotary_tables_and_without_the_tower(root: Any, tmp_path: Path) -> None:
    folder = hf_folders.original(tmp_path, root.model, tower_inside=False, pickled=True)
    assert same(ask(folder, vision=root.vision), ask(root.whole, vision=root.vision))


def test_the_tower_is_found_beside_the_checkpoint(root: Any, tmp_path: Path) -> None:
    hf_folders.original(tmp_path / "model", root.model, tower_inside=False)
    shutil.copytree(root.vision, tmp_path / "a-clip")
    assert same(ask(tmp_path / "model"), ask(root.whole, vision=root.vision))


def test_a_tower_that_is_nowhere_is_asked_for(root: Any, tmp_path: Path) -> None:
    folder = hf_folders.original(tmp_path, root.model, tower_inside=False)
    with pytest.raises(PumiceError, match=r"'nobody/a-clip'.*--vision DIR.*hf download"):
        open_model(folder)
    with pytest.raises(PumiceError, match="holds no config.json"):
        open_model(folder, vision=tmp_path / "wrong")


def test_the_inner_tower_wins_over_the_folder(root: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(root.vision, tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    save_file({n: t + 1 for n, t in state.items()}, folder / "model.safetensors")
    assert same(ask(root.whole, vision=folder), ask(root.whole, vision=root.vision))
    bare = hf_folders.original(tmp_path / "bare", root.model, tower_inside=False)
    assert not same(ask(bare, vision=folder), ask(root.whole, vision=root.vision))


def test_published_tower_needs_no_folder_when_it_is_inside(root: Any) -> None:
    from pumice.convert.llava_vision import find_tower, known_tower
    from pumice.convert.opened import Facts

    name = "openai/clip-vit-large-patch14-336"
    facts = Facts(Path("x"), frozenset(), {"mm_vision_tower": name})
    inside = [f"vision.model.encoder.layers.{i}.layer_norm1.weight" for i in range(24)]
    tower = find_tower(facts, None, inside)
    assert (tower.config["num_attention_heads"], tower.config["image_size"]) == (16, 336)
    assert known_tower(tower.config) == name
    with pytest.raises(PumiceError, match="23 blocks and calls it openai/clip"):
        find_tower(facts, None, inside[1:])


def test_connector_alone_with_its_base(root: Any, tmp_path: Path) -> None:
    config = hf_folders.original_config(root.model, mm_projector_type="linear")
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight, bias = torch.randn(32, 32), torch.randn(32)
    names = {"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}
    torch.save(names, tmp_path / "mm_projector.bin")
    lmm, processor = open_model(tmp_path, base=root.language, vision=root.vision)
    assert torch.equal(lmm.connector.weight, weight) and torch.equal(lmm.connector.bias, bias)
    base = load_file(root.language / "model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(lmm.language.model.state_dict()[name], tensor)
    assert make_probes(processor)
    with pytest.raises(PumiceError, match="--base DIR"):
        open_model(tmp_path, vision=root.vision)


def lora_folder(root: Any, folder: Path, *, rslora: bool = False) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 on every query and down projection; gives what merged weights are."""
    folder.mkdir(parents=True)
    base = load_file(root.language / "model.safetensors")
    adapter, merged = {}, dict(base)
    scaling = 8 / (4**0.5 if rslora else 4)
    generator = torch.Generator().manual_seed(0)
    for name, weight in base.items():
        if not name.endswith(("q_proj.weight", "down_proj.weight")):
            continue
        a = torch.randn(4, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], 4, generator=generator)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        merged[name] = weight + scaling * (b @ a)
    torch.save(adapter, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": rslora}
    config |= {"base_model_name_or_path": "nobody/vicuna-7b"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    connector = {n: t for n, t in root.state.items() if "mm_projector" in n}
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in connector.items()}
    torch.save(wrapped, folder / "non_lora_trainables.bin")
    llava = hf_folders.original_config(root.model, model_type="llava_llama")
    (folder / "config.json").write_text(json.dumps(llava))
    return merged


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged_into_its_base(root: Any, tmp_path: Path, rslora: bool) -> None:
    merged = lora_folder(root, tmp_path / "lora", rslora=rslora)
    lmm, _ = open_model(tmp_path / "lora", base=root.language, vision=root.vision)
    state = lmm.language.model.state_dict()
    for name, tensor in merged.items():
        assert torch.allclose(state[name], tensor, atol=1e-5), name
    assert torch.equal(lmm.connector[2].weight, root.state["model.mm_projector.2.weight"])
    with pytest.raises(PumiceError, match="'nobody/vicuna-7b'"):
        open_model(tmp_path / "lora", vision=root.vision)


def test_a_kept_lora_answers_as_the_merged_one(root: Any, tmp_path: Path) -> None:
    lora_folder(root, tmp_path / "lora")
    options = {"base": root.language, "vision": root.vision}
    merged = load(tmp_path / "lora", **options)
    kept = load(tmp_path / "lora", adapter="keep", **options)
    state, base = (
        kept.lmm.language.model.state_dict(),
        load_file(root.language / "model.safetensors"),
    )
    assert torch.equal(state["model.layers.0.self_attn.q_proj.base_layer.weight"],
                       base["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
    question = "what is in a?"
    wanted = merged.logits(question)
    plain = load(root.whole, vision=root.vision).logits(question)
    assert (wanted - plain).abs().max() > 0.1
    assert (kept.logits(question) - wanted).abs().max() < 1e-4
    text = [model.ask(question, max_new_tokens=8).text for model in (merged, kept)]
    assert text[0] == text[1]
    with pytest.raises(PumiceError, match="has no adapter to keep"):
        load(root.whole, adapter="keep", vision=root.vision)


def test_lora_on_a_whole_llava(root: Any, tmp_path: Path) -> None:
    lora_folder(root, tmp_path / "lora")
    lmm, _ = open_model(tmp_path / "lora", base=root.whole, vision=root.vision)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(lmm.language.model.state_dict()[name], root.state[name])


def next_model(folder: Path) -> LlavaNextForConditionalGeneration:
    made = hf_folders.tokenizer(folder)
    config = LlavaNextConfig(
        text_config=hf_folders.text_config(),
        vision_config=hf_folders.vision_config(),
        image_token_index=made.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    model = LlavaNextForConditionalGeneration(config)
    hf_folders.spread(model)
    return model.eval()


def test_version_16_has_tiles(root: Any, tmp_path: Path) -> None:
    model = next_model(tmp_path / "tokenizer")
    anyres = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": "[(64, 32), (32, 64), (64, 64)]",
    }
    folder = hf_folders.original(tmp_path / "model", model, **anyres)
    lmm, processor = open_model(folder, vision=root.vision)
    grids = ((2, 1), (1, 2), (2, 2))
    assert lmm.tiling == TilingSpec("next", 32, grids=grids) == processor.image_spec.tiling
    assert lmm.row_end is not None
    assert torch.equal(lmm.row_end, model.state_dict()["model.image_newline"])
    assert len(make_probes(processor)) == 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt'; supported: llava, llava_llama"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_projector_type": "identity"}, "mm_projector_type 'identity'"),
        ({"s2": True}, "several scales"),
        ({"mm_patch_merge_type": "spatial"}, "'pad' with mm_patch_merge_type 'spatial'"),
    ],
)
def test_what_is_not_supported_is_named(root: Any, tmp_path: Path, more: Any, told: str) -> None:
    folder = hf_folders.original(tmp_path, root.model, **more)
    with pytest.raises(PumiceError, match=told):
        open_parts(folder, vision=root.vision)


def test_config_without_weights(root: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_folders.original_config(root.model)))
    with pytest.raises(PumiceError, match=r"no weights: neither .*mm_projector\.bin"):
        open_parts(tmp_path, base=root.language, vision=root.vision)
