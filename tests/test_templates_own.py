"""The tokenizer's own chat template: the same text and ids as transformers gives, or a refusal."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pumice.core.errors import PumiceError
from pumice.core.types import Message, Sample, TextPart, assistant, user
from pumice.models.constants import IGNORE
from pumice.processing.images import ImageSpec
from pumice.processing.jinja import to_jinja
from pumice.processing.own_template import find_template, own_template
from pumice.processing.processor import Processor
from pumice.processing.templates import BOS, TEMPLATES, Template, Token
from tokenizers_zoo import KINDS

SPEC = ImageSpec("pad", 4)
LOOP = "{% for m in messages %}"
HEAD = "{{ '<|im_start|>' + m['role'] + '\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BODY = "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
SYSTEM_FIRST = "messages[0]['role'] == 'system'"

# One program of each way in which chat models write.
PROGRAMS = {
    "chatml": LOOP + HEAD + BODY + ASK,
    "chatml with a default": (
        "{% if not (" + SYSTEM_FIRST + ") %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        # `trim_blocks` takes the first line break behind a tag.
        + LOOP + HEAD + BODY + ASK
    ),
    "system in the first question": (
        "{% set first = namespace(text='') %}{{ bos_token }}" + LOOP + "{% if m.role == 'system' "
        "%}{% set first.text = '<<SYS>>' + m['content'] + '<</SYS>> ' %}{% elif m['role'] == 'user'"
        " %}{{ '[INST] ' + first.text + m['content'] + ' [/INST]' }}{% set first.text = '' %}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "no system, another role, trimmed": (
        "{% if " + SYSTEM_FIRST + " %}{{ raise_exception('no system') }}{% endif %}{{ bos_token }}"
        + LOOP + "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
    ),
    "headers and a date": (
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>{{ '\n\nToday: 1 May\n\n' }}"
        "{% if " + SYSTEM_FIRST + " %}{{ messages[0]['content'] }}{% endif %}<|eot_id|>" + LOOP
        + "{% if m['role'] != 'system' %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
        "{{ '\n\n' + m['content'] }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
    ),
    "parts": (
        LOOP + "{{ m['role'] + ': ' }}{% for part in m['content'] | selectattr('type', 'equalto',"
        " 'text') %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>' if m['role'] == 'assistant' }}"
        "{{ ' | ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
}  # fmt: skip
WORDS = ("the cat", "Yes", "3.14", "一只猫", "고양이", "😀", "ASSISTANT: no", "a\n\nb")


def with_program(kind: str, source: str) -> Any:
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = source
    return tokenizer


def dialogue(rng: random.Random, *, system: bool) -> list[Message]:
    turns = [Message("system", (TextPart(rng.choice(WORDS)),))] if system else []
    for _ in range(rng.randint(1, 4)):
        turns += [user(" ".join(rng.choices(WORDS, k=2))), assistant(rng.choice(WORDS))]
    return turns


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in PROGRAMS
        for kind in ("llama", "gpt2", "unigram", "qwen")
        # Qwen's tokenizers have no bos_token for a program to write.
        if kind != "qwen" or "bos_token" not in PROGRAMS[name]
    ],
)
def test_ids_are_those_of_apply_chat_template(name: str, kind: str) -> None:
    tokenizer = with_program(kind, PROGRAMS[name])
    made = Processor(tokenizer, SPEC, own_template(tokenizer), None, 1)
    rng = random.Random(f"{name} {kind}")
    for number in range(12):
        turns = dialogue(rng, system=number % 2 == 0 and not name.startswith("no system"))
        ours = made.encode(Sample("s", tuple(turns)))
        assert made.encode_prompt(turns[:-1]).input_ids == by_program(tokenizer, turns[:-1])
        # Behind the last answer the program may write more, which nobody learns or ever sees.
        whole = by_program(tokenizer, turns)
        assert whole[: len(ours.input_ids)] == ours.input_ids
        spans = tokenizer.decode([label for label in ours.labels if label != IGNORE])
        said = [turn.text for turn in turns if turn.role == "assistant"]
        assert [text in spans for text in said] == [True] * len(said)
        assert ours.labels[-1] == made.end_token_ids[0]
        assert ours.labels.count(made.end_token_ids[0]) == len(said)


def by_program(tokenizer: Any, turns: list[Message]) -> list[int]:
    chat = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in turns]
    if "selectattr" not in tokenizer.chat_template:
        chat = [{"role": turn.role, "content": turn.text} for turn in turns]
    ids: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=turns[-1].role == "user", return_dict=False
    )
    return ids


def test_the_parts_of_a_program_are_found() -> None:
    start, end = Token("<|im_start|>"), Token("<|im_end|>")
    found = own_template(with_program("llama", PROGRAMS["chatml with a default"]))
    assert (found.name, found.system, found.bos) == ("tokenizer", "Be kind.", False)
    assert found.before_system == (start, "system\n") and found.after_system == (end, "\n")
    assert found.before_user == (start, "user\n") and found.between_rounds == ("\n",)
    assert found.after_user == (end, "\n", start, "assistant\n") and found.end == end
    found = own_template(with_program("llama", PROGRAMS["system in the first question"]))
    assert found.system_in_user and found.bos and found.before_system == ("<<SYS>>",)
    assert (found.before_answer, found.after_answer, found.end) == (" ", " ", Token("eos"))
    found = own_template(with_program("llama", PROGRAMS["headers and a date"]))
    assert found.no_system[-2:] == ("\n\nToday: 1 May\n\n", Token("<|eot_id|>"))
    again = Template.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found and again.bos and BOS not in again.no_system


def test_without_a_place_for_it_the_system_text_opens_the_first_question() -> None:
    source = PROGRAMS["no system, another role, trimmed"]
    made = Processor(with_program("llama", source), SPEC, "vicuna_v1", None, 1)
    made = made.with_template(own_template(made.tokenizer), "Be brief.")
    text = made.tokenizer.decode(made.encode_prompt((user("Q"),)).input_ids)
    assert text.replace(" ", "").startswith("<s><|im_start|>user\nBebrief.\n\nQ<|im_end|>")


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml_direct", "mpt", "llama-3", "qwen"])
def test_an_emitted_template_is_read_back(name: str) -> None:
    found = own_template(with_program("llama", to_jinja(TEMPLATES[name])))
    turns = dialogue(random.Random(1), system=False)
    assert found.segments(turns, open_turn=False) == TEMPLATES[name].segments(
        turns, open_turn=False
    )


REFUSED = {
    "never ends an answer": (
        LOOP + "{{ m.role + ': ' + m.content + ' ' }}{% endfor %}",
        "no end token",
    ),
    "writes the last answer otherwise": (
        LOOP + HEAD + "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        + BODY + ASK,
        "later turns change",
    ),
    "drops old turns": (
        LOOP + "{% if loop.revindex < 3 %}" + HEAD + BODY.replace("{% endfor %}", "{% endif %}")
        + "{% endfor %}" + ASK,
        "a conversation of 4 messages",
    ),
    "numbers the turns": (
        LOOP + "{{ '<|im_start|>' ~ loop.index }}" + BODY
        + "{% if add_generation_prompt %}{{ '<|im_start|>' ~ (messages | length + 1) }}{% endif %}",
        "cannot be split",
    ),
    "writes the system text late": (
        LOOP + "{% if m.role != 'system' %}" + HEAD + "{{ m.content }}{% if loop.last and "
        + SYSTEM_FIRST + " %}{{ messages[0].content }}{% endif %}<|im_end|>{% endif %}{% endfor %}"
        + ASK,
        "a conversation of 2 messages",
    ),
    "moves the system text to the newest question": (
        "{% set newest = messages | selectattr('role', 'equalto', 'user') | list | last %}" + LOOP
        + "{% if m.role != 'system' %}" + HEAD + "{% if m == newest and " + SYSTEM_FIRST
        + " %}{{ messages[0].content + '\n' }}{% endif %}"
        + BODY.replace("{% endfor %}", "{% endif %}{% endfor %}") + ASK,
        "treats all turns alike",
    ),
    "is broken": ("{% if %}", "it fails with"),
    "asks for what is not there": ("{{ tools[0].name.first }}", "it fails with"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_safely_is_refused(name: str) -> None:
    source, says = REFUSED[name]
    with pytest.raises(PumiceError, match=says) as caught:
        own_template(with_program("llama", source))
    assert "Use one of plain, vicuna_v1" in str(caught.value)


def test_a_tokenizer_without_a_chat_template_says_so() -> None:
    with pytest.raises(PumiceError, match="has none; exactly one is needed"):
        find_template("tokenizer", KINDS["llama"]())
    tokenizer = KINDS["llama"]()
    tokenizer.chat_template = {"default": "x", "tool_use": "y"}
    with pytest.raises(PumiceError, match="has 2 under different names"):
        find_template("tokenizer", tokenizer)


def test_names_are_the_shipped_templates_or_the_tokenizers_own() -> None:
    tokenizer = with_program("llama", PROGRAMS["chatml"])
    assert find_template("vicuna_v1", tokenizer) is TEMPLATES["vicuna_v1"]
    assert find_template("tokenizer", tokenizer) == own_template(tokenizer)
