"""Text to token ids so that text stays text, and so that a piece gets the ids it has in its place.

Tokenizers treat the start of a text in their own ways (Llama's puts a mark before the first word),
and they turn the spelling of a special token into that token. Here a private copy of the tokenizer
reads such a spelling as text, and a piece that follows other text is read behind an anchor.
"""

from __future__ import annotations

import json
from typing import Any

from pumice.core.errors import DataError, PumiceError
from pumice.processing.templates import BOS, EOS, TEMPLATES, Template, Token

# Ends of a text to read a continuation behind, after the true one: a mark between words first.
_ANCHORS = (":", ".", "\n", "a")
# Templates' own texts, and the questions of a benchmark, come again and again.
_KNOWN_TEXTS = 4096
_KNOWN_LENGTH = 256


class TextEncoder:
    """Ids of pieces of text for one Hugging Face (fast) tokenizer; never a special token's id."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._plain = _without_special(tokenizer, self._special)
        vocab = tokenizer.get_vocab()
        # A one-character token (some tokenizers pad with "!") is ordinary text as well.
        self._forbidden = {
            vocab[text]: text for text in self._special if text in vocab and len(text) > 1
        }
        self._unknown = tokenizer.unk_token_id
        self._anchors: dict[str, list[int]] = {}
        self._known: dict[str, list[int]] = {}
        self._marks_after_token = self._probe_after_token()

    def token_id(self, token: Token) -> int | None:
        """The id of a special token of a template, or None when the tokenizer has none such."""
        if token.name in ("bos", "eos"):
            own: int | None = getattr(self.tokenizer, f"{token.name}_token_id")
            return own
        known: int | None = self.tokenizer.get_vocab().get(token.name)
        return known

    def start(self, text: str, where: str = "") -> list[int]:
        """Ids of text that starts a sequence or comes directly after an image."""
        return self._checked(self._read(text, where), text, "", where)

    def after_token(self, text: str, where: str = "") -> list[int]:
        """Ids of text directly after a special token."""
        if self._marks_after_token:
            return self.start(text, where)
        return self.after_text("\n", text, where)

    def after_text(self, before: str, text: str, where: str = "") -> list[int]:
        """Ids that `text` has behind the text `before`, whose ids stay as they are.

        Both are read together and the ids of the anchor are taken off. Where the two would melt
        into one token, another anchor is tried: the border between them is given, not found.
        """
        return self._checked(self._continued(before, text, where), text, before, where)

    def _continued(self, before: str, text: str, where: str) -> list[int]:
        for anchor in (before[-1:], *_ANCHORS):
            ids = self._anchor(anchor)
            if not ids:
                continue
            both = self._read(anchor + text, where)
            if both[: len(ids)] == ids:
                return both[len(ids) :]
        return self._read(text, where)

    def _anchor(self, anchor: str) -> list[int]:
        """The anchor's ids; none when it is unusable (an unknown id may swallow what follows)."""
        if anchor not in self._anchors:
            ids = self._read(anchor, "")
            self._anchors[anchor] = [] if self._unknown in ids else ids
        return self._anchors[anchor]

    def _read(self, text: str, where: str) -> list[int]:
        known = self._known.get(text)
        if known is not None:
            return list(known)
        ids = self._read_anew(text, where)
        if len(text) <= _KNOWN_LENGTH:
            if len(self._known) >= _KNOWN_TEXTS:
                self._known.clear()
            self._known[text] = list(ids)
        return ids

    def _read_anew(self, text: str, where: str) -> list[int]:
        try:
            ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            # The tokenizer's way of refusing half of a surrogate pair, as broken JSON escapes hold.
            raise DataError(
                f"{where or 'the text'}: {text[:60]!r} is not valid Unicode text (a lone "
                "surrogate); mend or remove these characters."
            ) from error
        return ids

    def _checked(self, ids: list[int], text: str, before: str, where: str) -> list[int]:
        if self._forbidden.keys().isdisjoint(ids):
            return ids
        # A model such as Unigram may pick a special entry of its own vocabulary: cut its spelling.
        # The unknown token may also stand for a character which the vocabulary lacks.
        found = next(
            (
                self._forbidden[index]
                for index in ids
                if index in self._forbidden
                and (index != self._unknown or self._forbidden[index] in text)
            ),
            None,
        )
        if found is None:
            return ids
        at = text.find(found)
        if at < 0:
            raise DataError(
                f"{where or 'the text'}: the tokenizer turns {text[:60]!r} into its special token "
                f"{found!r}; text must never become one. Change this text, or use a tokenizer "
                "whose special tokens no plain text can reach."
            )
        left, right = text[: at + 1], text[at + 1 :]
        head = self.after_text(before, left, where) if before else self.start(left, where)
        return head + self.after_text(left, right, where)

    def _probe_after_token(self) -> bool:
        """Whether text after a special token is read as at the start of a sequence."""
        for text in self._special:
            ids = self.tokenizer(text + "USER", add_special_tokens=False)["input_ids"]
            if ids[:1] == [self.tokenizer.get_vocab().get(text)]:
                return bool(ids[1:] == self._read("USER", ""))
        return True


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Spellings that plain text must not turn into one token."""
    added = tokenizer.added_tokens_decoder.values()
    ours = {"<image>"}
    ours |= {token.name for name in TEMPLATES for token in TEMPLATES[name].tokens()}
    named = [token.content for token in added if token.special or token.content in ours]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *named]))


def _without_special(tokenizer: Any, special: tuple[str, ...]) -> Any:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise PumiceError(
            f"the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json form; a "
            "fast Hugging Face tokenizer is needed. Convert it with save_pretrained of its fast "
            "class, or take the language model's tokenizer.json."
        )
    data = json.loads(backend.to_str())
    # Non-special entries (runs of spaces, say) are ordinary text by the tokenizer's own word. The
    # special ones stay in the list, since taking them out would shift the ids of the others.
    for entry in data["added_tokens"]:
        entry["special"] = entry["special"] or entry["content"] in special
    data["post_processor"] = data["padding"] = data["truncation"] = None
    # Dropout of merges would give a prompt other ids than the text that was trained on.
    if "dropout" in data["model"]:
        data["model"]["dropout"] = None
    plain = Tokenizer.from_str(json.dumps(data))
    plain.encode_special_tokens = True
    return plain


def template_tokens(template: Template, text: TextEncoder) -> dict[Token, int]:
    """Ids of a template's special tokens; BOS alone may be missing."""
    found: dict[Token, int] = {}
    for token in (BOS, *template.tokens()):
        index = text.token_id(token)
        if index is not None:
            found[token] = index
        elif token != BOS:
            name = "an end token (eos_token)" if token == EOS else f"the token {token.name!r}"
            raise PumiceError(
                f"template {template.name!r} needs {name}, which the tokenizer lacks. Use another "
                f"template ({', '.join(TEMPLATES.names())}), or a tokenizer that has this token."
            )
    return found
