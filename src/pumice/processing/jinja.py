"""A template as a Jinja chat template, for those who read our checkpoints through transformers.

`apply_chat_template` renders the same text as `Template.segments`, with the learnt spans inside
`{% generation %}`, so that the assistant mask equals our labels. Two things no chat template can
do: keep a user from spelling a special token (the rendered text is tokenised as one), and cut the
tokens at the start of an answer (a tokenizer may melt a first line break into the prompt's last).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pumice.core.errors import PumiceError
from pumice.processing.templates import BOS, EOS, Piece, Template, Token

_ORDER = "turns must alternate user, assistant, after an optional system message"


def to_jinja(
    template: Template, system: str | None = None, *, image_token: str = "<image>", mark: str = ""
) -> str:
    """The chat template that renders what `template` writes; images become `image_token`.

    `system` is the text used when the conversation brings none: None is the template's own, "" no
    system text. Content is a string, or a list of {"type": "text"} and {"type": "image"} parts.
    `mark` is written behind the token that begins a sequence.
    """
    if template.images_first or template.around_image:
        raise PumiceError(
            f"template {template.name!r} moves images or puts tokens around them (images_first, "
            f"around_image), which its chat template would not render. Keep such a model in "
            f"pumice's own layout, or choose another template."
        )
    default = template.system if system is None else system
    block = _choose("ns.system", _system_block(template), _written(template.no_system))
    in_front = template.user_text and not template.system_in_user
    lines = [
        f"{{%- set ns = namespace(system={_quote(default)}, turns=0) %}}",
        "{%- if messages and messages[0]['role'] == 'system' %}",
        *_system_text(),
        "{%- endif %}",
        *_written([BOS, mark] if template.bos else []),
        *(block if in_front else ()),
        "{%- for message in messages %}",
        "{%- if message['role'] == 'user' and ns.turns % 2 == 0 %}",
        *_user(template, block if template.system_in_user else (), image_token),
        "{%- elif message['role'] == 'assistant' and ns.turns % 2 == 1 %}",
        *_answer(template),
        "{%- elif message['role'] != 'system' or not loop.first %}",
        f"{{{{- raise_exception({_quote(_ORDER)}) }}}}",
        "{%- endif %}",
        "{%- endfor %}",
        "{%- if add_generation_prompt and ns.turns % 2 == 1 %}",
        *_written(template.after_user),
        "{%- endif %}",
    ]
    return "\n".join(lines)


def _system_text() -> list[str]:
    # A system message wins even when it is empty, which means none at all.
    return [
        "{%- set ns.system = '' %}",
        *_content("messages[0]", texts=True, images=None, into="ns.system"),
    ]


def _system_block(template: Template) -> list[str]:
    return [
        *_written(template.before_system),
        "{{- ns.system }}",
        *_written(template.after_system),
    ]


def _user(template: Template, block: Sequence[str], image_token: str) -> list[str]:
    between = _written(template.between_rounds)
    return [
        *(_choose("ns.turns > 0", between, ()) if between else ()),
        *_written(template.before_user),
        *(_choose("ns.turns == 0", block, ()) if block else ()),
        *_content("message", texts=template.user_text, images=image_token),
        "{%- set ns.turns = ns.turns + 1 %}",
    ]


def _answer(template: Template) -> list[str]:
    return [
        *_written(template.after_user),
        "{%- generation %}",
        *_written([template.before_answer]),
        *_content("message", texts=True, images=None),
        *_written([template.after_answer]),
        *_written([template.end] if template.end else []),
        "{%- endgeneration %}",
        "{%- set ns.turns = ns.turns + 1 %}",
    ]


def _content(name: str, *, texts: bool, images: str | None, into: str | None = None) -> list[str]:
    """The content of a message, written out or added to the variable `into`.

    The loop stands in the open, since vLLM looks for one over `message['content']` to learn that a
    template takes parts.
    """

    def emit(value: str) -> str:
        return f"{{%- set {into} = {into} + {value} %}}" if into else f"{{{{- {value} }}}}"

    content = f"{name}['content']"
    misplaced = _quote("images are allowed in user turns only")
    image = emit(_quote(images)) if images else f"{{{{- raise_exception({misplaced}) }}}}"
    unknown = _quote("content parts are {'type': 'text'} or {'type': 'image'}")
    return [
        f"{{%- if {content} is string %}}",
        *([emit(content)] if texts else ()),
        "{%- else %}",
        f"{{%- for part in {content} %}}",
        "{%- if part['type'] == 'image' %}",
        image,
        "{%- elif part['type'] == 'text' %}",
        *([emit("part['text']")] if texts else ()),
        "{%- else %}",
        f"{{{{- raise_exception({unknown}) }}}}",
        "{%- endif %}",
        "{%- endfor %}",
        "{%- endif %}",
    ]


def _choose(condition: str, then: Sequence[str], otherwise: Sequence[str]) -> list[str]:
    other = ["{%- else %}", *otherwise] if otherwise else []
    return [f"{{%- if {condition} %}}", *then, *other, "{%- endif %}"]


def _written(pieces: Iterable[Piece]) -> list[str]:
    # A tokenizer without BOS has no bos_token: the undefined name renders as nothing.
    own = {BOS: "bos_token", EOS: "eos_token"}
    lines = []
    for piece in pieces:
        if isinstance(piece, Token):
            lines.append(f"{{{{- {own.get(piece) or _quote(piece.name)} }}}}")
        elif piece:
            lines.append(f"{{{{- {_quote(piece)} }}}}")
    return lines


def _quote(text: str) -> str:
    """A Jinja string constant; its escapes are Python's."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "'" + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + "'"
