"""Conversation templates as data: what surrounds each turn, and which part of it is learnt.

A template never yields one long string. It yields segments, and each segment says whether it is
learnt, so that nobody has to find the answers again in rendered text. The strings are those of
LLaVA; a template travels inside the checkpoint as data, so that a name can never change meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from pumice.core.errors import PumiceError
from pumice.core.registry import Registry, suggest
from pumice.core.types import ImagePart, Message, TextPart
from pumice.processing.turns import check_image_only, check_turns, split_system


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
    turn; `no_system` is what stands there without one. `between_rounds` comes before each user turn
    but the first. `after_user` ends with what opens the answer. `before_answer` and `after_answer`
    are text which the model itself writes, so they are learnt. `end` closes each answer and is
    learnt; `stop` are strings that end generation where there is no such token. `user_text` False
    keeps of the user's turn the images alone. `images_first` moves all images before everything
    else, even BOS (InstructBLIP); `around_image` stands before and after images (IDEFICS).
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
    no_system: tuple[Piece, ...] = ()
    images_first: bool = False
    around_image: tuple[Piece, ...] = ()

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
        own, turns = split_system(messages, where)
        check_turns(turns, open_turn=open_turn, where=where)
        if not self.user_text:
            check_image_only(self.name, turns, where)
        text = next(given for given in (own, system, self.system) if given is not None)
        block = self.system_block(text)
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
        out = _joined(_images_first(out) if self.images_first else out)
        return _joined(_bordered(out, self.around_image)) if self.around_image else out

    def system_block(self, text: str) -> tuple[Piece, ...]:
        """What is written for the system text `text`; "" is none."""
        return (*self.before_system, text, *self.after_system) if text else self.no_system

    def tokens(self) -> tuple[Token, ...]:
        """The special tokens this template cannot do without (BOS is left out where unknown)."""
        pieces: tuple[Piece | None, ...] = (
            *self.before_system,
            *self.after_system,
            *self.no_system,
            *self.between_rounds,
            *self.before_user,
            *self.after_user,
            *self.around_image,
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
        data = {field.name: _to_json(getattr(self, field.name)) for field in fields(self)}
        return {key: value for key, value in data.items() if value or key not in _LATER}

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
        missing = [key for key in known if key not in data and key not in _LATER]
        if missing:
            raise PumiceError(
                f"a saved template lacks {', '.join(missing)}; all of {', '.join(known)} are "
                "needed. Save the processor again."
            )
        return cls(**{key: _from_json(key, data[key]) for key in known if key in data})

    def _answer(self, turn: Message) -> list[Segment]:
        written = f"{self.before_answer}{turn.text}{self.after_answer}"
        answer = [Segment("text", written, learn=True)]
        return [*answer, Segment("token", self.end.name, learn=True)] if self.end else answer


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


def _images_first(segments: Sequence[Segment]) -> list[Segment]:
    """Every image before all else, even BOS; the line break behind an image goes with it."""
    texts: list[Segment] = []
    for segment, last in zip(segments, (None, *segments), strict=False):
        if last and last.kind == "image" and segment.kind == "text" and not segment.learn:
            texts.append(Segment("text", segment.text.removeprefix("\n")))
        elif segment.kind != "image":
            texts.append(segment)
    return [segment for segment in segments if segment.kind == "image"] + texts


def _bordered(segments: Sequence[Segment], border: Sequence[Piece]) -> list[Segment]:
    """`border` before, between and after images; spaces that touch it are dropped."""
    out: list[Segment] = []
    shown = [False, *(segment.kind == "image" for segment in segments), False]
    for segment, before, image, after in zip(segments, shown, shown[1:], shown[2:], strict=False):
        text = segment.text.lstrip(" ") if before else segment.text
        out += _written(border) if image and not before else ()
        out.append(replace(segment, text=text.rstrip(" ") if after else text))
        out += _written(border) if image else ()
    return out


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


# Fields that came after the first release: absent from older files, left out where unused.
_LATER = ("no_system", "images_first", "around_image")
_TEXTS = ("name", "system", "before_answer", "after_answer")
_FLAGS = ("bos", "system_in_user", "user_text", "images_first")


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
_MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
# The example dialogue that Vicuna v0 was given in front of every conversation.
_RENEWABLE = (
    "Human: What are the key differences between renewable and non-renewable energy sources?"
    "###Assistant: Renewable energy sources are those that can be replenished naturally in a "
    "relatively short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, "
    "such as coal, oil, and natural gas. Here are some key differences between renewable and "
    "non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n###"
)
_IM_START, _IM_END = Token("<|im_start|>"), Token("<|im_end|>")
_HEADER, _HEADER_END, _EOT = (
    Token("<|start_header_id|>"),
    Token("<|end_header_id|>"),
    Token("<|eot_id|>"),
)


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


def _vicuna_v0(name: str, example: str) -> Template:
    # "###" is ordinary text which the model writes itself; the tokenizer has no token for it.
    return Template(
        name=name,
        system=_CURIOUS.format("human"),
        after_system=(f"###{example}",),
        before_user=("Human: ",),
        after_user=("###Assistant:",),
        before_answer=" ",
        after_answer="###",
        end=None,
        stop=("###",),
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


def _chatml(name: str, system: str, *, bos: bool, line: tuple[Piece, ...] = ()) -> Template:
    # `line` stands behind every end token but the last one, which the model itself writes.
    return Template(
        name=name,
        system=system,
        bos=bos,
        before_system=(_IM_START, "system\n"),
        after_system=(_IM_END, *line),
        between_rounds=line,
        before_user=(_IM_START, "user\n"),
        after_user=(_IM_END, *line, _IM_START, "assistant\n"),
        end=_IM_END,
    )


def _header(role: str) -> tuple[Piece, ...]:
    return _HEADER, role, _HEADER_END, "\n\n"


TEMPLATES: Registry[Template] = Registry(
    "template",
    {
        # Stage 1 of LLaVA: the image, its caption and a line break; no words around, no end token.
        "plain": Template(name="plain", after_answer="\n", end=None, stop=("\n",), user_text=False),
        "vicuna_v1": _vicuna("vicuna_v1", "user"),
        "llava_v1": _vicuna("llava_v1", "human"),
        # LLaVA's "v0" carries the example dialogue, its "llava_v0" does not.
        "v0": _vicuna_v0("v0", _RENEWABLE),
        "llava_v0": _vicuna_v0("llava_v0", ""),
        "chatml_direct": _chatml("chatml_direct", "Answer the questions.", bos=True),
        "mistral_instruct": _llama_2("mistral_instruct", "", ()),
        "llava_llama_2": _llama_2("llava_llama_2", _LLAVA_LLAMA_2, (BOS,)),
        "mpt": _chatml("mpt", _MPT, bos=False),
        "llama-3": Template(
            name="llama-3",
            system=_LLAVA_LLAMA_2,
            before_system=_header("system"),
            after_system=(_EOT,),
            before_user=_header("user"),
            after_user=(_EOT, *_header("assistant")),
            end=_EOT,
        ),
        "qwen": _chatml("qwen", "You are a helpful assistant.", bos=False, line=("\n",)),
    },
)
