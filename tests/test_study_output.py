"""A study's tables, plots and page, and how its runs are started."""

from __future__ import annotations

import csv
import io
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pumice.core.errors import PumiceError
from pumice.eval.benchmarks import BENCHMARKS
from pumice.study import launch
from pumice.study.analyse import Findings, Metric, between
from pumice.study.cells import arms_of, reference_arm
from pumice.study.launch import LocalProcesses, SlurmJobs
from pumice.study.page import plot_file, study_page
from pumice.study.plots import _named_ticks, _tick_lines, all_plots, apart, pareto_front
from pumice.study.results import ArmCost, ArmResult
from pumice.study.runner import Job, Stopped
from pumice.study.spec import StudyFile
from pumice.study.statistics import estimates, stacked
from pumice.study.tables import (
    cost_rows,
    csv_text,
    headline,
    interval_text,
    latex,
    markdown,
    metric_rows,
)

VQA = BENCHMARKS["vqav2"]
ACCURACY = Metric("vqav2", "accuracy")
SPEC: dict[str, Any] = {
    "name": "tiles & <tokens>",
    "base": "pocket",
    "axes": {
        "data": {"path": "stages.tune.data.0.cap", "values": [100, 200, 400], "unit": "rows"},
        "connector": {"path": "model.connector", "values": ["mlp2x_gelu", "linear"]},
    },
    "reference": {"data": "400"},
    "lengths": ["vqav2"],
    "against": [["connector", "vqav2.accuracy"]],
}


def findings() -> Findings:
    """An accuracy that rises with the data, and does not know the connector."""
    study = StudyFile.model_validate(SPEC)
    rng = np.random.default_rng(0)
    results = []
    for arm in arms_of(study):
        rows = int(dict(arm.levels)["data"])
        tables = {}
        for seed in study.seeds:
            right = rng.binomial(3, 0.5 + rows / 1000, size=200).astype(float)
            names = ["n", "n/all", "score", "score/all", "words"]
            asked = np.full_like(right, 3.0)
            tables[seed] = (names, np.stack([asked, asked, right, right, right], 1))
        flops = 1e12 * (1 + ("mlp" in arm.name))
        cost = ArmCost(36, 1000, flops, {"tune": 5}, tokens=5e4, seconds=90.0, memory=2**30)
        length = Counter({1: 90 + rows // 100, 7: 10})
        results.append(
            ArmResult(
                arm=arm,
                cost=cost,
                benchmarks={"vqav2": VQA},
                measured={"vqav2": stacked(tables)},
                lengths={"vqav2": length},
            )
        )
    base = next(r for r in results if r.arm == reference_arm(study, arms_of(study)))
    return Findings(
        study=study,
        reference=base.arm,
        metrics=(ACCURACY,),
        arms=tuple(results),
        means={
            r.arm.name: {str(ACCURACY): estimates(VQA, r.measured["vqav2"])["accuracy"]}
            for r in results
        },
        differences={
            r.arm.name: {} if r is base else between(base, r, [ACCURACY]) for r in results
        },
        claims=(),
    )


def test_tables_say_the_same_in_three_formats() -> None:
    found = findings()
    rows = metric_rows(found, ACCURACY)
    words = [row[3] for row in rows]
    assert words == ["worse", "worse", "worse", "worse", "reference", "no difference at this size"]
    assert cost_rows(found)[0][1:] == (
        "36", "1,000", "tune 5", "50,000", "2.00e+12", "1 min 30 s", "1.00 GiB",
    )  # fmt: skip
    lines = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [line["verdict"] for line in lines] == words and len(lines) == 6
    assert lines[0]["data"] == "100" and lines[0]["connector"] == "mlp2x_gelu"
    assert float(lines[0]["difference_high"]) < 0
    text = markdown(found)
    assert all(f"| {' | '.join(row)} |" in text for row in rows)
    tex = latex(found)
    assert tex.count(r"\\") == 7 and tex.count(r"^{\downarrow}") == 4 and "mlp2x\\_gelu" in tex
    assert "Worse: data 100, connector mlp2x_gelu / data 100, connector linear" in headline(found)


def test_plots_show_every_result(tmp_path: Path) -> None:
    plots = {plot.name: plot for plot in all_plots(findings())}
    assert list(plots) == [
        "effect-data-vqav2-accuracy", "effect-connector-vqav2-accuracy", "cost-vqav2-accuracy",
        "level-data-vqav2-accuracy", "level-connector-vqav2-accuracy", "lengths-vqav2",
    ]  # fmt: skip
    effects = plots["effect-data-vqav2-accuracy"].svg
    assert effects.count("dot clear") == 2 and "dot unclear" not in effects
    assert plots["effect-connector-vqav2-accuracy"].svg.count("dot unclear") == 1
    assert plots["cost-vqav2-accuracy"].svg.count("<circle") == 6
    assert plots["level-data-vqav2-accuracy"].svg.count('class="series') == 2
    assert plots["lengths-vqav2"].svg.count("<rect") == 12
    for plot in plots.values():
        numbers = re.findall(r' (?:x1|x2|y1|y2|cx|cy|x|y|height)="([^"]+)"', plot.svg)
        assert numbers and "nan" not in numbers
        assert min(map(float, numbers)) > -12
        file = plot_file(plot)
        assert file.startswith("<svg xmlns") and "<style>" in file


def test_the_front_is_what_none_beats_in_both() -> None:
    points = [(3.0, 5.0), (1.0, 1.0), (2.0, 4.0), (2.0, 3.0), (4.0, 5.0), (5.0, 6.0)]
    assert pareto_front(points) == [1, 2, 0, 5]


def test_the_page_stands_alone() -> None:
    found = findings()
    page = study_page(found, all_plots(found))
    assert "tiles &amp; &lt;tokens&gt;" in page and "<tokens>" not in page
    without_names = page.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in without_names and "https:" not in without_names
    assert "<script" not in page and "url(" not in page
    assert page.count('class="word down"') == 4


# --- starting runs ------------------------------------------------------------------------------


def job(root: Path) -> Job:
    return Job("key", root / "r.yaml", root / "out", root / "log.txt", root / "stages", None, None)


def test_a_process_says_why_it_failed(tmp_path: Path) -> None:
    started = LocalProcesses(1)
    error = started(job(tmp_path))
    assert error is not None and "r.yaml does not exist" in error and "exit code 2" in error
    assert "r.yaml does not exist" in (tmp_path / "log.txt").read_text()


def test_stopping_ends_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(launch, "command", lambda job: waits)
    started = LocalProcesses(1)
    seen: list[type[BaseException]] = []

    def run() -> None:
        try:
            started(job(tmp_path))
        except Stopped:
            seen.append(Stopped)

    thread = threading.Thread(target=run)
    thread.start()
    while not started._running:
        thread.join(0.01)
    started.stop()
    thread.join(20)
    assert seen == [Stopped]
    with pytest.raises(Stopped):
        started(job(tmp_path))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ValueError('broken')", "ValueError: broken (exit code 1)"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("import sys; print('x'); print('error: no such\\n  thing'); sys.exit(2)",
         "no such thing (exit code 2)"),
        ("pass", None),
    ],
)  # fmt: skip
def test_the_end_of_a_log_in_words(
    code: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "command", lambda job: [sys.executable, "-c", code])
    (tmp_path / "log.txt").write_text("error: of an earlier try\n")
    assert LocalProcesses(1)(job(tmp_path)) == said


def test_a_cluster_gets_a_job_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'a').write('once')"
    monkeypatch.setattr(launch, "command", lambda job: [sys.executable, "-c", code])
    cluster = SlurmJobs(tmp_path / "jobs", {"timeout_min": 5}, cluster="local")
    assert cluster(job(tmp_path)) is None and (tmp_path / "ran").read_text() == "once"
    code = "import sys; sys.exit('no GPU left')"
    error = cluster(job(tmp_path))
    assert error is not None and "no GPU left" in error


def test_a_cluster_needs_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(PumiceError, match=r"pumice\[slurm\]"):
        SlurmJobs(tmp_path, {})(job(tmp_path))


def test_no_negative_zero_is_written() -> None:
    assert interval_text(-0.001, (-0.5, 0.2), signed=True) == "+0.0 (-0.5 to +0.2)"
    assert interval_text(-0.001, (-0.04, 0.02), signed=True) == "+0.00 (-0.04 to +0.02)"
    assert interval_text(-0.04, (-1.04, 0.02)) == "0.0 (-1.0 to 0.0)"


def test_names_beside_dots_do_not_hide_each_other() -> None:
    assert apart([50.0, 10.0, 12.0, 100.0, 11.0], 14.0) == [52.0, 10.0, 38.0, 100.0, 24.0]


def test_names_below_an_axis_do_not_touch() -> None:
    few = [("low", 100.0), ("one view", 250.0), ("tiles without the whole", 400.0)]
    assert _tick_lines(few) == 1
    rungs = [(f"+ a long rung {n}", 80.0 + 65 * n) for n in range(9)]
    assert _tick_lines(rungs) == 2
    ends = [float(at) for at in re.findall(r'text x="([0-9.]+)"', "".join(_named_ticks(few, "x")))]
    assert ends[2] + 7.0 * len(few[2][0]) / 2 <= 640
    right = "".join(_named_ticks([("low", 100.0), ("tiles without the whole", 620.0)], "x"))
    assert 'x="559.5"' in right
