"""The tokenizer's own chat template, read as one of ours.

A chat template is a program. It is run on a few conversations of marker words, and what it puts
between the markers becomes a `Template`: data that travels in the checkpoint, and that can be
trained with. The result is then compared with the program on further conversations; a program that
does anything else (drops turns, writes the last answer in its own way) is refused, not guessed at.

While it is taken apart, every special token in a text is one private character, its mark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.types import Message, TextPart, assistant, user
from pumice.processing.templates import BOS, EOS, TEMPLATES, Piece, Template, Token
from pumice.processing.text_encoder import special_tokens

OWN = "tokenizer"

# Words that no chat template holds, and that trimming leaves alone.
_SYSTEM, _ASKS, _SAYS = "QZSYSTEMZQ", "QZASK{}ZQ", "QZSAY{}ZQ"
_MARKER = re.compile(r"QZ(?:SYSTEM|ASK\d|SAY\d)ZQ")
_FIRST_MARK = 0xF0000
_ADVICE = f"Use one of {', '.join(TEMPLATES.names())}"


def find_template(name: str, tokenizer: Any) -> Template:
    """The shipped template of that name, or for 'tokenizer' the tokenizer's own."""
    return own_template(tokenizer) if name == OWN else TEMPLATES[name]


def own_template(tokenizer: Any) -> Template:
    """The chat template of a Hugging Face tokenizer as data, named 'tokenizer'.

    Texts go in as they are (a program that trims them is equal on texts without outer spaces), and
    images stand where a message has them. A program with no place for a system text gets it at the
    start of the first user turn; a date it writes stays that of today. Raises PumiceError for a
    tokenizer without a chat template, and for one that cannot be split safely.
    """
    program = _Program(tokenizer)
    turns = _dialogue(2)
    front, opening = program.parts(turns[:1])
    whole = program.parts(turns)
    if whole[0] != front or whole[3] != whole[1]:
        raise _refusal("its later turns change how earlier ones are written")
    before_answer = _after(whole[1], opening, "before an answer")
    if program.has_mark(before_answer):
        raise _refusal(f"it writes {before_answer!r} between the prompt and the answer")
    after_answer, end, rest = program.at_first_mark(whole[4])
    behind = _after(whole[2], after_answer + end, "after an answer")
    bos = bool(program.bos) and front.startswith(program.bos)
    front = front.removeprefix(program.bos) if bos else front
    before_user = program.tidy(_common_end(behind, front))
    template = Template(
        name=OWN,
        bos=bos,
        between_rounds=program.pieces(behind.removesuffix(before_user)),
        before_user=program.pieces(before_user),
        after_user=program.pieces(opening),
        before_answer=before_answer,
        after_answer=after_answer,
        end=program.token(end),
    )
    template = _with_system(template, program, front.removesuffix(before_user), before_user)
    _verify(template, program, rest)
    return template


class _Program:
    """A chat template to run, and the marks of its tokenizer's special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._source = _source(tokenizer)
        names = [name for name in special_tokens(tokenizer) if len(name) > 1]
        names.sort(key=len, reverse=True)
        self._marks = {name: chr(_FIRST_MARK + place) for place, name in enumerate(names)}
        self._names = {mark: name for name, mark in self._marks.items()}
        self._special = dict(tokenizer.special_tokens_map)
        self._eos = tokenizer.eos_token
        self._bos = tokenizer.bos_token
        self.bos = self._marks.get(self._bos, "")
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        # Such tokens swallow the spaces beside them when a text is tokenised (Phi-3's do).
        self._swallow_left = [self._marks[n] for n in names if n in added and added[n].lstrip]
        self._swallow_right = [self._marks[n] for n in names if n in added and added[n].rstrip]
        self._in_parts = False
        if _ASKS.format(0) not in self.render(_dialogue(1)[:1]):
            self._in_parts = True
        self.takes_system = self._probe_system()

    def render(self, turns: Sequence[Message]) -> str:
        """The conversation as the program writes it, with marks for special tokens."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{"role": turn.role, "content": self._content(turn.text)} for turn in turns]
        try:
            (text,), _ = render_jinja_template(
                [chat],
                chat_template=self._source,
                add_generation_prompt=turns[-1].role == "user",
                **self._special,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise _refusal(f"it fails with: {error}") from error
        return self.marked(text)

    def parts(self, turns: Sequence[Message]) -> list[str]:
        """What stands before, between and behind the texts of `turns`."""
        text = self.render(turns)
        found = _MARKER.findall(text)
        if found != [turn.text for turn in turns]:
            raise _refusal(f"it writes a conversation of {len(turns)} messages as {text[:200]!r}")
        return _MARKER.split(text)

    def marked(self, text: str) -> str:
        """`text` with marks for the spellings of special tokens."""
        text = self._pattern.sub(lambda match: self._marks[match.group()], text)
        for mark in self._swallow_left:
            text = re.sub(rf"\s+{mark}", mark, text)
        for mark in self._swallow_right:
            text = re.sub(rf"{mark}\s+", mark, text)
        return text

    def written(self, template: Template, turns: Sequence[Message]) -> str:
        """The conversation as `template` writes it, with marks for special tokens."""
        segments = template.segments(turns, open_turn=turns[-1].role == "user")
        own = {BOS.name: self._bos, EOS.name: self._eos}
        return self.marked("".join(own.get(s.text, s.text) or "" for s in segments))

    def has_mark(self, text: str) -> bool:
        """Whether a special token stands in it."""
        return any(char in self._names for char in text)

    def at_first_mark(self, text: str) -> tuple[str, str, str]:
        """What stands before the first special token, its mark, and what stands behind."""
        for place, char in enumerate(text):
            if char in self._names:
                return text[:place], char, text[place + 1 :]
        raise _refusal(f"it closes an answer with {text!r}, which is no end token")

    def tidy(self, text: str) -> str:
        """Without the spaces before its first special token: they belong to what comes before."""
        bare = text.lstrip()
        return bare if bare[:1] in self._names else text

    def token(self, mark: str) -> Token:
        """The special token of a mark."""
        name = self._names[mark]
        return EOS if name == self._eos else BOS if name == self._bos else Token(name)

    def pieces(self, text: str) -> tuple[Piece, ...]:
        """A marked text as the pieces of a template."""
        split = re.split(f"([{''.join(self._names)}])", text) if self._names else [text]
        return tuple(self.token(p) if p in self._names else p for p in split if p)

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._in_parts else text

    def _probe_system(self) -> bool:
        try:
            text = self.render(_with_system_text(_dialogue(1)[:1]))
        except PumiceError:
            return False
        # Left out in silence is as good as refused; written in another place is for `parts` to say.
        return _SYSTEM in text


def _with_system(template: Template, program: _Program, rest: str, before_user: str) -> Template:
    """The template with the place of its system text; `rest` is what stands there without one."""
    if not program.takes_system:
        if rest:
            raise _refusal(f"it opens with {rest!r} but has no place for a system text")
        # What the makers of such models advise (Gemma).
        return replace(template, system_in_user=True, after_system=("\n\n",))
    before, after, _ = program.parts(_with_system_text(_dialogue(1)[:1]))
    before = before.removeprefix(program.bos) if template.bos else before
    pieces = program.pieces
    if not after.endswith(before_user):
        if rest or not before.startswith(before_user):
            raise _refusal(f"it writes {after!r} between the system text and the question")
        inside = pieces(before.removeprefix(before_user))
        return replace(
            template, system_in_user=True, before_system=inside, after_system=pieces(after)
        )
    after = after.removesuffix(before_user)
    own = rest[len(before) : len(rest) - len(after)]
    template = replace(template, before_system=pieces(before), after_system=pieces(after))
    if rest == before + own + after and own and not program.has_mark(own):
        return replace(template, system=own)
    return replace(template, no_system=pieces(rest))


def _verify(template: Template, program: _Program, rest: str) -> None:
    """Raises PumiceError unless both write the same; `rest` may stand behind the last answer."""
    for rounds in range(1, 5):
        plain = _dialogue(rounds)
        for turns in (plain, _with_system_text(plain)) if program.takes_system else (plain,):
            for shown, tail in ((turns[:-1], ""), (turns, rest)):
                theirs, ours = program.render(shown), program.written(template, shown) + tail
                if theirs != ours:
                    raise _refusal(
                        f"it writes {theirs[:300]!r} where a template that treats all turns alike "
                        f"writes {ours[:300]!r}"
                    )


def _source(tokenizer: Any) -> str:
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, str):
        return source
    has = f"{len(source)} under different names" if source else "none"
    raise PumiceError(
        f"template '{OWN}' is the tokenizer's own chat template, and this tokenizer has {has}; "
        f"exactly one is needed. {_ADVICE}, or the tokenizer of a chat model."
    )


def _dialogue(rounds: int) -> tuple[Message, ...]:
    turns: list[Message] = []
    for number in range(rounds):
        turns += [user(_ASKS.format(number)), assistant(_SAYS.format(number))]
    return tuple(turns)


def _with_system_text(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return (Message("system", (TextPart(_SYSTEM),)), *turns)


def _after(text: str, start: str, where: str) -> str:
    if not text.startswith(start):
        raise _refusal(f"it writes {text!r} {where}, where {start!r} is expected first")
    return text[len(start) :]


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _refusal(what: str) -> PumiceError:
    return PumiceError(
        f"the tokenizer's own chat template cannot be split into turns safely: {what}. {_ADVICE}."
    )
