"""Which of our templates a folder's own chat template is, found by running it on a dialogue."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.core.log import get_logger
from pumice.core.types import Message, assistant, user
from pumice.processing.own_template import find_template, own_template
from pumice.processing.templates import BOS, EOS, TEMPLATES, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = get_logger(__name__)

_ASKED, _SAID, _NEXT = "QZONEZQ", "QZTWOZQ", "QZTHREEZQ"
_IMAGE = "<image>"


def read_chat_template(directory: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The Jinja text of a folder: beside the processor, else the tokenizer's; None without one."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        path = directory / name
        text = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(text, str):
            return text
    own = getattr(tokenizer, "chat_template", None)
    return own if isinstance(own, str) else None


def choose_template(
    directory: Path, tokenizer: PreTrainedTokenizerFast, wanted: str | None, default: str
) -> tuple[Template, str | None]:
    """The template and the system text of a folder (None is the template's own).

    `wanted` is the user's choice; a folder without a chat template gets `default`.
    """
    source = read_chat_template(directory, tokenizer)
    if source is not None:
        tokenizer.chat_template = source
    if wanted is not None:
        return find_template(wanted, tokenizer), None
    if source is None:
        return TEMPLATES[default], None
    found = match_template(source, tokenizer)
    if found is not None:
        return found
    try:
        return own_template(tokenizer), None
    except PumiceError as error:
        raise PumiceError(
            f"the chat template of {directory} is none of pumice's own, and {error} Choose one "
            f"with --template (template= in Python)."
        ) from error


def match_template(
    source: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[Template, str | None] | None:
    """The template that writes what the Jinja text writes, and its system text; None for none.

    First to the letter, then without the spaces that ours write out for Llama's newer tokenizers,
    then without regard to white space and to the marks of begin and end, which published chat
    templates of LLaVA leave out although the models were trained with them.
    """
    written = _render(source, tokenizer)
    if written is None:
        return None
    for plain in (str, _unmarked(tokenizer), _bare(tokenizer)):
        for name in TEMPLATES:
            template = TEMPLATES[name]
            if not template.user_text:
                continue
            for system in (None, ""):
                if plain(_written(template, system, tokenizer)) == plain(written):
                    shown = "with" if system is None and template.system else "without"
                    log.info("the chat template is %s, %s a system text", name, shown)
                    return template, system
    return None


def _render(source: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """A dialogue of two rounds with an image, as the Jinja text writes it."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    picture = {"type": "image"}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [picture, {"type": "text", "text": _ASKED}]},
        {"role": "assistant", "content": [{"type": "text", "text": _SAID}]},
        {"role": "user", "content": [{"type": "text", "text": _NEXT}]},
    ]
    try:
        (text,), _ = render_jinja_template(
            [chat],
            chat_template=source,
            add_generation_prompt=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        log.info("the chat template cannot be run on images and texts (%s)", error)
        return None
    written: str = text
    return written


def _written(template: Template, system: str | None, tokenizer: PreTrainedTokenizerFast) -> str:
    turns: list[Message] = [user(_ASKED, b""), assistant(_SAID), user(_NEXT)]
    segments = template.segments(turns, open_turn=True, system=system)
    own = {BOS.name: tokenizer.bos_token or "", EOS.name: tokenizer.eos_token or ""}
    parts = []
    for segment in segments:
        if segment.kind == "image":
            parts.append(_IMAGE)
        elif segment.kind == "token":
            parts.append(own.get(segment.text, segment.text))
        else:
            parts.append(segment.text)
    return "".join(parts)


def _unmarked(tokenizer: PreTrainedTokenizerFast) -> Any:
    bos = tokenizer.bos_token or ""
    return lambda text: text.replace(f"{bos} ", bos, 1).replace(f"{_IMAGE} \n", f"{_IMAGE}\n")


def _bare(tokenizer: PreTrainedTokenizerFast) -> Any:
    marks = [mark for mark in (tokenizer.bos_token, tokenizer.eos_token) if mark]
    pattern = re.compile("|".join([r"\s+", *map(re.escape, marks)]))
    return lambda text: pattern.sub("", text)
