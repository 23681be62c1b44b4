"""The names of tensors in other projects' checkpoints and in ours: tables applied both ways.

A table has two columns of name beginnings, theirs and ours. The longest beginning that fits is
replaced; a name that no line fits is an error, in either direction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pumice.core.errors import PumiceError

# Tables that older releases stored although they follow from the config.
_COMPUTED = re.compile(r"(?:.+\.)?(?:rotary_emb\.inv_freq|embeddings\.position_ids)")


@dataclass(frozen=True)
class KeyMap:
    """Two columns of beginnings: (theirs, ours)."""

    layout: str
    """What has these names, as users call it."""
    lines: tuple[tuple[str, str], ...]

    def ours(self, name: str) -> str:
        """Their name -> ours."""
        return self._replaced(name, self.lines, "pumice")

    def theirs(self, name: str) -> str:
        """Our name -> theirs."""
        return self._replaced(name, tuple((b, a) for a, b in self.lines), self.layout)

    def fits(self, names: Iterable[str]) -> bool:
        """Whether every one of their names has a line."""
        return all(any(name.startswith(start) for start, _ in self.lines) for name in names)

    def read(self, names: Iterable[str]) -> dict[str, str]:
        """Their names -> a table our name: their name, without what follows from the config.

        Names that no line fits are one error that lists them.
        """
        kept = [name for name in names if not is_computed(name)]
        strange = [name for name in kept if not self.fits([name])]
        if strange:
            raise PumiceError(
                f"the weights hold tensors that {self.layout} does not have: "
                f"{', '.join(strange[:6])} ({len(strange)} of {len(kept)}). Its names begin with "
                f"{', '.join(start for start, _ in self.lines)}. Nothing is left out silently; "
                f"take these tensors away if they do not belong to the model."
            )
        return {self.ours(name): name for name in kept}

    def _replaced(self, name: str, lines: tuple[tuple[str, str], ...], to: str) -> str:
        fitting = [line for line in lines if name.startswith(line[0])]
        if not fitting:
            raise PumiceError(
                f"the tensor {name!r} has no name in the layout {to}; beginnings that have one: "
                f"{', '.join(start for start, _ in lines)}."
            )
        start, other = max(fitting, key=lambda line: len(line[0]))
        return other + name.removeprefix(start)


def is_computed(name: str) -> bool:
    """Whether a tensor follows from the config, so that nothing needs to be read."""
    return _COMPUTED.fullmatch(name) is not None


def _transformers(layout: str, top: str, vision: str, language: str, head: str) -> KeyMap:
    """transformers' LLaVA; `top` stands before its own parts."""
    return KeyMap(
        layout,
        (
            (vision, "vision.model."),
            (f"{top}multi_modal_projector.linear_1.", "connector.0."),
            (f"{top}multi_modal_projector.linear_2.", "connector.2."),
            (f"{top}image_newline", "row_end"),
            (language, "language.model.model."),
            (head, "language.model.lm_head."),
        ),
    )


# Published by llava-hf, and the one that vLLM reads.
HF_PUBLISHED = _transformers(
    "transformers LLaVA (published)",
    "",
    "vision_tower.vision_model.",
    "language_model.model.",
    "language_model.lm_head.",
)
# Since transformers 5.6 a model built there is saved so: its CLIP has no inner `vision_model`.
HF_FRESH = _transformers(
    "transformers LLaVA (saved by 5.6 and later)",
    "",
    "vision_tower.",
    "language_model.model.",
    "language_model.lm_head.",
)
# As the parts are named in memory; `save_original_format=False` writes these.
HF_MEMORY = _transformers(
    "transformers LLaVA (names in memory)",
    "model.",
    "model.vision_tower.",
    "model.language_model.",
    "lm_head.",
)
HF_MEMORY_OLD = _transformers(
    "transformers LLaVA (names in memory before 5.6)",
    "model.",
    "model.vision_tower.vision_model.",
    "model.language_model.",
    "lm_head.",
)
# haotian-liu/LLaVA: Llama's own names, with the other parts inside `model`.
LLAVA = KeyMap(
    "original LLaVA",
    (
        ("model.vision_tower.vision_tower.vision_model.", "vision.model."),
        ("model.mm_projector.", "connector."),
        ("model.image_newline", "row_end"),
        ("model.", "language.model.model."),
        ("lm_head.", "language.model.lm_head."),
    ),
)
# A vision backbone's own folder: all of CLIP or SigLIP, or the vision half alone.
VISION_WHOLE = KeyMap("a CLIP or SigLIP folder", (("vision_model.", "vision.model."),))
VISION_BARE = KeyMap("a vision backbone's folder", (("", "vision.model."),))
# A language model's own folder.
LANGUAGE = KeyMap("a language model's folder", (("", "language.model."),))

# The first that fits: the ones with the inner `vision_model` before those without.
HF_LAYOUTS = (HF_PUBLISHED, HF_FRESH, HF_MEMORY_OLD, HF_MEMORY)


def find_hf_layout(names: Iterable[str]) -> KeyMap:
    """The layout of transformers' LLaVA that these names are in, told by their beginnings."""
    kept = [name for name in names if not is_computed(name)]
    for layout in HF_LAYOUTS:
        # Every vision tensor must be under the layout's own beginning, not only fit another line.
        if layout.fits(kept) and any(name.startswith(layout.lines[0][0]) for name in kept):
            return layout
    tops = sorted({".".join(name.split(".")[:2]) for name in kept})
    raise PumiceError(
        f"the weights are in no layout of transformers' LLaVA: their names begin with "
        f"{', '.join(tops[:8])}. Known layouts begin with "
        f"{'; '.join(', '.join(start for start, _ in known.lines) for known in HF_LAYOUTS)}."
    )
