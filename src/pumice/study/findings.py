"""docs/findings.md from the records of studies: what was found, beside what the papers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pumice.study.spec import StudyFile
from pumice.study.tables import interval_text, markdown_table

Record = Mapping[str, Any]

_HEAD = """# Findings

What the pocket studies showed, beside what the papers found. Made by
`python benchmarks/findings.py` from `benchmarks/results/studies`; [study.md](study.md) says how
the intervals are made. *Shown* means that the whole 95 % interval, over other pictures and other
seeds, is on the claimed side; *not shown* that the study is too small to say.

A pocket world can tell whether a choice matters for a model that has to find, bind and name a few
things, and whether the pipeline learns what it should. It cannot tell how large the effect is on
photographs: its pictures are drawn, its language model knows 1,335 pieces of words, and it was
taught to read what a simple connector can say ([pocket.md](pocket.md)).
"""


def findings_text(records: Sequence[Record], studies: Mapping[str, StudyFile]) -> str:
    """The page. `studies` are the shipped ones; those without a record are listed as not run."""
    parts = [_HEAD]
    for record in records:
        parts += [f"## {record['name']}\n", f"{record['about']} ({record['source']}).\n"]
        parts += [_claims(record), _arms(record), _remarks(record)]
    known = {record["name"] for record in records}
    missing = [study for name, study in studies.items() if name not in known]
    if missing:
        lines = "\n".join(f"* `{study.name}`: {study.about}" for study in missing)
        parts.append(f"## Not run yet\n\nFiles that ship and have no record:\n\n{lines}\n")
    return "\n".join(part for part in parts if part)


def _claims(record: Record) -> str:
    rows = [("claim", "paper", "here: difference (95 %)", "")]
    for claim in record["claims"]:
        gap = "-"
        if claim["difference"] is not None:
            gap = interval_text(claim["difference"], claim["interval"], signed=True)
        found = f"{claim['metric']}, {claim['more']} less {claim['less']}: {gap}"
        rows.append((claim["text"], claim["paper"] or "-", found, f"**{claim['status']}**"))
    return markdown_table(rows) + "\n" if len(rows) > 1 else ""


def _arms(record: Record) -> str:
    rows = [("", *record["metrics"])]
    for arm in record["arms"]:
        cells = []
        for metric in record["metrics"]:
            own = arm["metrics"][metric]
            mean = "-" if own["mean"] is None else interval_text(own["mean"], own["interval"])
            cells.append(f"{mean}, {own['verdict']}")
        rows.append((arm["name"], *cells))
    return markdown_table(rows) + "\n"


def _remarks(record: Record) -> str:
    seeds, made = ", ".join(map(str, record["seeds"])), record["made_with"]
    lines = [
        f"Seeds {seeds}; base `{record['base']}`, equal {record['budget']['equal']}; differences "
        f"from *{record['reference']}*. pumice {made['pumice']}, torch {made['torch']}."
    ]
    lines += [f"Not testable here: {text}." for text in record["not_testable"]]
    lost = sum(len(arm["errors"]) for arm in record["arms"])
    if lost:
        lines.append(f"{lost} runs have no result.")
    return "\n\n".join(lines) + "\n"
