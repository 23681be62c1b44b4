"""The whole architecture of a model as data; config.json of a checkpoint holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.registry import suggest
from pumice.models.vision import Select


@dataclass(frozen=True, slots=True, kw_only=True)
class LMMConfig:
    """Which parts a model is made of."""

    vision: dict[str, Any]
    """The Hugging Face config of the vision backbone, uncut."""
    vision_layer: int
    """The block whose output is used, counted as in transformers' hidden_states."""
    vision_select: Select
    """`patch` drops the class token, `cls_patch` keeps it."""
    connector: str
    """A name of the connector shelf."""
    language: dict[str, Any]
    """The Hugging Face config of the language model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LMMConfig:
        """What `to_dict` wrote; unknown, missing or ill-typed fields are errors."""
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise PumiceError(
                    f"the model config has the unknown field {name!r}; allowed: {', '.join(names)}."
                    f"{suggest(name, names)}"
                )
        missing = [name for name in names if name not in data]
        if missing:
            raise PumiceError(
                f"the model config lacks {', '.join(missing)}; needed: {', '.join(names)}. Take "
                f"the config.json the checkpoint was saved with."
            )
        kinds = {"vision": dict, "language": dict, "vision_layer": int}
        for name in names:
            kind = kinds.get(name, str)
            if not isinstance(data[name], kind):
                raise PumiceError(
                    f"the model config's {name} is {data[name]!r}; a {kind.__name__} is needed."
                )
        return cls(**data)
