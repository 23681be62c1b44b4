"""Names that people choose from: a wrong one is answered with the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from pumice.core.errors import PumiceError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: " Did you mean 'x'?", or "" when nothing is near."""
    spelled = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.6)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""


def check_choice(name: str, given: object, allowed: Sequence[str]) -> None:
    """Raises PumiceError, with the nearest allowed one, unless the value `name` is one of these."""
    if given not in allowed:
        raise PumiceError(
            f"{name} is {given!r}; allowed: {', '.join(allowed)}.{suggest(str(given), allowed)}"
        )


def check_settings(
    kind: str, values: Mapping[str, object], known: Sequence[str], needed: Sequence[str]
) -> None:
    """Raises PumiceError for an unknown or a missing key of the settings of `kind`."""
    for key in values:
        if key not in known:
            raise PumiceError(
                f"{kind} setting {key!r} is unknown; known: {', '.join(known)}."
                f"{suggest(key, known)}"
            )
    missing = [key for key in needed if key not in values]
    if missing:
        raise PumiceError(
            f"{kind} settings lack {' and '.join(missing)}; given: {sorted(values)}. Add them."
        )


class Registry(Generic[T]):
    """A table from name to part. It is built from one visible dict and never changes."""

    def __init__(self, kind: str, table: dict[str, T]) -> None:
        self.kind = kind
        self._table = dict(table)

    def __getitem__(self, name: str) -> T:
        """The part called `name`; an unknown name is an error that lists the known ones."""
        if name not in self._table:
            known = ", ".join(self._table) or "none"
            raise PumiceError(
                f"{self.kind} {name!r} is unknown; known: {known}.{suggest(name, self._table)}"
            )
        return self._table[name]

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def names(self) -> tuple[str, ...]:
        """The known names in the order of the table."""
        return tuple(self._table)
