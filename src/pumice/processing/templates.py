"""Conversation templates as data: what surrounds each turn, and which part of it is learnt.

A template never yields one long string. It yields segments, and each segment says whether it is
learnt, so that nobody has to find the answers again in rendered text. The strings are those of
LLaVA; a template travels inside the checkpoint as data, so that a name can never change meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pumice.core.errors import DataError, PumiceError
from pumice.core.registry import Registry, suggest
from pumice.core.types import ImagePart, Message, TextPart


@dataclass(frozen=True, slots=True)
class Token:
    """One special token of a template: 'bos' or 'eos' (the tokenizer's own), or its spelling."""

    name: str


Piece = str | Token
BOS = Token("bos")
EOS = Token("eos")


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the conversation that is tokenised as one and learnt as a whole or not at all.

    `text` is the text, or the name of the special token; `image` is set for images only.
    """

    kind: Literal["text", "token", "image"]
    text: str = ""
    learn: bool = False
    image: ImagePart | None = None


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written. Only each answer and its end token are learnt.

    `system` is the template's own system text; `before_system` and `after_system` are written only
    when there is a system text, in front of everything or (`system_in_user`) inside the first user
    turn. `between_rounds` comes before each user turn but the first. `after_user` ends with what
    opens the answer. `before_answer` and `after_answer` are text which the model itself writes, so
    they are learnt. `end` closes each answer and is learnt; `stop` are strings that end generation
    where there is no such token. `user_text` False keeps of the user's turn the images alone.
    """

    name: str
    system: str = ""
    bos: bool = True
    before_system: tuple[Piece, ...] = ()
    after_system: tuple[Piece, ...] = ()
    system_in_user: bool = False
    between_rounds: tuple[Piece, ...] = ()
    before_user: tuple[Piece, ...] = ()
    after_user: tuple[Piece, ...] = ()
    before_answer: str = ""
    after_answer: str = ""
    end: Token | None = EOS
    stop: tuple[str, ...] = ()
    user_text: bool = True

    def segments(
        self,
        messages: Sequence[Message],
        *,
        open_turn: bool,
        system: str | None = None,
        where: str = "",
    ) -> list[Segment]:
        """The conversation in segments; `open_turn` leaves the next answer to the model.

        A system message wins over `system`, and None means the template's own system text; "" means
        none at all. `where` names the sample in errors.
        """
        own, turns = _split_system(messages, where)
        _check_turns(turns, open_turn=open_turn, where=where)
        if not self.user_text:
            _check_image_only(self.name, turns, where)
        text = next(given for given in (own, system, self.system) if given is not None)
        block: list[Piece] = [*self.before_system, text, *self.after_system] if text else []
        out = [Segment("token", BOS.name)] if self.bos else []
        if self.user_text and not self.system_in_user:
            out += _written(block)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                out += self._answer(turn)
                continue
            out += _written(self.between_rounds if number else ())
            out += _written(self.before_user)
            out += _written(block if self.system_in_user and number == 0 else ())
            out += [part for part in _content(turn) if self.user_text or part.kind == "image"]
            out += _written(self.after_user)
        return _joined(out)

    def tokens(self) -> tuple[Token, ...]:
        """The special tokens this template cannot do without (BOS is left out where unknown)."""
        pieces: tuple[Piece | None, ...] = (
            *self.before_system,
            *self.after_system,
            *self.between_rounds,
            *self.before_user,
            *self.after_user,
            self.end,
        )
        named = [piece for piece in pieces if isinstance(piece, Token) and piece != BOS]
        return tuple(dict.fromkeys(named))

    def describe(self, system: str | None = None) -> str:
        """A two-round example as one line of text, for people; learnt parts stand in «»."""
        picture = ImagePart(b"")
        first = Message("user", (picture, TextPart("\nQ1")))
        answer = Message("assistant", (TextPart("A1"),))
        rounds = (first, answer, Message("user", (TextPart("Q2"),)), answer)
        shown = ""
        for segment in self.segments(
            rounds if self.user_text else rounds[:2], open_turn=False, system=system
        ):
            text = "<image>" if segment.kind == "image" else segment.text
            text = f"<{text}>" if segment.kind == "token" and text in ("bos", "eos") else text
            shown += f"«{text}»" if segment.learn else text
        return shown.replace("»«", "").replace("\n", "\\n")

    def to_dict(self) -> dict[str, Any]:
        """The template as JSON data; a special token is {"token": name}."""
        return {field.name: _to_json(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Template:
        """The template written by `to_dict`; an unknown, missing or mistyped field is an error."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise PumiceError(
                    f"a saved template holds the unknown field {key!r}; known: "
                    f"{', '.join(known)}.{suggest(str(key), known)} Read it with the version of "
                    "pumice that wrote it."
                )
        missing = [key for key in known if key not in data]
        if missing:
            raise PumiceError(
                f"a saved template lacks {', '.join(missing)}; all of {', '.join(known)} are "
                "needed. Save the processor again."
            )
        return cls(**{key: _from_json(key, data[key]) for key in known})

    def _answer(self, turn: Message) -> list[Segment]:
        written = f"{self.before_answer}{turn.text}{self.after_answer}"
        answer = [Segment("text", written, learn=True)]
        return [*answer, Segment("token", self.end.name, learn=True)] if self.end else answer


def _split_system(
    messages: Sequence[Message], where: str
) -> tuple[str | None, tuple[Message, ...]]:
    """The text of a leading system message (None without one) and the turns after it."""
    if not messages or messages[0].role != "system":
        return None, tuple(messages)
    if messages[0].images:
        raise _data_error(
            where,
            "the system message holds an image; images are allowed in user turns only. "
            "Move it into the first user turn",
        )
    return messages[0].text, tuple(messages[1:])


def _check_turns(turns: Sequence[Message], *, open_turn: bool, where: str) -> None:
    if not turns:
        raise _data_error(where, "there is no user turn; a conversation starts with one")
    for number, turn in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise _data_error(
                where,
                f"turn {number + 1} is from {turn.role!r} where {expected!r} is expected; turns "
                "alternate user, assistant, starting with user (after an optional system "
                "message). Merge neighbouring turns of one speaker, or mend the sample",
            )
        if turn.role == "user":
            continue
        if turn.images:
            raise _data_error(
                where,
                f"turn {number + 1} is an answer that holds an image; images are allowed in "
                "user turns only",
            )
        if not turn.text.strip():
            raise _data_error(
                where,
                f"turn {number + 1} is an empty answer ({turn.text!r}); an answer needs text. "
                "Write the answer, or remove the sample",
            )
    if open_turn and turns[-1].role == "user" and not (turns[-1].text.strip() or turns[-1].images):
        raise _data_error(
            where,
            f"the question is empty ({turns[-1].text!r}); a text, an image or both are needed. Ask "
            "something",
        )
    last = "user" if open_turn else "assistant"
    if turns[-1].role != last:
        raise _data_error(
            where,
            f"the last turn is from {turns[-1].role!r}; "
            + (
                "a prompt ends with the user's turn. Remove the answer, or add a question"
                if open_turn
                else "a training conversation ends with an answer. Remove the last user turn, "
                "or add its answer"
            ),
        )


def _check_image_only(name: str, turns: Sequence[Message], where: str) -> None:
    if len(turns) > 2 or not turns[0].images:
        count = sum(len(turn.images) for turn in turns)
        raise _data_error(
            where,
            f"template {name!r} takes one user turn with an image and its answer; given "
            f"{len(turns)} turns with {count} images. Use another template for conversations, or "
            "take the sample out of this stage",
        )


def _data_error(where: str, text: str) -> DataError:
    return DataError(f"{where or 'the conversation'}: {text}.")


def _written(pieces: Sequence[Piece]) -> list[Segment]:
    return [
        Segment("token", piece.name) if isinstance(piece, Token) else Segment("text", piece)
        for piece in pieces
    ]


def _content(turn: Message) -> list[Segment]:
    return [
        Segment("text", part.text) if isinstance(part, TextPart) else Segment("image", image=part)
        for part in turn.content
    ]


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbouring texts of one kind made one, and empty ones dropped.

    Nothing is joined across the start of an answer: generation has to cut there as well.
    """
    out: list[Segment] = []
    for segment in segments:
        if segment.kind == "text" and not segment.text:
            continue
        last = out[-1] if out else None
        if last and last.kind == segment.kind == "text" and last.learn == segment.learn:
            out[-1] = Segment("text", last.text + segment.text, learn=last.learn)
        else:
            out.append(segment)
    return out


def _to_json(value: Any) -> Any:
    if isinstance(value, Token):
        return {"token": value.name}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


_TEXTS = ("name", "system", "before_answer", "after_answer")
_FLAGS = ("bos", "system_in_user", "user_text")


def _from_json(key: str, value: Any) -> Any:
    if key in _TEXTS and isinstance(value, str):
        return value
    if key in _FLAGS and isinstance(value, bool):
        return value
    if key == "end" and value is None:
        return None
    if key == "end" and _is_token(value):
        return Token(value["token"])
    if key not in (*_TEXTS, *_FLAGS, "end") and isinstance(value, list):
        if key == "stop" and all(isinstance(item, str) for item in value):
            return tuple(value)
        if key != "stop" and all(isinstance(item, str) or _is_token(item) for item in value):
            return tuple(item if isinstance(item, str) else Token(item["token"]) for item in value)
    raise PumiceError(
        f"field {key!r} of a saved template is {value!r}, which it cannot be; allowed are text, "
        'true or false, or lists of text and {"token": name}, as Template.to_dict writes them. '
        "Save the processor again."
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["token"] and isinstance(value["token"], str)


_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_IM_START, _IM_END = Token("<|im_start|>"), Token("<|im_end|>")


def _vicuna(name: str, human: str) -> Template:
    # No space between an end token and the next "USER", as LLaVA-1.5 was trained.
    return Template(
        name=name,
        system=_CURIOUS.format(human),
        after_system=(" ",),
        before_user=("USER: ",),
        after_user=(" ASSISTANT:",),
        before_answer=" ",
    )


def _llama_2(name: str, system: str, between_rounds: tuple[Piece, ...]) -> Template:
    return Template(
        name=name,
        system=system,
        before_system=("<<SYS>>\n",),
        after_system=("\n<</SYS>>\n\n",),
        system_in_user=True,
        between_rounds=between_rounds,
        before_user=("[INST] ",),
        after_user=(" [/INST]",),
        before_answer=" ",
        after_answer=" ",
    )


TEMPLATES: Registry[Template] = Registry(
    "template",
    {
        # Stage 1 of LLaVA: the image, its caption and a line break; no words around, no end token.
        "plain": Template(name="plain", after_answer="\n", end=None, stop=("\n",), user_text=False),
        "vicuna_v1": _vicuna("vicuna_v1", "user"),
        "llava_v1": _vicuna("llava_v1", "human"),
        "chatml_direct": Template(
            name="chatml_direct",
            system="Answer the questions.",
            before_system=(_IM_START, "system\n"),
            after_system=(_IM_END,),
            before_user=(_IM_START, "user\n"),
            after_user=(_IM_END, _IM_START, "assistant\n"),
            end=_IM_END,
        ),
        "mistral_instruct": _llama_2("mistral_instruct", "", ()),
        "llava_llama_2": _llama_2("llava_llama_2", _LLAVA_LLAMA_2, (BOS,)),
    },
)
