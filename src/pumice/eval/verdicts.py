"""What a judge told about an answer: as it is kept in rows, and as numbers run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

VERDICTS, JUDGED_BY = "verdicts", "judged_by"
"""The keys in a prediction's `extra`: the verdicts, and what says by whom and on which words."""
Values = tuple[float, ...]
_UNREAD = "-"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One reply of a judge on one answer.

    `values` are the numbers in it, None when its form cannot be read; `error` says why there is no
    reply at all. `model` is the endpoint's name for who replied, where another was asked for.
    """

    content: str = ""
    values: Values | None = None
    error: str | None = None
    model: str = ""


def verdicts_in(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Of a prediction's `extra`, what a judge gave."""
    return {name: extra[name] for name in (JUDGED_BY, VERDICTS) if name in extra}


def as_plain(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Verdicts as JSON values."""
    plain = [asdict(verdict) for verdict in verdicts]
    return [
        {name: value for name, value in row.items() if name != "model" or value} for row in plain
    ]


def from_plain(rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """What `as_plain` gave, also after a way through a file."""
    return [
        Verdict(
            row["content"],
            row["values"] and tuple(row["values"]),
            row["error"],
            row.get("model", ""),
        )
        for row in rows
    ]


def write_values(runs: Sequence[Values | None]) -> str | None:
    """The numbers of all runs as a text, "8 6.5; 9 7; -"; None when none could be read."""
    if not any(runs):
        return None
    return "; ".join(_UNREAD if run is None else " ".join(map(_number, run)) for run in runs)


def read_values(parsed: str | None) -> list[Values | None]:
    """What `write_values` gave; [] for None."""
    if parsed is None:
        return []
    return [
        None if run == _UNREAD else tuple(map(float, run.split(" "))) for run in parsed.split("; ")
    ]


def _number(value: float) -> str:
    return str(int(value)) if value == value and value.is_integer() else repr(value)
