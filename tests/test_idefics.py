"""IDEFICS folders of transformers opened as ours: same prompt, same logits, same answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

import tiny
from pumice.convert.idefics import (
    MARKER,
    IdeficsTensors,
    detect,
    idefics_config,
    idefics_image_id,
    idefics_images,
    idefics_processor,
    idefics_template,
    pumice_name,
)
from pumice.convert.open import open_model
from pumice.core.errors import PumiceError
from pumice.core.types import ImagePart, Message, Request, Sampling, TextPart, assistant, user
from pumice.infer.engine import Engine
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.constants import IMAGE_ID
from pumice.models.lmm import LMM
from pumice.processing.jinja import to_jinja
from pumice.processing.processor import Processor
from pumice.processing.templates import Template
from small_requests import Recorder

ADDED = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
# What the two published models differ in from each other and from transformers' defaults.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "published": {"qk_layer_norms": True, "qk_layer_norms_perceiver": True, "every": 4},
    "vector": {"alpha_type": "vector", "instructed": False},
    "tied": {"tie_word_embeddings": True, "qk_layer_norms": True},
}


def save_tokenizer(folder: Path, added: list[str]) -> PreTrainedTokenizerFast:
    tiny.tokenizer_folder(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.pad_token = "<unk>"
    return tokenizer


def config(tokenizer: PreTrainedTokenizerFast, added: int, **options: Any) -> IdeficsConfig:
    every = options.pop("every", 2)
    perceiver = {"qk_layer_norms_perceiver": options.pop("qk_layer_norms_perceiver", False)}
    return IdeficsConfig(
        vocab_size=len(tokenizer) - added,
        additional_vocab_size=added,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        cross_layer_interval=every,
        use_resampler=True,
        rms_norm_eps=1e-3,
        pad_token_id=0,
        vision_config={
            "embed_dim": 24,
            "image_size": tiny.IMAGE_SIZE,
            "patch_size": tiny.PATCH_SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 40,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 3,
            "resampler_head_dim": 5,
            **perceiver,
        },
        **options,
    )


def save(folder: Path, *, instructed: bool = True, **options: Any) -> SimpleNamespace:
    """A random IDEFICS with its processor, as transformers writes them."""
    added = ADDED if instructed else ADDED[:2]
    tokenizer = save_tokenizer(folder / "plain", added)
    images = IdeficsImageProcessorPil(image_size=tiny.IMAGE_SIZE)
    processor = IdeficsProcessor(images, tokenizer)
    # Whether the end of a turn is written is looked up in a map that newer releases keep empty.
    processor.tokenizer_was_trained_with_end_of_utterance_token = False
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(config(tokenizer, len(added), **options))
    model.set_attn_implementation("eager")
    tiny.shake(model)
    model.tie_weights()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return SimpleNamespace(folder=folder / "model", model=model.eval(), processor=processor)


def open_idefics(folder: Path) -> tuple[LMM, Processor]:
    processor = idefics_processor(folder)
    lmm_config = idefics_config(folder)
    lmm = LMM.from_config(lmm_config, init=False)
    lmm.load_state_dict(
        tensors(folder, processor), strict=not lmm_config.language["tie_word_embeddings"]
    )
    return lmm.eval(), processor


def tensors(folder: Path, processor: Processor) -> IdeficsTensors:
    state = load_file(folder / "model.safetensors")
    return IdeficsTensors(
        state,
        state.__getitem__,
        image_id=idefics_image_id(processor.tokenizer),
        tied=idefics_config(folder).language["tie_word_embeddings"],
    )


@pytest.fixture(scope="module", params=KINDS)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = save(tmp_path_factory.mktemp("idefics"), **KINDS[request.param])
    found.instructed = KINDS[request.param].get("instructed", True)
    return found


@pytest.fixture(scope="module")
def ours(theirs: SimpleNamespace) -> SimpleNamespace:
    lmm, processor = open_idefics(theirs.folder)
    return SimpleNamespace(lmm=lmm, processor=processor)


def dialogues(instructed: bool) -> tuple[list[list[Any]], list[tuple[Message, ...]]]:
    """The same conversations as IDEFICS' processor takes them, and as messages."""
    end = ADDED[2] if instructed else ""
    one, two, three = tiny.noise(0), tiny.noise(1, (30, 60)), tiny.noise(2, (50, 50))
    their = [
        ["User: what is", one, f"in it{end}\nAssistant: a cat{end}\nUser:", two, three,
         f"Answer the question{end}\nAssistant:"],
        ["User:", two, f"what{end}\nAssistant:"],
        [f"User: what is the question{end}\nAssistant:"],
    ]  # fmt: skip
    parts = (TextPart("what is "), ImagePart(one), TextPart(" in it"))
    follow = (ImagePart(two), ImagePart(three), TextPart("Answer the question"))
    our = [
        (Message("user", parts), assistant("a cat"), Message("user", follow)),
        (Message("user", (ImagePart(two), TextPart("what"))),),
        (user("what is the question"),),
    ]
    return their, our


def test_the_prompt_is_theirs(theirs: SimpleNamespace, ours: SimpleNamespace) -> None:
    their, our = dialogues(theirs.instructed)
    image = idefics_image_id(ours.processor.tokenizer)
    for prompt, messages in zip(their, our, strict=True):
        batch = theirs.processor(text=prompt, return_tensors="pt", add_end_of_utterance_token=False)
        encoded = ours.processor.encode_prompt(messages)
        ids = [IMAGE_ID if index == image else index for index in batch["input_ids"][0].tolist()]
        assert encoded.input_ids == ids
        if encoded.num_images:
            torch.testing.assert_close(encoded.pixel_values, batch["pixel_values"][0])
        assert batch["image_attention_mask"].any() == (encoded.num_images > 0)


def test_logits_are_theirs(theirs: SimpleNamespace, ours: SimpleNamespace) -> None:
    """A batch of rows with three images, with one, and with none; positions that see nothing."""
    their, our = dialogues(theirs.instructed)
    batch = theirs.processor(
        text=their, return_tensors="pt", add_end_of_utterance_token=False, padding_side="right"
    )
    encoded = [ours.processor.encode_prompt(messages) for messages in our]
    width = max(len(row.input_ids) for row in encoded)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in encoded])
    pixels = torch.cat([row.pixel_values for row in encoded])
    with torch.no_grad():
        wanted = theirs.model(**batch).logits
        found = ours.lmm(ids, pixel_values=pixels)
        blind = ours.lmm(ids, pixel_values=torch.zeros_like(pixels))
    real = batch["attention_mask"].bool()
    assert found.shape == wanted.shape
    torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=0)
    assert (blind - found)[0][real[0]].abs().max() > 0.1


def test_greedy_answers_are_theirs(
    theirs: SimpleNamespace, ours: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    their, our = dialogues(theirs.instructed)
    ends = list(ours.processor.end_token_ids)
    wanted = []
    for prompt in their:
        batch = theirs.processor(text=prompt, return_tensors="pt", add_end_of_utterance_token=False)
        with torch.no_grad():
            out = theirs.model.generate(
                **batch, max_new_tokens=12, do_sample=False, eos_token_id=ends
            )
        wanted.append(out[0, batch["input_ids"].shape[1] :].tolist())
    requests = [
        Request(messages, Sampling(max_new_tokens=12, seed=place))
        for place, messages in enumerate(our)
    ]
    recorder = Recorder(monkeypatch)
    results = Engine(ours.lmm, ours.processor).generate(requests)
    found = [tokens for tokens, _ in recorder.take()]
    assert [result.error for result in results] == [None] * 3
    assert found == wanted
    assert len({tuple(tokens) for tokens in wanted}) == 3


def test_a_pumice_checkpoint_of_it_is_the_same(
    theirs: SimpleNamespace, ours: SimpleNamespace, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "own", ours.lmm, ours.processor.save, {})
    again, processor = load_lmm(tmp_path / "own"), Processor.load(tmp_path / "own")
    for name, tensor in ours.lmm.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert processor.template == ours.processor.template
    _, our = dialogues(theirs.instructed)
    assert (
        processor.encode_prompt(our[0]).input_ids == ours.processor.encode_prompt(our[0]).input_ids
    )


def test_a_directory_is_known_by_its_content(
    theirs: SimpleNamespace, ours: SimpleNamespace, tmp_path: Path
) -> None:
    folder = shutil.copytree(theirs.folder, tmp_path / "llava-v1.5-7b-lora")
    lmm, processor = open_model(folder)
    state = ours.lmm.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in lmm.state_dict().items())
    assert processor.template == ours.processor.template and processor.image_mark


def test_every_tensor_is_read_once(theirs: SimpleNamespace, ours: SimpleNamespace) -> None:
    """Nothing of the model is missing, nothing of theirs is left but the pooled output's norm."""
    mapped = tensors(theirs.folder, ours.processor)
    state = ours.lmm.state_dict()
    tied = ours.lmm.language.config.tie_word_embeddings
    assert set(mapped) == set(state) - ({"language.model.lm_head.weight"} if tied else set())
    assert {name: mapped[name].shape for name in mapped} == {n: state[n].shape for n in mapped}
    image = idefics_image_id(ours.processor.tokenizer)
    assert torch.equal(mapped[MARKER], ours.lmm.language.token_embeddings[image])


# names, templates and refusals


def test_names_older_releases_stored_are_left_out() -> None:
    assert pumice_name("model.layers.3.self_attn.rotary_emb.inv_freq") is None
    assert pumice_name("model.gated_cross_attn_layers.0.cross_attn.rotary_emb.inv_freq") is None
    assert pumice_name("model.vision_model.embeddings.position_ids") is None


@pytest.mark.parametrize(
    "name", ["model.layer.0.x", "model.gated_cross_attn_layers.0.cross_attn.b_proj.weight", "x"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(PumiceError, match="unknown tensor"):
        pumice_name(name)


def test_other_generations_are_not_taken_for_it() -> None:
    assert detect({"model_type": "idefics"})
    assert not detect({"model_type": "idefics2"}) and not detect({})


def test_template_travels_as_data(tmp_path: Path) -> None:
    template = idefics_template(save_tokenizer(tmp_path, ADDED))
    assert Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    assert template.describe() == (
        "<bos>User:<fake_token_around_image><image><fake_token_around_image>\\nQ1"
        "<end_of_utterance>\\nAssistant:« A1<end_of_utterance>»"
        "\\nUser: Q2<end_of_utterance>\\nAssistant:« A1<end_of_utterance>»"
    )


def test_no_chat_template_is_written_without_its_image_tokens(tmp_path: Path) -> None:
    with pytest.raises(PumiceError, match="around_image"):
        to_jinja(idefics_template(save_tokenizer(tmp_path, ADDED)))


def test_base_template_ends_an_answer_with_its_line(tmp_path: Path) -> None:
    template = idefics_template(save_tokenizer(tmp_path, ADDED[:2]))
    assert template.end is None and template.stop == ("\nUser:",)
    assert template.describe().endswith("\\nAssistant:« A1\\n»User: Q2\\nAssistant:« A1\\n»")


def test_what_cannot_be_said_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path).folder
    path = folder / "config.json"
    written = json.loads(path.read_text())
    for change, complaint in (
        ({"use_resampler": False}, "use_resampler is false"),
        ({"cross_layer_interval": 3}, "4 blocks do not divide"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
    ):
        path.write_text(json.dumps({**written, **change}))
        with pytest.raises(PumiceError, match=complaint):
            idefics_config(folder)


def test_a_tokenizer_without_the_image_token_is_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, ADDED[:1])
    with pytest.raises(PumiceError, match="no <image>"):
        idefics_image_id(tokenizer)
    table = {"model.embed_tokens.weight": torch.zeros(3, 2)}
    mapped = IdeficsTensors(table, table.__getitem__, image_id=5)
    with pytest.raises(PumiceError, match="3 rows behind the end"):
        mapped[MARKER]


@pytest.mark.parametrize(
    "written", [{"size": {"height": 8, "width": 8}}, {"image_size": 8, "image_num_channels": 3}]
)
def test_image_size_is_read_as_older_and_newer_releases_write_it(
    tmp_path: Path, written: dict[str, Any]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    spec = idefics_images(tmp_path)
    assert (spec.size, spec.mode) == (8, "resize")
