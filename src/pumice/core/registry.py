"""A visible table of interchangeable parts that answers a wrong name with the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from pumice.core.errors import PumiceError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: " Did you mean 'x'?", or "" when nothing is near."""
    spelled = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.6)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""


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
