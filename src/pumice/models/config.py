"""The whole architecture of a model as data; config.json of a checkpoint holds it."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from pumice.core.errors import PumiceError
from pumice.core.registry import suggest
from pumice.models.vision import Select


@dataclass(frozen=True, slots=True, kw_only=True)
class LMMConfig:
    """Which parts a model is made of."""

    vision: dict[str, Any]
    """The Hugging Face config of the vision backbone, uncut; for a fused pair those of both."""
    vision_layer: int
    """The block whose output is used, counted as in transformers' hidden_states."""
    vision_select: Select
    """`patch` drops the class token, `cls_patch` keeps it."""
    vision_norm: bool = False
    """Whether the backbone's final norm is applied to that output."""
    connector: str
    """A name of the connector shelf."""
    connector_options: dict[str, Any] = field(default_factory=dict)
    """What the connector is told beyond its name."""
    tiling: dict[str, Any] | None = None
    """How large pictures are cut into tiles (`TilingSpec.to_dict`); None for one view a picture."""
    language: dict[str, Any]
    """The Hugging Face config of the language model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LMMConfig:
        """What `to_dict` wrote; unknown, missing or ill-typed fields are errors.

        Fields with a default may be absent: older files lack them.
        """
        names = [entry.name for entry in fields(cls)]
        for name in data:
            if name not in names:
                raise PumiceError(
                    f"the model config has the unknown field {name!r}; allowed: {', '.join(names)}."
                    f"{suggest(name, names)}"
                )
        missing = [entry.name for entry in fields(cls) if _needed(entry) and entry.name not in data]
        if missing:
            raise PumiceError(
                f"the model config lacks {', '.join(missing)}; needed: {', '.join(names)}. Take "
                f"the config.json the checkpoint was saved with."
            )
        for name, value in data.items():
            kinds = _KINDS.get(name, (str,))
            # A bool is an int to Python, and none of the whole numbers here may be one.
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                allowed = " or ".join(
                    "null" if kind is NoneType else kind.__name__ for kind in kinds
                )
                raise PumiceError(f"the model config's {name} is {value!r}; a {allowed} is needed.")
        return cls(**data)


NoneType = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "vision": (dict,),
    "vision_layer": (int,),
    "vision_norm": (bool,),
    "connector_options": (dict,),
    "tiling": (dict, NoneType),
    "language": (dict,),
}


def _needed(entry: Any) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING
