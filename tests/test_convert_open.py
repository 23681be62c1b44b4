"""Other projects' checkpoints opened here answer as transformers' own classes do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import hf_folders
import pumice
import tiny
from pumice.convert.open import open_model, open_parts
from pumice.convert.parity import LMMSpeaker, Measured, compare, make_probes, measure, probe_image
from pumice.convert.parity_hf import TransformersSpeaker
from pumice.core.errors import PumiceError
from pumice.core.types import user
from pumice.models.constants import IMAGE_ID


def ours(folder: Path, **options: Any) -> tuple[list[Measured], Any]:
    lmm, processor = open_model(folder, **options)
    return measure(LMMSpeaker(lmm), make_probes(processor)), processor


def theirs(folder: Path, processor: Any) -> list[Measured]:
    speaker = TransformersSpeaker(folder, processor, torch.float32)
    return measure(speaker, make_probes(processor))


def assert_same(one: list[Measured], two: list[Measured]) -> None:
    found = compare(one, two, torch.float32)
    assert found["ok"], found
    assert [row["probe"] for row in found["probes"]] == ["text", "image", "two turns"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hf") / "model"
    return folder, hf_folders.llava(folder)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_transformers_llava(tmp_path: Path, text: str, vision: str) -> None:
    hf_folders.llava(tmp_path, text, vision)
    answers, processor = ours(tmp_path)
    assert_same(theirs(tmp_path, processor), answers)


def test_tied_embeddings(tmp_path: Path) -> None:
    hf_folders.llava(tmp_path, "qwen2", tied=True)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    answers, processor = ours(tmp_path)
    assert_same(theirs(tmp_path, processor), answers)


def test_class_token_kept(tmp_path: Path) -> None:
    hf_folders.llava(tmp_path, strategy="full")
    answers, processor = ours(tmp_path)
    assert processor.image_tokens == tiny.NUM_PATCHES + 1 and processor.view_side is None
    assert_same(theirs(tmp_path, processor), answers)


def test_a_patch_is_not_dropped_for_a_class_token(tmp_path: Path) -> None:
    hf_folders.llava(tmp_path, vision="siglip", strategy="default")
    with pytest.raises(PumiceError, match=r"'default' with a siglip.*Use 'full'"):
        open_model(tmp_path)


@pytest.mark.parametrize("pairs", [hf_folders.TO_PUBLISHED, hf_folders.TO_MEMORY])
def test_every_layout_gives_the_same(hf: Any, tmp_path: Path, pairs: Any) -> None:
    folder = shutil.copytree(hf[0], tmp_path / "copy")
    hf_folders.rename(folder, *pairs)
    answers, processor = ours(folder)
    before, _ = ours(hf[0])
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(answers, before, strict=True))
    assert_same(theirs(folder, processor), answers)


def test_shards_and_their_index(hf: Any, tmp_path: Path) -> None:
    hf[1].save_pretrained(tmp_path, max_shard_size="60KB")
    for path in hf[0].iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    answers, _ = ours(tmp_path)
    before, _ = ours(hf[0])
    for a, b in zip(answers, before, strict=True):
        assert a.tokens == b.tokens


def test_processor_reads_as_theirs(hf: Any) -> None:
    folder, model = hf
    _, processor = open_model(folder)
    assert (processor.template.name, processor.system) == ("vicuna_v1", "")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat"}]}]
    reader = AutoProcessor.from_pretrained(folder, backend="pil")
    text = reader.apply_chat_template(chat, add_generation_prompt=True)
    batch = reader(text=text, images=probe_image(), return_tensors="pt")
    encoded = processor.encode_prompt([user("the cat", probe_image())])
    image_id = model.config.image_token_id
    mine = [image_id if i == IMAGE_ID else i for i in encoded.input_ids]
    # Their chat template has a line break and a space of its own; the tokens between agree.
    assert batch["input_ids"][0].tolist().count(image_id) == mine.count(image_id) == 16
    assert torch.allclose(batch["pixel_values"], encoded.pixel_values, atol=1e-5)


def test_padding_processor_is_recognised(hf: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(hf[0], tmp_path / "copy")
    more = {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    hf_folders.write_preprocessor(folder, **more)
    _, processor = open_model(folder)
    assert processor.image_spec.mode == "pad"
    reader = AutoProcessor.from_pretrained(folder, backend="pil").image_processor
    pixels = reader(probe_image(), return_tensors="pt")["pixel_values"]
    mine = processor.encode_prompt([user("the cat", probe_image())]).pixel_values
    assert torch.allclose(pixels, mine, atol=1e-5)


def test_names_of_directories_mean_nothing(hf: Any, tmp_path: Path) -> None:
    before, _ = ours(hf[0])
    for name in ("mm_projector-lora-mpt", "pumice", "instructblip-flan-t5.gguf"):
        folder = shutil.copytree(hf[0], tmp_path / name)
        answers, _ = ours(folder)
        assert all(a.tokens == b.tokens for a, b in zip(answers, before, strict=True))


def test_load_answers(hf: Any) -> None:
    model = pumice.load(hf[0])
    result = model.ask("what is the cat", images=[probe_image()], max_new_tokens=4)
    assert result.image_tokens == tiny.NUM_PATCHES and result.new_tokens > 0
    assert model.logits("the cat").shape[1] == 448


def test_weights_stay_mapped_and_in_their_type(hf: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(hf[0], tmp_path / "half")
    state = load_file(folder / "model.safetensors")
    half = {n: t.to(torch.bfloat16) for n, t in state.items()}
    save_file(half, folder / "model.safetensors")
    lmm, _ = open_model(folder)
    assert {p.dtype for p in lmm.parameters()} == {torch.bfloat16}
    # The tables that no file holds are as exact as transformers keeps them.
    assert lmm.language.model.model.rotary_emb.inv_freq.dtype == torch.float32
    opened = open_parts(folder)
    name = "language.model.model.embed_tokens.weight"
    assert opened.tensors[name].data_ptr() == opened.tensors[name].data_ptr()


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"vision_feature_layer": [-2, -1]}, "several layers at once"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"multimodal_projector_bias": False}, "connector without biases"),
    ],
)
def test_other_designs_are_refused(hf: Any, tmp_path: Path, values: Any, told: str) -> None:
    folder = shutil.copytree(hf[0], tmp_path / "copy")
    change(folder, **values)
    with pytest.raises(PumiceError, match=told):
        open_model(folder)


def test_unknown_directories_are_told_what_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(PumiceError, match=r"found: notes\.txt.*LLaVA-1\.5.*original LLaVA"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(PumiceError, match="model_type 'blip-2'"):
        open_model(tmp_path)
    with pytest.raises(PumiceError, match="there is no directory"):
        open_parts(tmp_path / "nowhere")
