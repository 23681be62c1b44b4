"""Writes docs/findings.md from the studies kept in benchmarks/results/studies.

    python benchmarks/findings.py [OUT ...]

OUT is what `pumice study --out OUT` wrote: its record, tables and plots are kept first, in a folder
of the study's name.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from pumice.study.findings import findings_text
from pumice.study.report import PLOTS, RECORD, TABLES
from pumice.study.spec import load_study, study_names

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "studies"


def keep(out: Path) -> None:
    """Everything of a finished study but the page, which holds the same once more."""
    folder = KEPT / json.loads((out / RECORD).read_text())["name"]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out / PLOTS, folder / PLOTS)
    for name in (RECORD, *TABLES):
        shutil.copy(out / name, folder / name)


def main() -> None:
    """Keep what is named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="*", type=Path, help="an --out directory of pumice study")
    for out in parser.parse_args().out:
        keep(out)
    studies = {name: load_study(name)[0] for name in study_names()}
    (ROOT / "docs" / "findings.md").write_text(findings_text(KEPT, studies))


if __name__ == "__main__":
    main()
