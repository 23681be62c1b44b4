"""A folder's chat template is one of ours, or the tokenizer's own, or an error that helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import hf_folders
from pumice.convert.chat_template import choose_template, match_template, read_chat_template
from pumice.convert.huggingface import hf_processor
from pumice.convert.image_files import image_settings, image_spec
from pumice.convert.llava import language_config
from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.models.config import LMMConfig
from pumice.models.pretrained import config_to_dict, read_config
from pumice.processing.images import ImageSpec
from pumice.processing.jinja import to_jinja
from pumice.processing.templates import TEMPLATES
from real_files import CHECKPOINTS, needs

needs_real = needs(CHECKPOINTS, "published configurations")
CONVERSATIONS = [name for name in TEMPLATES if TEMPLATES[name].user_text]
OWN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + '] ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.mark.parametrize("system", [None, ""])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_we_write_is_recognised(tmp_path: Path, name: str, system: str | None) -> None:
    tokenizer = hf_folders.tokenizer(tmp_path)
    source = to_jinja(TEMPLATES[name], system, image_token="<image>\n")
    found = match_template(source, tokenizer)
    assert found is not None
    template, said = found
    text = TEMPLATES[name].system if system is None else system
    assert (template.system if said is None else said) == text
    if text:
        assert template.name == name


def test_published_llava_is_vicuna_without_a_system_text(tmp_path: Path) -> None:
    tokenizer = hf_folders.tokenizer(tmp_path)
    assert match_template(hf_folders.CHAT, tokenizer) == (TEMPLATES["vicuna_v1"], "")
    assert match_template(hf_folders.CHAT.replace("ASSISTANT", "BOT"), tokenizer) is None


def test_the_tokenizers_own_template_is_taken_when_none_of_ours_fits(tmp_path: Path) -> None:
    tokenizer = hf_folders.tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(OWN)
    template, system = choose_template(tmp_path, tokenizer, None, "vicuna_v1")
    assert (template.name, system) == ("tokenizer", None)
    assert template.before_user == ("[user] ",)
    assert choose_template(tmp_path, tokenizer, "llava_v1", "vicuna_v1")[0].name == "llava_v1"


def test_one_that_cannot_be_split_is_an_error(tmp_path: Path) -> None:
    tokenizer = hf_folders.tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(PumiceError, match="Choose one with --template"):
        choose_template(tmp_path, tokenizer, None, "vicuna_v1")


def test_where_a_chat_template_may_stand(tmp_path: Path) -> None:
    tokenizer = hf_folders.tokenizer(tmp_path)
    assert read_chat_template(tmp_path, tokenizer) is None
    tokenizer.chat_template = "third"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "second"}')
    assert read_chat_template(tmp_path, tokenizer) == "second"
    (tmp_path / "chat_template.jinja").write_text("first")
    assert read_chat_template(tmp_path, tokenizer) == "first"


@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
def test_image_settings_both_ways(tmp_path: Path, mode: str) -> None:
    spec = ImageSpec(mode, 224, mean=(0.5, 0.4, 0.3), resample="bilinear")  # type: ignore[arg-type]
    from pumice.core.files import write_json

    write_json(tmp_path / "preprocessor_config.json", image_settings(spec))
    # transformers has no word for transparency: what its files make ignores it.
    assert image_spec(tmp_path, 224) == replace(spec, transparency="ignored")
    with pytest.raises(PumiceError, match="pictures of 224 pixels.*reads 336"):
        image_spec(tmp_path, 336)


def test_a_folder_without_image_settings(tmp_path: Path) -> None:
    with pytest.raises(PumiceError, match=r"no preprocessor_config\.json"):
        image_spec(tmp_path, 224)


@needs_real
def test_published_port_opens_as_it_was_published() -> None:
    folder = CHECKPOINTS / "llava-1.5-7b-hf"
    config = read_config(folder, part="LLaVA")
    lmm_config = LMMConfig(
        vision=config_to_dict(config.vision_config),
        vision_layer=-2,
        vision_select="patch",
        connector="mlp2x_gelu",
        language=config_to_dict(config.text_config),
    )
    processor = hf_processor(folder, lmm_config, None)
    assert (processor.template.name, processor.system) == ("vicuna_v1", "")
    assert (processor.image_spec.mode, processor.image_tokens) == ("crop", 576)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]


@needs_real
def test_published_originals_decoder_is_llama() -> None:
    folder = CHECKPOINTS / "llava-v1.5-7b"
    found = language_config(read_json(folder / "config.json"), folder)
    theirs = config_to_dict(read_config(CHECKPOINTS / "llava-1.5-7b-hf", part="LLaVA").text_config)
    differs = {key for key in found if found[key] != theirs[key]}
    # llava-hf's vocabulary has an image and a padding token.
    assert differs <= {"vocab_size", "pad_token_id", "architectures"}
    assert found["vocab_size"] == 32000
