"""What a stage says of its data: the rows, how they were mixed, and what `data verify` found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.train.fingerprint import told

if TYPE_CHECKING:
    from pumice.data.mixture import Mixture
    from pumice.train.stages import DataSpec

_KEPT = ("policy", "rows_with_errors", "counts", "checked", "dropped")


def data_card(data: Sequence[DataSpec], out: Path) -> list[dict[str, Any]]:
    """One entry for each source; `verified` is None where no manifest fits the data as it is.

    Of a file that `pumice data mix` made, `mixture` is the record; else None.
    """
    from pumice.data.mix import read_record
    from pumice.data.verify_files import read_summary

    card = []
    for entry in data:
        source = entry.open()
        summary = read_summary(entry.path, source.fingerprint())
        verified = summary and {key: summary[key] for key in _KEPT if key in summary}
        card.append(
            {
                "path": told(entry.path, out),
                "rows": len(source),
                "mixture": read_record(entry.path, source.fingerprint()),
                "verified": verified,
            }
        )
    return card


def rows_record(mixture: Mixture) -> dict[str, Any]:
    """How many rows an epoch of a stage has, and the hash that says which."""
    return {"epoch": len(mixture), "sha256": mixture.rows_hash()}


def card_text(entry: dict[str, Any]) -> str:
    """An entry of the card in words."""
    rows, verified, mixture = f"{entry['rows']:,} rows", entry["verified"], entry.get("mixture")
    if mixture:
        rows += f" of {mixture['mixture']} (ids {mixture['ids_sha256'][:12]})"
    if verified is None:
        return f"{entry['path']}: {rows}, not verified"
    counts = ", ".join(f"{count:,} {kind}" for kind, count in verified["counts"].items())
    bad = verified["rows_with_errors"]
    words = f"{entry['path']}: {rows}, verified, {f'{bad:,} with errors' if bad else 'no errors'}"
    dropped = verified.get("dropped")
    if dropped:
        words += f"; {dropped['rows']:,} bad rows were dropped"
    return f"{words} ({counts})" if counts else words
