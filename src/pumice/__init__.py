"""pumice: find, build, judge and serve the best recipe for a large multimodal model.

`pumice.load("pocket").ask("What is this?", images=["cat.jpg"])` answers; the rooms are packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pumice.core.errors import DataError, PumiceError
    from pumice.core.types import Message, Request, Result, Sampling, assistant, user
    from pumice.infer.model import Model, load

# Looked up on first use: torch and transformers take seconds to import, and `pumice --help` must
# answer at once.
_HOMES = {
    "DataError": "pumice.core.errors",
    "PumiceError": "pumice.core.errors",
    "Message": "pumice.core.types",
    "Request": "pumice.core.types",
    "Result": "pumice.core.types",
    "Sampling": "pumice.core.types",
    "assistant": "pumice.core.types",
    "user": "pumice.core.types",
    "Model": "pumice.infer.model",
    "load": "pumice.infer.model",
}

__version__ = "0.1.0"
__all__ = [
    "DataError",
    "Message",
    "Model",
    "PumiceError",
    "Request",
    "Result",
    "Sampling",
    "assistant",
    "load",
    "user",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pumice' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
