"""docs/findings.md from finished studies: what was found, beside what the papers say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pumice.core.files import read_json
from pumice.study.analyse import SHOWN, STATUSES
from pumice.study.plots import slug
from pumice.study.report import PLOTS, RECORD
from pumice.study.spec import StudyFile
from pumice.study.tables import interval_text, markdown_table

Record = Mapping[str, Any]
# Where the finished studies lie, seen from the page.
_KEPT = "../benchmarks/results/studies"

_HEAD = f"""# Findings

What the pocket studies showed, beside what the papers found. Made by
`python benchmarks/findings.py` from [benchmarks/results/studies]({_KEPT}),
which has every study's record, tables and plots; [study.md](study.md) says how the intervals are
made. *Shown* means that the whole 95 % interval, over other pictures and other seeds, is on the
claimed side, *the opposite* that it is on the other; *not shown* that it holds both: there is no
such effect, or it is too small for this many pictures and seeds. How wide the interval is tells
which of the two is likely.

A pocket world can tell whether a choice matters for a model that has to find, bind and name a few
things, and whether the pipeline learns what it should. It cannot tell how large the effect is on
photographs: its pictures are drawn, its language model knows 1,335 pieces of words, and it was
taught to read what a simple connector can say ([pocket.md](pocket.md)).
"""


def findings_text(kept: Path, studies: Mapping[str, StudyFile]) -> str:
    """The page of the studies in `kept`, each as `pumice study` wrote it into a folder of its name.

    `studies` are the shipped ones; those without a record are listed as not run.
    """
    records = [read_json(path) for path in sorted(kept.glob(f"*/{RECORD}"))]
    parts = [_HEAD, _glance(records)]
    for record in records:
        parts += [f"## {record['name']}\n", f"{record['about']} ({record['source']}).\n"]
        parts += [_claims(record), _plots(record), _arms(record), _remarks(record)]
    known = {record["name"] for record in records}
    missing = [study for name, study in studies.items() if name not in known]
    if missing:
        lines = "\n".join(f"* `{study.name}`: {study.about}" for study in missing)
        parts.append(f"## Not run yet\n\nFiles that ship and have no record:\n\n{lines}\n")
    return "\n".join(part for part in parts if part)


def _glance(records: Sequence[Record]) -> str:
    """How many claims are shown, and those that are not."""
    claims = [(record["name"], claim) for record in records for claim in record["claims"]]
    counts = Counter(claim["status"] for _, claim in claims)
    found = ", ".join(f"{counts[word]} {word}" for word in STATUSES if counts[word])
    untestable = len({text for record in records for text in record["not_testable"]})
    found += f"; {untestable} more cannot be tested here" if untestable else ""
    lines = [f"Of {len(claims)} claims of the papers: {found}."]
    apart = [
        f"* {name}: {claim['text']}: {claim['status']}, {_gap(claim)}"
        for name, claim in claims
        if claim["status"] != SHOWN
    ]
    if apart:
        lines.append("Where the pocket studies do not follow the papers:")
        lines.append("\n".join(apart))
    return "\n\n".join(lines) + "\n"


def _claims(record: Record) -> str:
    rows = [("claim", "paper", "here: difference (95 %)", "")]
    for claim in record["claims"]:
        found = f"{claim['metric']}, {claim['more']} less {claim['less']}: {_gap(claim)}"
        rows.append((claim["text"], claim["paper"] or "-", found, f"**{claim['status']}**"))
    return markdown_table(rows) + "\n" if len(rows) > 1 else ""


def _gap(claim: Mapping[str, Any]) -> str:
    if claim["difference"] is None:
        return "-"
    return interval_text(claim["difference"], claim["interval"], signed=True)


def _plots(record: Record) -> str:
    """Plots of what is claimed, of cost and of lengths; the others are beside them."""
    claimed = tuple(f"-{slug(claim['axis'])}-{slug(claim['metric'])}" for claim in record["claims"])
    return "\n".join(
        f"![{title}]({_KEPT}/{record['name']}/{PLOTS}/{name}.svg)\n"
        for name, title in record["plots"].items()
        if name.startswith(("cost-", "lengths-")) or name.endswith(claimed)
    )


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
