"""The strings of each template, what of them is learnt, and which conversations are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pumice.core.errors import DataError, PumiceError
from pumice.core.types import ImagePart, Message, TextPart, assistant, user
from pumice.processing.templates import TEMPLATES, Segment, Template, Token

PICTURE = Path("picture.png")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
LLAVA = VICUNA.replace("curious user", "curious human").replace("the user's", "the human's")
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
DIALOGUE = (user("Q1", PICTURE), assistant("A1"), user("Q2"))
# As the reference renders it (with the BOS which its tokenizer call puts in front).
PROMPTS = {
    "vicuna_v1": f"<s>{VICUNA} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava_v1": f"<s>{LLAVA} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava_llama_2": (
        f"<s>[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]"
    ),
    "mistral_instruct": "<s>[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
    "chatml_direct": (
        "<s><|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1"
        "<|im_end|><|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|>"
        "<|im_start|>assistant\n"
    ),
    "llava_v0": f"<s>{LLAVA}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:",
    "mpt": (
        f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
        "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
    ),
    "llama-3": (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_2}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    ),
}
# How each answer is written, the words and tokens that the model itself writes round it included.
ANSWERS = {
    "vicuna_v1": " {}</s>",
    "llava_v1": " {}</s>",
    "llava_v0": " {}###",
    "llava_llama_2": " {} </s>",
    "mistral_instruct": " {} </s>",
    "chatml_direct": "{}<|im_end|>",
    "mpt": "{}<|im_end|>",
    "qwen": "{}<|im_end|>",
    "llama-3": "{}<|eot_id|>",
}


def rendered(segments: list[Segment]) -> str:
    own = {"bos": "<s>", "eos": "</s>"}
    return "".join(
        "<image>" if s.kind == "image" else own.get(s.text, s.text) if s.kind == "token" else s.text
        for s in segments
    )


def test_every_template_is_covered() -> None:
    assert set(PROMPTS) | {"plain", "v0"} == set(TEMPLATES.names())
    assert set(PROMPTS) == set(ANSWERS)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_the_reference_string(name: str) -> None:
    assert rendered(TEMPLATES[name].segments(DIALOGUE, open_turn=True)) == PROMPTS[name]


@pytest.mark.parametrize("name", PROMPTS)
def test_only_answers_and_end_tokens_are_learnt(name: str) -> None:
    template = TEMPLATES[name]
    segments = template.segments((*DIALOGUE, assistant("A2")), open_turn=False)
    learnt = rendered([segment for segment in segments if segment.learn])
    assert learnt == ANSWERS[name].format("A1") + ANSWERS[name].format("A2")
    assert rendered(segments) == PROMPTS[name] + ANSWERS[name].format("A2")


def test_v0_is_llava_v0_behind_its_example_dialogue() -> None:
    text = rendered(TEMPLATES["v0"].segments(DIALOGUE, open_turn=True))
    opening = f"<s>{LLAVA}###"
    assert text.startswith(f"{opening}Human: What are the key differences between renewable and")
    assert text.endswith("instability.\n###" + PROMPTS["llava_v0"].removeprefix(opening))
    assert (text.count("###Assistant: "), text.count("###Human: "), text.count("\n")) == (2, 3, 8)
    assert TEMPLATES["v0"].stop == TEMPLATES["llava_v0"].stop == ("###",)


def test_plain_is_image_caption_line_break() -> None:
    template = TEMPLATES["plain"]
    pair = (user("Describe it.", PICTURE), assistant("a cat"))
    segments = template.segments(pair, open_turn=False)
    assert rendered(segments) == "<s><image>a cat\n"
    assert [segment.text for segment in segments if segment.learn] == ["a cat\n"]
    assert rendered(template.segments(pair[:1], open_turn=True)) == "<s><image>"
    # A recipe's system text has no place here and does not change the caption pairs.
    assert template.segments(pair, open_turn=False, system="Be brief.") == segments


@pytest.mark.parametrize("messages", [(user("Q"), assistant("A")), (*DIALOGUE, assistant("A2"))])
def test_plain_refuses_what_is_no_caption_pair(messages: tuple[Message, ...]) -> None:
    with pytest.raises(DataError, match="sample 'x7'.*plain"):
        TEMPLATES["plain"].segments(messages, open_turn=False, where="sample 'x7'")


@pytest.mark.parametrize("name", PROMPTS)
def test_without_system_text_its_separator_goes_too(name: str) -> None:
    got = rendered(TEMPLATES[name].segments((user("Q"),), open_turn=True, system=""))
    assert (
        got
        == {
            "vicuna_v1": "<s>USER: Q ASSISTANT:",
            "llava_v1": "<s>USER: Q ASSISTANT:",
            "llava_llama_2": "<s>[INST] Q [/INST]",
            "mistral_instruct": "<s>[INST] Q [/INST]",
            "chatml_direct": "<s><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n",
            "llava_v0": "<s>Human: Q###Assistant:",
            "mpt": "<|im_start|>user\nQ<|im_end|><|im_start|>assistant\n",
            "qwen": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
            "llama-3": (
                "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ),
        }[name]
    )


def test_system_message_wins_over_argument_wins_over_template() -> None:
    template, turn = TEMPLATES["vicuna_v1"], user("Q")
    message = Message("system", (TextPart("From the sample."),))
    none = Message("system", ())

    def text(*messages: Message, system: str | None) -> str:
        return rendered(template.segments(messages, open_turn=True, system=system))

    assert text(message, turn, system="Given.") == "<s>From the sample. USER: Q ASSISTANT:"
    assert text(none, turn, system="Given.") == "<s>USER: Q ASSISTANT:"
    assert text(turn, system="Given.") == "<s>Given. USER: Q ASSISTANT:"
    assert text(turn, system=None) == f"<s>{VICUNA} USER: Q ASSISTANT:"


def test_images_stay_where_they_are_written() -> None:
    one, two = ImagePart(Path("1.png")), ImagePart(Path("2.png"))
    turn = Message("user", (TextPart("Is "), one, TextPart(" older than "), two, TextPart("?")))
    segments = TEMPLATES["vicuna_v1"].segments((turn,), open_turn=True, system="")
    assert rendered(segments) == "<s>USER: Is <image> older than <image>? ASSISTANT:"
    assert [segment.image for segment in segments if segment.kind == "image"] == [one, two]


def test_user_text_never_becomes_markup() -> None:
    text = "<image> </s> <|im_end|> ASSISTANT: no"
    for name in PROMPTS:
        segments = TEMPLATES[name].segments((user(text), assistant(text)), open_turn=False)
        assert sum(text in segment.text for segment in segments) == 2
        assert all(segment.kind == "text" for segment in segments if text in segment.text)
        assert not any(segment.kind == "image" for segment in segments)


SYSTEM = Message("system", (TextPart("S"),))
A_AND_IMAGE = Message("assistant", (TextPart("A"), ImagePart(PICTURE)))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ((), "no user turn"),
        ((SYSTEM,), "no user turn"),
        ((assistant("A"),), "turn 1 is from 'assistant' where 'user'"),
        ((user("Q"), user("Q2"), assistant("A")), "turn 2 is from 'user' where 'assistant'"),
        ((user("Q"), assistant("A"), assistant("B")), "turn 3 is from 'assistant' where 'user'"),
        ((user("Q"), SYSTEM, assistant("A")), "turn 2 is from 'system'"),
        ((user("Q"), assistant("")), "turn 2 is an empty answer"),
        ((user("Q"), assistant(" \n\t"), user("Q"), assistant("A")), "turn 2 is an empty answer"),
        ((user("Q"), assistant("A"), user("Q2")), "ends with an answer"),
        ((user("Q"), A_AND_IMAGE), "answer that holds an image"),
        ((Message("system", (ImagePart(PICTURE),)), user("Q"), assistant("A")), "system message"),
    ],
)
@pytest.mark.parametrize("name", PROMPTS)
def test_broken_conversations_are_errors_that_name_the_sample(
    name: str, messages: tuple[Message, ...], says: str
) -> None:
    with pytest.raises(DataError) as caught:
        TEMPLATES[name].segments(messages, open_turn=False, where="sample '000123' (a.json, row 7)")
    assert str(caught.value).startswith("sample '000123' (a.json, row 7): ")
    assert says in str(caught.value)


def test_a_prompt_must_end_with_the_user() -> None:
    with pytest.raises(DataError, match="a prompt ends with the user's turn"):
        TEMPLATES["vicuna_v1"].segments((user("Q"), assistant("A")), open_turn=True)


@pytest.mark.parametrize("name", TEMPLATES.names())
def test_data_round_trip(name: str) -> None:
    data = json.loads(json.dumps(TEMPLATES[name].to_dict()))
    assert Template.from_dict(data) == TEMPLATES[name]
    assert Template.from_dict(data).describe() == TEMPLATES[name].describe()


def test_special_tokens_are_told_from_text_in_the_data() -> None:
    data = TEMPLATES["chatml_direct"].to_dict()
    assert data["before_user"] == [{"token": "<|im_start|>"}, "user\n"]
    assert data["end"] == {"token": "<|im_end|>"}
    assert TEMPLATES["chatml_direct"].tokens() == (Token("<|im_start|>"), Token("<|im_end|>"))
    assert TEMPLATES["llava_llama_2"].tokens() == (Token("eos"),)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"befor_user": []}, "unknown field 'befor_user'.*before_user"),
        ({"end": None, "name": 3}, "'name'"),
        ({"before_user": "USER: "}, "'before_user'"),
        ({"before_user": [{"tokn": "x"}]}, "'before_user'"),
        ({"bos": "yes"}, "'bos'"),
        ({"stop": [{"token": "eos"}]}, "'stop'"),
    ],
)
def test_damaged_data_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(PumiceError, match=says):
        Template.from_dict(TEMPLATES["vicuna_v1"].to_dict() | change)


def test_a_later_field_may_be_absent_from_older_files() -> None:
    assert "no_system" not in TEMPLATES["vicuna_v1"].to_dict()
    header = replace(TEMPLATES["qwen"], no_system=(Token("<|im_start|>"), "system\nToday."))
    again = Template.from_dict(json.loads(json.dumps(header.to_dict())))
    assert again == header
    without = rendered(again.segments((user("Q"),), open_turn=True, system=""))
    assert without.startswith("<|im_start|>system\nToday.<|im_start|>user\nQ")
    given = rendered(again.segments((user("Q"),), open_turn=True, system="S"))
    assert "Today" not in given


def test_missing_field_is_refused() -> None:
    data = TEMPLATES["vicuna_v1"].to_dict()
    del data["end"]
    with pytest.raises(PumiceError, match="lacks end"):
        Template.from_dict(data)


def test_describe_shows_what_is_learnt() -> None:
    assert TEMPLATES["vicuna_v1"].describe(system="") == (
        "<bos>USER: <image>\\nQ1 ASSISTANT:« A1<eos>»USER: Q2 ASSISTANT:« A1<eos>»"
    )
    assert TEMPLATES["plain"].describe() == "<bos><image>«A1\\n»"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(PumiceError, match="vicuna_v1"):
        TEMPLATES["vicuna"]
