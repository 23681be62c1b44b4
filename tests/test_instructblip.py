"""InstructBLIP folders of transformers opened as ours: same prompt, same logits, same answer."""

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
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import tiny
from pumice.convert.instructblip import (
    detect,
    instructblip_config,
    instructblip_images,
    instructblip_processor,
    instructblip_template,
    instruction_tokenizer,
    load_qformer_weights,
    pumice_name,
)
from pumice.core.errors import PumiceError
from pumice.core.types import assistant, user
from pumice.models.connectors import Instruction, build_connector
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.lmm import LMM
from pumice.processing.collate import collate
from pumice.processing.processor import Processor
from pumice.processing.templates import Template

DEPTH, QUERIES = 3, 5
QUESTIONS = ("what is the red cat", "what")


def save_processor(folder: Path) -> InstructBlipProcessor:
    tiny.tokenizer_folder(folder / "plain")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "plain")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.pad_token = "</s>"
    words = "[PAD] [UNK] [CLS] [SEP] what is the red a cat dog".split()
    bert = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    bert.pre_tokenizer = pre_tokenizers.Whitespace()
    bert.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    reader = PreTrainedTokenizerFast(tokenizer_object=bert, unk_token="[UNK]", pad_token="[PAD]")
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = InstructBlipProcessor(images, tokenizer, reader, num_query_tokens=QUERIES)
    processor.save_pretrained(folder / "model")
    return processor


def config(vocab_size: int, image_token: int) -> InstructBlipConfig:
    return InstructBlipConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        qformer_config={
            "vocab_size": 11,
            "hidden_size": 16,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 20,
        },
        text_config=tiny.language_config(vocab_size, tied=False).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=image_token,
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("instructblip")
    processor = save_processor(folder)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = InstructBlipForConditionalGeneration(config(len(processor.tokenizer), image_token))
    model.set_attn_implementation("eager")
    tiny.shake(model)
    model.save_pretrained(folder / "model")
    picture = np.random.default_rng(0).integers(0, 255, (20, 50, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(picture)
    return SimpleNamespace(
        folder=folder / "model", model=model.eval(), processor=processor, image=image
    )


@pytest.fixture(scope="module")
def ours(theirs: SimpleNamespace) -> LMM:
    lmm = LMM.from_config(instructblip_config(theirs.folder), init=False)
    state = load_file(theirs.folder / "model.safetensors")
    names = {name: pumice_name(name, DEPTH) for name in state}
    lmm.load_state_dict({new: state[name] for name, new in names.items() if new is not None})
    return lmm.eval()


@pytest.fixture(scope="module")
def processor(theirs: SimpleNamespace) -> Processor:
    return instructblip_processor(theirs.folder)


def prompt(
    theirs: SimpleNamespace, processor: Processor, question: str
) -> tuple[torch.Tensor, torch.Tensor, Instruction]:
    """long[1, T], float[1, 3, 32, 32] and what the Q-Former reads."""
    batch = collate([processor.encode_prompt([user(question, theirs.image)])], processor.pad_id)
    assert batch.instruction is not None
    return batch.input_ids, batch.pixel_values, batch.instruction


def logits_of(
    lmm: LMM, ids: torch.Tensor, pixels: torch.Tensor, instruction: Instruction
) -> torch.Tensor:
    logits: torch.Tensor = lmm(ids, pixel_values=pixels, instruction=instruction)
    return logits


@pytest.mark.parametrize("question", QUESTIONS)
def test_prompt_and_pixels_are_theirs(
    theirs: SimpleNamespace, processor: Processor, question: str
) -> None:
    ids, pixels, instruction = prompt(theirs, processor, question)
    given = theirs.processor(images=theirs.image, text=question, return_tensors="pt")
    image_token = theirs.model.config.image_token_index
    assert torch.equal(ids.masked_fill(ids == IMAGE_ID, image_token), given["input_ids"])
    assert torch.equal(instruction.ids, given["qformer_input_ids"])
    torch.testing.assert_close(pixels, given["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("question", QUESTIONS)
def test_logits_and_answers_are_theirs(
    theirs: SimpleNamespace, ours: LMM, processor: Processor, question: str
) -> None:
    ids, pixels, instruction = prompt(theirs, processor, question)
    given = theirs.processor(images=theirs.image, text=question, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.model(**given).logits
        logits = logits_of(ours, ids, pixels, instruction)
        answer = theirs.model.generate(
            **given, max_new_tokens=8, min_new_tokens=8, do_sample=False
        )[0, -8:]
        for _ in range(8):
            following = logits_of(ours, ids, pixels, instruction)[:, -1]
            following[:, 2] = float("-inf")  # transformers was told not to stop
            ids = torch.cat([ids, following.argmax(-1, keepdim=True)], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert logits.std() > 0.1
    assert ids[0, -8:].tolist() == answer.tolist()


def test_the_instruction_matters(theirs: SimpleNamespace, ours: LMM, processor: Processor) -> None:
    ids, pixels, instruction = prompt(theirs, processor, QUESTIONS[0])
    other = Instruction(instruction.ids.flip(1), instruction.mask)
    with torch.no_grad():
        here, there = (logits_of(ours, ids, pixels, i) for i in (instruction, other))
    assert not torch.allclose(here, there, atol=1e-3)


def test_a_batch_is_its_rows(theirs: SimpleNamespace, ours: LMM, processor: Processor) -> None:
    encoded = [processor.encode_prompt([user(text, theirs.image)]) for text in QUESTIONS]
    batch = collate(encoded, processor.pad_id)
    assert batch.instruction is not None
    with torch.no_grad():
        together = logits_of(ours, batch.input_ids, batch.pixel_values, batch.instruction)
        for row, text in enumerate(QUESTIONS):
            alone = logits_of(ours, *prompt(theirs, processor, text))[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=0)


def test_every_tensor_has_its_place(theirs: SimpleNamespace, ours: LMM) -> None:
    names = {name: pumice_name(name, DEPTH) for name in theirs.model.state_dict()}
    dropped = [name for name, new in names.items() if new is None]
    assert {new for new in names.values() if new} == set(ours.state_dict())
    assert {name.rsplit(".", 2)[0] for name in dropped} == {
        f"qformer.encoder.layer.{DEPTH - 1}.{part}" for part in ("intermediate", "output", "output")
    }
    assert pumice_name("qformer.embeddings.position_ids", DEPTH) is None
    assert pumice_name("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", 3) is None
    with pytest.raises(PumiceError, match=r"unknown tensor 'visual.weight'; known are vision_mode"):
        pumice_name("visual.weight", DEPTH)


def test_template_learns_the_answer_and_travels_as_data(
    theirs: SimpleNamespace, processor: Processor
) -> None:
    template = Template.from_dict(json.loads(json.dumps(processor.template.to_dict())))
    assert template == processor.template and template.name == "instructblip"
    encoded = processor.encode(
        SimpleNamespace(  # type: ignore[arg-type]
            id="a", source="", messages=(user("what", theirs.image), assistant("a red cat"))
        )
    )
    learnt = [token for token in encoded.labels if token != IGNORE]
    start = encoded.input_ids.index(1)
    assert encoded.input_ids[:start] == [IMAGE_ID] * QUERIES
    whole = processor.tokenizer("what a red cat")["input_ids"]
    assert encoded.input_ids[start:] == [*whole, 2]
    assert processor.decode(learnt) == "a red cat" and learnt[-1] == 2


def test_a_tokenizer_that_starts_otherwise(theirs: SimpleNamespace) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(theirs.folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    template = instructblip_template(tokenizer)
    made = Processor(tokenizer, instructblip_images(theirs.folder), template, None, QUERIES)
    ids = made.encode_prompt([user("what", theirs.image)]).input_ids
    assert ids == [IMAGE_ID] * QUERIES + tokenizer("what")["input_ids"]


def changed(theirs: SimpleNamespace, folder: Path, change: dict[str, Any]) -> Path:
    shutil.copytree(theirs.folder, folder)
    data = json.loads((folder / "config.json").read_text())
    for part, values in change.items():
        data[part] = values if part == "text_config" else {**data[part], **values}
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def test_what_cannot_be_is_refused(theirs: SimpleNamespace, tmp_path: Path) -> None:
    assert detect({"model_type": "instructblip"}) and not detect({"model_type": "llava"})
    flan = changed(theirs, tmp_path / "flan", {"text_config": {"model_type": "t5"}})
    with pytest.raises(PumiceError, match=r"encoder-decoder 't5' \(Flan-T5\).* Use a decoder-only"):
        instructblip_config(flan)
    other = changed(theirs, tmp_path / "relu", {"qformer_config": {"hidden_act": "relu"}})
    with pytest.raises(PumiceError, match="hidden_act 'relu' .* only gelu and absolute"):
        instructblip_config(other)
    (other / "processor_config.json").unlink()
    with pytest.raises(PumiceError, match="no image preparation .* copy it there"):
        instructblip_images(other)
    shutil.rmtree(other / "qformer_tokenizer")
    with pytest.raises(PumiceError, match="reads the question with the BERT tokenizer"):
        instruction_tokenizer(other)


def test_qformer_weights_for_a_recipe(theirs: SimpleNamespace) -> None:
    state = load_file(theirs.folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    options = instructblip_config(theirs.folder).connector_options
    connector = build_connector("qformer", 32, 48, 17, options, vocab_size=9)
    fresh = connector.language_projection.weight.clone()
    load_qformer_weights(connector, shapes, state.__getitem__)  # type: ignore[arg-type]
    for name, tensor in connector.state_dict().items():
        if not name.startswith("language_projection."):
            assert torch.equal(tensor, state[name])
    assert torch.equal(connector.language_projection.weight, fresh)
    for change in ({"width": 32}, {"depth": 2}, {"depth": 4}, {"every": 1}, {"queries": 4}):
        wrong = build_connector("qformer", 32, 48, 17, {**options, **change}, vocab_size=9)
        with pytest.raises(PumiceError, match="do not fit this qformer: .* checkpoint's own opt"):
            load_qformer_weights(wrong, shapes, state.__getitem__)  # type: ignore[arg-type]
