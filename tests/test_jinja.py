"""The emitted chat template renders in transformers what our template writes and learns."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import PIL.Image
import pytest
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from pumice.core.types import ImagePart, Message, Sample, TextPart, assistant
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.processing.images import ImageSpec
from pumice.processing.jinja import to_jinja
from pumice.processing.processor import Processor
from pumice.processing.templates import TEMPLATES, Segment
from tokenizers_zoo import KINDS

PICTURE = ImagePart(PIL.Image.new("RGB", (4, 4)))
CONVERSATIONS = [name for name in TEMPLATES.names() if name != "plain"]
WORDS = (
    "the cat",
    "sat",
    "USER:",
    "ASSISTANT: no",
    "[INST]",
    "一只猫",
    "고양이",
    "😀👩‍👩‍👧",
    "it's",
)
WORDS += ("{{ bos_token }}", "{% if x %}", "\\n", "'quoted\"", "3.14", "&lt;", "assistant\n\nuser")
# Spaces at the ends are where a template that trims, or a tokenizer that melts, would show.
EDGES = ("", " ", "\n", "\n\n  ", "\t")


def text(rng: random.Random, *, edges: bool) -> str:
    inner = rng.choice((" ", "\n", ", ")).join(rng.choices(WORDS, k=rng.randint(1, 4)))
    return rng.choice(EDGES) + inner + rng.choice(EDGES) if edges else inner


def question(rng: random.Random, *, edges: bool, images: int) -> Message:
    parts: list[TextPart | ImagePart] = [PICTURE] * images
    parts.append(TextPart(("\n" if images else "") + text(rng, edges=edges)))
    if images and rng.random() < 0.5:
        rng.shuffle(parts)
        parts.append(TextPart(" " + text(rng, edges=edges)))
    return Message("user", tuple(parts))


def dialogue(rng: random.Random, *, edges: bool = True, images: bool = True) -> list[Message]:
    turns: list[Message] = []
    if rng.random() < 0.4:
        turns.append(Message("system", (TextPart(rng.choice(("", text(rng, edges=edges)))),)))
    for number in range(rng.randint(1, 4)):
        count = rng.randint(0, 2) if images and (number == 0 or rng.random() < 0.3) else 0
        turns.append(question(rng, edges=edges, images=count))
        turns.append(assistant(text(rng, edges=edges)))
    return turns


def chat(rng: random.Random, turns: list[Message]) -> list[dict[str, Any]]:
    """As transformers takes them: parts, or for text alone a string now and then."""
    rows: list[dict[str, Any]] = []
    for turn in turns:
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in turn.content
        ]
        plain = not turn.images and rng.random() < 0.5
        rows.append({"role": turn.role, "content": turn.text if plain else parts})
    return rows


def written(segments: list[Segment]) -> str:
    own = {"bos": "<s>", "eos": "</s>"}
    return "".join(
        "<image>" if s.kind == "image" else own.get(s.text, s.text) if s.kind == "token" else s.text
        for s in segments
    )


def learnt_spans(segments: list[Segment]) -> list[str]:
    spans, inside = [], False
    for segment in segments:
        if segment.learn:
            spans.append((spans.pop() if inside else "") + written([segment]))
        inside = segment.learn
    return spans


def rendered(template: str, rows: list[dict[str, Any]], system: str | None, *, ask: bool) -> Any:
    (result,), spans = render_jinja_template(
        [rows],
        chat_template=to_jinja(TEMPLATES[template], system),
        add_generation_prompt=ask,
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    return result, [result[start:end] for start, end in spans[0]]


@pytest.mark.parametrize("system", [None, "", "Be 'brief' \\ {{ now }}.\n"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_random_dialogues_render_to_the_same_text(name: str, system: str | None) -> None:
    rng = random.Random(f"{name} {system}")
    for _ in range(60):
        turns = dialogue(rng)
        ours = TEMPLATES[name].segments(turns, open_turn=False, system=system)
        got, spans = rendered(name, chat(rng, turns), system, ask=False)
        assert got == written(ours)
        assert spans == learnt_spans(ours)
        ours = TEMPLATES[name].segments(turns[:-1], open_turn=True, system=system)
        got, spans = rendered(name, chat(rng, turns[:-1]), system, ask=True)
        assert got == written(ours)


def test_plain_renders_the_image_and_its_caption() -> None:
    turns = [Message("user", (PICTURE, TextPart("\nSay it."))), assistant(" a cat ")]
    rng = random.Random(0)
    got, spans = rendered("plain", chat(rng, turns), None, ask=False)
    assert (got, spans) == ("<s><image> a cat \n", [" a cat \n"])
    assert rendered("plain", chat(rng, turns[:1]), None, ask=True)[0] == "<s><image>"


@cache
def processor(kind: str, template: str) -> Processor:
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.chat_template = to_jinja(TEMPLATES[template], "Be brief.")
    return Processor(tokenizer, ImageSpec("pad", 4), template, "Be brief.", 1)


def by_transformers(made: Processor, rng: random.Random, turns: list[Message]) -> Any:
    return made.tokenizer.apply_chat_template(
        chat(rng, turns),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        add_generation_prompt=turns[-1].role == "user",
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama_first"])
def test_random_dialogues_give_the_same_ids_and_labels(kind: str, name: str) -> None:
    made = processor(kind, name)
    image = made.tokenizer.get_vocab()["<image>"]
    rng = random.Random(f"{kind} {name}")
    for _ in range(12):
        turns = dialogue(rng, edges=False)
        theirs = by_transformers(made, rng, turns)
        ours = made.encode(Sample("s", tuple(turns)))
        ids = [image if index == IMAGE_ID else index for index in ours.input_ids]
        assert ids == theirs["input_ids"]
        # Of a run of bytes, Unigram tells every one the place of the whole run: no mask can be cut.
        if kind != "unigram":
            assert [int(label != IGNORE) for label in ours.labels] == theirs["assistant_masks"]
        prompt = made.encode_prompt(turns[:-1], pixels=False).input_ids
        prompt = [image if index == IMAGE_ID else index for index in prompt]
        assert prompt == by_transformers(made, rng, turns[:-1])["input_ids"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_with_a_mark_at_the_start_alone_the_learnt_ids_are_the_same(name: str) -> None:
    # transformers gives such a tokenizer no mark behind a spelled-out <s> or an image, where the
    # reference and we have one; what is learnt is the same.
    made = processor("llama_first", name)
    rng = random.Random(name)
    for _ in range(12):
        turns = dialogue(rng, edges=False, images=False)
        theirs = by_transformers(made, rng, turns)
        mask = theirs["assistant_masks"]
        learnt = [i for i, on in zip(theirs["input_ids"], mask, strict=True) if on]
        ours = made.encode(Sample("s", tuple(turns)))
        assert [label for label in ours.labels if label != IGNORE] == learnt


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"role": "assistant", "content": "A"}], "alternate"),
        ([{"role": "user", "content": "Q"}, {"role": "user", "content": "Q"}], "alternate"),
        ([{"role": "user", "content": "Q"}, {"role": "system", "content": "S"}], "alternate"),
        ([{"role": "user", "content": [{"type": "video"}]}], "content parts are"),
        ([{"role": "system", "content": [{"type": "image"}]}], "user turns only"),
    ],
)
def test_what_we_refuse_the_chat_template_refuses_too(rows: Any, says: str) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match=says):
        rendered("vicuna_v1", rows, None, ask=True)


def test_another_image_token() -> None:
    source = to_jinja(TEMPLATES["vicuna_v1"], "", image_token="<|image_pad|>")
    rows = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    (got,), _ = render_jinja_template([rows], chat_template=source, add_generation_prompt=True)
    assert got == "USER: <|image_pad|>Q ASSISTANT:"
