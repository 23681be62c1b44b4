"""Which replies of an endpoint become rows: read, filtered, and compared with those kept before."""

from __future__ import annotations

from collections.abc import Sequence

from pumice.core.files import HALF_CHARACTER, sha256_bytes
from pumice.core.llm_types import Reply
from pumice.data.engine_examples import Example
from pumice.data.engine_filters import fault_of, plain
from pumice.data.engine_prompts import Kind, Pair, read_pairs
from pumice.data.engine_scenes import Described
from pumice.data.near_texts import NearTexts
from pumice.data.row_layouts import SLOT


class Judge:
    """Judges replies in the order of their images, and remembers those it let pass."""

    def __init__(
        self, kind: Kind, language: str, near: float, examples: Sequence[Example] = ()
    ) -> None:
        self.kind, self.language, self.near = kind, language, near
        self._answers: set[str] = set()
        self._kept = NearTexts(near)
        for example in examples:
            self._kept.keep("an example", self._text(example.pairs))

    def __call__(self, scene: Described, reply: Reply) -> tuple[list[Pair], str | None]:
        """Questions and answers of a reply, and the reason why it is not kept."""
        if reply.failure is not None:
            return [], f"{reply.failure.kind}: {reply.failure.reason}"
        if reply.finish_reason == "length":
            return [], f"truncated: the reply was cut at {reply.completion_tokens} tokens"
        if HALF_CHARACTER.search(reply.text):
            return [], "malformed: it holds half a character (a lone surrogate)"
        if SLOT in reply.text:
            return [], f"malformed: it writes {SLOT}, the place of an image"
        pairs = read_pairs(self.kind, scene, reply.text)
        if pairs is None:
            # A refusal is told from other words without form, as it says more about the model.
            refused = fault_of(self.kind, [("", reply.text)], "any")
            if refused and refused.startswith("refusal"):
                return [], refused
            return [], "malformed: not in the form that was asked for"
        fault = fault_of(self.kind, pairs, self.language, self.near) or self._repeated(pairs)
        if fault is None:
            self._answers.add(_answers(pairs))
            self._kept.keep(f"image {scene.id!r}", self._text(pairs))
        return pairs, fault

    def _repeated(self, pairs: Sequence[Pair]) -> str | None:
        if _answers(pairs) in self._answers:
            return "duplicate: another image has the same answers"
        if found := self._kept.find(self._text(pairs)):
            name, measure = found
            return f"near_duplicate: {measure:.0%} of its three-word runs are shared with {name}"
        return None

    def _text(self, pairs: Sequence[Pair]) -> str:
        """What the model wrote: of a description the answer alone."""
        if self.kind.described_only:
            return pairs[0][1]
        return " ".join(text for pair in pairs for text in pair)


def _answers(pairs: Sequence[Pair]) -> str:
    return sha256_bytes(plain(" ".join(says for _, says in pairs)).encode())
