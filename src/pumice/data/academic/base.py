"""What converters share: rules with names, official files, rows in LLaVA's layout, and the count.

A converter is a function from a `Task` to rows. Every rule it follows is a field of its `Rules`,
with LLaVA-1.5's value as default; everything it leaves out or changes is counted by reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pumice.core.errors import DataError, PumiceError, some_of
from pumice.core.files import read_json
from pumice.core.registry import check_settings
from pumice.data.row_layouts import SLOT

T = TypeVar("T")
K = TypeVar("K")
Row = dict[str, Any]
COCO_IMAGE = "coco/train2017/{image_id:012d}.jpg"


class Rules(BaseModel):
    """The rules of a converter; the description of a field says what it decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)


R_co = TypeVar("R_co", bound=Rules, covariant=True)


@dataclass(slots=True)
class Tally:
    """What became of what was read: nothing leaves a converter uncounted."""

    read: int = 0
    rows: int = 0
    rounds: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """What is in no row, by reason."""
    changed: Counter[str] = field(default_factory=Counter)
    """What is in a row otherwise than it was read, by what was done."""


class Official:
    """The official annotation files that were given, each read once, found by what they hold."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    @cached_property
    def contents(self) -> list[tuple[Path, Any]]:
        """Every file and its content."""
        return [(path, read_json(path)) for path in self.files]

    def with_key(self, key: str, usual: str) -> tuple[Path, dict[str, Any]]:
        """The one file that is an object with this key; `usual` is its official name."""
        found = [(p, c) for p, c in self.contents if isinstance(c, dict) and key in c]
        if len(found) != 1:
            raise DataError(
                f"{len(found) or 'none'} of the files {self._named()} {_has(len(found))} "
                f"{key!r}; exactly one must, officially {usual}. Give it with --annotations."
            )
        return found[0]

    def mappings(self, usual: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every file; one that is no object is an error."""
        return self._all(dict, "an object {...}", usual)

    def lists(self, usual: str) -> Iterator[tuple[Path, list[Any]]]:
        """Every file; one that is no list is an error."""
        return self._all(list, "a list [...]", usual)

    def _all(self, kind: type[T], word: str, usual: str) -> Iterator[tuple[Path, T]]:
        for path, content in self.contents:
            if not isinstance(content, kind):
                raise DataError(
                    f"{path} is a JSON {type(content).__name__}; {word} is needed, as in "
                    f"{usual}. Take the official file."
                )
            yield path, content

    def _named(self) -> str:
        return some_of([str(path) for path in self.files])


def _has(count: int) -> str:
    return "have" if count > 1 else "has"


@dataclass(frozen=True, slots=True)
class Task(Generic[R_co]):
    """What a converter is given, and where it counts."""

    official: Official
    rules: R_co
    tally: Tally


class Converter(NamedTuple):
    """A line of the table of sources."""

    about: str
    files: str
    """The official names of the annotation files."""
    rules: type[Rules]
    rows: Callable[[Task[Any]], Iterable[Row]]


def read_rules(source: str, kind: type[Rules], given: Mapping[str, str]) -> Rules:
    """The rules with the given ones changed; values are text, and `null` stands for none."""
    check_settings(source, given, tuple(kind.model_fields), ())
    values = {key: None if text in {"null", "none"} and key != "format" else text
              for key, text in given.items()}  # fmt: skip
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise PumiceError(
            f"rule {key} of {source} is {given[key]!r}: {first['msg']}. It decides: "
            f"{kind.model_fields[key].description} Its default is "
            f"{kind.model_fields[key].default!r}."
        ) from error


def take(entry: object, key: str, kind: type[T] | tuple[type[T], ...], where: str) -> T:
    """`entry[key]`, which must be of this kind; anything else is an error that names the entry."""
    if not isinstance(entry, dict) or key not in entry:
        given = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(
            f"{where}: {key!r} is needed, given {given}. This is not the official format; take the "
            f"official file, or correct this entry."
        )
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(entry.__name__ for entry in kinds)
        raise DataError(
            f"{where}: {key!r} is {value!r:.80}; {wanted} is needed. Correct this entry, or take "
            f"the official file."
        )
    return value


def image_name(template: str, **known: Any) -> str:
    """The file name of an image by a rule such as `coco/train2017/{image_id:012d}.jpg`."""
    try:
        return template.format_map(known)
    except (KeyError, ValueError, IndexError) as error:
        names = ", ".join(f"{{{name}}}" for name in known)
        raise PumiceError(
            f"rule image is {template!r}, which does not fit {known} ({error}); allowed: text with "
            f"{names}. Correct the rule."
        ) from error


def llava_row(name: str, image: str | None, rounds: Sequence[tuple[str, str]]) -> Row:
    """A row of LLaVA's JSON; with an image, its slot stands before the first question."""
    row: Row = {"id": name} if image is None else {"id": name, "image": image}
    slot = "" if image is None else f"{SLOT}\n"
    row["conversations"] = [
        {"from": speaker, "value": value}
        for number, (asked, answer) in enumerate(rounds)
        for speaker, value in (("human", asked if number else slot + asked), ("gpt", answer))
    ]
    return row


def grouped(pairs: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    """The values of each key, keys and values in the order they came."""
    groups: dict[K, list[T]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def segments(entries: Sequence[T], most: int | None) -> list[Sequence[T]]:
    """The entries in pieces of at most so many; None: in one piece."""
    size = most or max(len(entries), 1)
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def drawn(entries: Sequence[T], count: int, *key: object) -> list[T]:
    """`count` of the entries in their order, chosen by the key alone; all if there are fewer."""
    rng = random.Random(" ".join(map(str, key)))
    places = sorted(rng.sample(range(len(entries)), min(count, len(entries))))
    return [entries[place] for place in places]


def stem(image: str) -> str:
    """The name of an image without folders and ending: the id of its row."""
    return Path(image).stem


def clean(value: object) -> str:
    """An annotator's text or number as text, without spaces around it."""
    return str(value).strip()
