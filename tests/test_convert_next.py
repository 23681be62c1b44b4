"""LLaVA-NeXT (tiles), InstructBLIP and IDEFICS folders, opened through the table of formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import hf_folders
from pumice.convert.convert import convert
from pumice.convert.open import open_model, open_parts
from pumice.convert.parity import LMMSpeaker, Probe, compare, make_probes, measure
from pumice.convert.parity_hf import TransformersSpeaker
from pumice.core.errors import PumiceError
from pumice.core.types import user
from pumice.models.constants import IMAGE_ID
from test_instructblip import theirs as instructblip  # noqa: F401 - a fixture

PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next")
    made = hf_folders.tokenizer(folder)
    config = LlavaNextConfig(
        text_config=hf_folders.text_config(),
        vision_config=hf_folders.vision_config(),
        image_token_index=made.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config)
    hf_folders.spread(model)
    model.save_pretrained(folder)
    made.chat_template = hf_folders.CHAT
    made.save_pretrained(folder)
    more = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS}
    hf_folders.write_preprocessor(folder, do_pad=True, **more)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["processor_class"] = "LlavaNextProcessor"
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def picture(width: int, height: int) -> PIL.Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_logits_and_tokens_are_those_of_transformers(folder: Path) -> None:
    lmm, processor = open_model(folder)
    assert lmm.tiling is not None and lmm.tiling.pinpoints() == PINPOINTS
    probes = make_probes(processor)
    for size in ((64, 64), (33, 97), (130, 20), (5, 3)):
        probes.append(Probe(str(size), processor.encode_prompt([user("a cat", picture(*size))])))
    two = [user("the cat", picture(90, 41), picture(31, 64))]
    probes.append(Probe("two images", processor.encode_prompt(two)))
    theirs = TransformersSpeaker(folder, processor, torch.float32)
    found = compare(measure(theirs, probes), measure(LMMSpeaker(lmm), probes), torch.float32)
    assert found["ok"], found
    assert len(found["probes"]) == 8


@pytest.mark.parametrize("size", [(170, 100), (20, 130), (64, 64), (300, 7)])
def test_pixels_and_tokens_are_those_of_their_processor(folder: Path, size: Any) -> None:
    _, processor = open_model(folder)
    reader = AutoProcessor.from_pretrained(folder, backend="pil")
    batch = reader(text="USER: <image>\na ASSISTANT:", images=picture(*size), return_tensors="pt")
    encoded = processor.encode_prompt([user("a", picture(*size))])
    image_id = reader.tokenizer.convert_tokens_to_ids("<image>")
    assert batch["input_ids"][0].tolist().count(image_id) == encoded.input_ids.count(IMAGE_ID)
    assert torch.allclose(batch["pixel_values"][0], encoded.pixel_values, atol=1e-5)
    assert batch["image_sizes"].tolist() == [[size[1], size[0]]]


@pytest.mark.parametrize("road", [["hf"], ["pumice", "hf"], ["llava", "hf"]])
def test_round_trips(folder: Path, tmp_path: Path, road: list[str]) -> None:
    here = folder
    for number, to in enumerate(road):
        here, before = tmp_path / str(number), here
        report = convert(before, here, to, template="vicuna_v1")
        assert all(found["ok"] for found in report["parity"].values())
    source, result = open_parts(folder), open_parts(here)
    assert set(source.tensors) == set(result.tensors)
    for name in source.tensors:
        assert torch.equal(source.tensors[name], result.tensors[name]), name
    assert source.config.tiling == result.config.tiling
    config = json.loads((here / "config.json").read_text())
    assert config["model_type"] == "llava_next" and config["image_grid_pinpoints"] == PINPOINTS
    reader = AutoProcessor.from_pretrained(here, backend="pil")
    assert type(reader).__name__ == "LlavaNextProcessor"


def test_names_in_memory_are_known(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    hf_folders.rename(copy, *hf_folders.TO_MEMORY, ("image_newline", "model.image_newline"))
    before, after = open_parts(folder), open_parts(copy)
    assert torch.equal(before.tensors["row_end"], after.tensors["row_end"])


def test_gguf_has_no_tiles(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PumiceError, match="cannot express tiled images"):
        convert(folder, tmp_path / "out", "gguf")


def test_a_missing_newline_is_told(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    hf_folders.rename(copy, ("image_newline", "language_model.model.image_newline"))
    with pytest.raises(PumiceError, match="missing: row_end"):
        open_parts(copy)


def test_instructblip_is_converted_and_proven(
    instructblip: SimpleNamespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    source = shutil.copytree(instructblip.folder, tmp_path / "llava-lora")
    report = convert(source, tmp_path / "out", "pumice")
    assert report["from"] == "InstructBLIP"
    assert report["parity"]["opened again"]["max_logit_difference"] == 0.0
    with pytest.raises(PumiceError, match="cannot express the connector qformer"):
        convert(source, tmp_path / "hf", "hf")
