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
TABLES = ("study.md", "study.csv", "study.tex")
PLOTS = "plots"


def write_report(study: StudyFile, cells: Sequence[Cell], store: Store, out: Path) -> Findings:
    """Reads the finished runs and writes everything into `out`."""
    findings = analyse(study, cells, store)
    for name, text in zip(TABLES, (markdown, csv_text, latex), strict=True):
        write_atomic(out / name, text(findings))
    plots = all_plots(findings)
    titles = {plot.name: plot.title for plot in plots}
    write_json(out / RECORD, findings.to_dict() | {"plots": titles})
    for plot in plots:
        write_atomic(out / PLOTS / f"{plot.name}.svg", plot_file(plot))
    write_atomic(out / PAGE, study_page(findings, plots))
    return findings
