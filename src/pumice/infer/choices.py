"""Answers that must be one of a list: which tokens may come next so that one of them results."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

from pumice.core.errors import PumiceError
from pumice.core.types import Message

if TYPE_CHECKING:
    from pumice.processing.processor import Processor

# Stands in a node's children where a choice ends; no token has this id.
_END = -1

_Node = dict[int, "_Node"]


class ChoiceError(PumiceError):
    """The answer of a request can be none of its choices, or not every one of them."""


class LongChoiceError(ChoiceError):
    """A choice has more tokens than the answer may have: `longest` and `most`."""

    def __init__(self, where: str, longest: int, most: int) -> None:
        super().__init__(
            f"{where}: the longest choice has {longest} tokens, and the answer may have at most "
            f"{most}. Raise max_new_tokens, or shorten the choices."
        )
        self.longest, self.most = longest, most


class Guide:
    """A walk down the tree of the choices' tokens, one step for each token of the answer.

    `ends` are the tokens that close an answer. They are chosen among only where one choice is the
    beginning of another; elsewhere the answer is over as soon as a choice is complete.
    """

    def __init__(self, choices: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        self._root: _Node = {}
        self._ends = list(ends)
        self.longest = max(map(len, choices))
        """The tokens of the longest choice."""
        for ids in choices:
            node = self._root
            for token in ids:
                node = node.setdefault(token, {})
            node[_END] = {}
        self._node = self._root

    def again(self) -> Guide:
        """Another walk down the same tree, from its top; of long lists the tree takes megabytes."""
        other = copy(self)
        other._node = self._root
        return other

    @property
    def allowed(self) -> list[int]:
        """The tokens that may come next."""
        tokens = [token for token in self._node if token != _END]
        return tokens + self._ends if _END in self._node else tokens

    def goes_on_with(self, token: int) -> bool:
        """Whether a token is the next of a choice; otherwise it is one of `ends`."""
        return token in self._node

    def take(self, token: int) -> bool:
        """Follows a token of a choice; True when nothing may follow."""
        self._node = self._node[token]
        return list(self._node) == [_END]


def choice_ids(
    processor: Processor, messages: Sequence[Message], choices: Sequence[str], where: str
) -> list[list[int]]:
    """The tokens of each choice as an answer to these messages.

    Raises ChoiceError for a choice that no answer can be: the text of its tokens is another one.
    """
    known = list(dict.fromkeys(choices))
    for choice in known:
        if not choice or choice != choice.strip():
            raise ChoiceError(
                f"{where}: the choice {choice!r} is empty or has blanks around it, which no answer "
                f"has. Give the bare text."
            )
    found = processor.answer_ids(messages, known, where)
    for choice, ids in zip(known, found, strict=True):
        read = processor.decode(ids).strip()
        if read != choice:
            raise ChoiceError(
                f"{where}: the model cannot say the choice {choice!r}; its tokens read {read!r}. "
                f"Write it in letters that the tokenizer keeps."
            )
    return found
