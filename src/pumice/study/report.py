"""Writes what a study shows: study.json, tables, plots and one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pumice.core.files import write_atomic, write_json
from pumice.study.analyse import Findings, analyse
from pumice.study.cells import Cell
from pumice.study.page import plot_file, study_page
from pumice.study.plots import all_plots
from pumice.study.spec import StudyFile
from pumice.study.store import Store
from pumice.study.tables import csv_text, latex, markdown

RECORD = "study.json"
PAGE = "study.html"


def write_report(study: StudyFile, cells: Sequence[Cell], store: Store, out: Path) -> Findings:
    """Reads the finished runs and writes everything into `out`."""
    findings = analyse(study, cells, store)
    write_json(out / RECORD, findings.to_dict())
    write_atomic(out / "study.md", markdown(findings))
    write_atomic(out / "study.csv", csv_text(findings))
    write_atomic(out / "study.tex", latex(findings))
    plots = all_plots(findings)
    for plot in plots:
        write_atomic(out / "plots" / f"{plot.name}.svg", plot_file(plot))
    write_atomic(out / PAGE, study_page(findings, plots))
    return findings
