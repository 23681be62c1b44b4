"""processor.json: what a saved processor is, checked field by field.

Fields that later versions added may be absent in older files; everything else is strict.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pumice.core.errors import PumiceError
from pumice.core.files import entries_of, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROCESSOR_FILE = "processor.json"
FORMAT, VERSION = "pumice-processor", 1
INSTRUCTION_FOLDER = "qformer_tokenizer"
_FIELDS = ("format", "version", "template", "system", "image", "image_tokens", "check")
# Absent in older files, and where they say nothing.
_OPTIONAL = {"view_side": None, "image_mark": False, "instruction": None}


def read_processor_file(directory: Path) -> dict[str, Any]:
    """The fields of a directory's processor.json; anything else there is an error."""
    path = directory / PROCESSOR_FILE
    if not path.is_file():
        raise PumiceError(
            f"{directory} holds no {PROCESSOR_FILE} (found: {entries_of(directory)}); a "
            "pumice checkpoint directory is needed. Check the path, or convert the model first."
        )
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise PumiceError(
            f"{path} is not a processor file of version {VERSION}; it must hold "
            f'"format": "{FORMAT}" and "version": {VERSION}. Save the processor again, or use the '
            "version of pumice that wrote it."
        )
    data = _OPTIONAL | data
    wrong = sorted(set(data) ^ {*_FIELDS, *_OPTIONAL}) + [
        key for key, fits in _FITS.items() if key in data and not fits(data[key])
    ]
    if wrong:
        raise PumiceError(
            f"{path}: unknown, missing or wrongly typed: {', '.join(wrong)}; its fields are "
            f"{', '.join(_FIELDS)}. Save the processor again."
        )
    return data


_FITS: dict[str, Callable[[Any], bool]] = {
    "template": lambda value: isinstance(value, dict),
    "image": lambda value: isinstance(value, dict),
    "system": lambda value: value is None or isinstance(value, str),
    "image_tokens": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "view_side": lambda value: value is None or type(value) is int,
    "image_mark": lambda value: isinstance(value, bool),
    "instruction": lambda value: value in (None, "language", INSTRUCTION_FOLDER),
    "check": lambda value: (
        isinstance(value, dict)
        and isinstance(value.get("text"), str)
        and isinstance(value.get("ids"), list)
    ),
}


def read_instruction(
    directory: Path, given: str | None
) -> PreTrainedTokenizerFast | Literal["language"] | None:
    """What reads the instruction for the connector, by the field's value."""
    from transformers import PreTrainedTokenizerFast

    if given is None:
        return None
    if given == "language":
        return "language"
    return PreTrainedTokenizerFast.from_pretrained(directory / INSTRUCTION_FOLDER)
