"""Which conversations a template takes: alternating speakers, answers with text, images in place.

Every refusal names the sample, the turn and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pumice.core.errors import DataError
from pumice.core.types import Message


def split_system(messages: Sequence[Message], where: str) -> tuple[str | None, tuple[Message, ...]]:
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


def check_turns(turns: Sequence[Message], *, open_turn: bool, where: str) -> None:
    """Raises DataError unless user and assistant alternate, with text in every answer."""
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


def check_image_only(name: str, turns: Sequence[Message], where: str) -> None:
    """Raises DataError unless the turns are one image and its caption, as `plain` needs."""
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
