"""Writes docs/findings.md from the studies' records in benchmarks/results/studies.

    python benchmarks/findings.py

A record is the study.json that `pumice study` leaves in its --out directory, copied there under the
study's name.
"""

from __future__ import annotations

import json
from pathlib import Path

from pumice.study.findings import findings_text
from pumice.study.spec import load_study, study_names

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "studies"


def text() -> str:
    """The page."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return findings_text(records, {name: load_study(name)[0] for name in study_names()})


if __name__ == "__main__":
    (ROOT / "docs" / "findings.md").write_text(text())
