"""report.html of `pumice eval`: the scores, published ones beside them, and the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pumice.core.files import read_json
from pumice.eval.benchmark import Benchmark
from pumice.eval.browser import browse
from pumice.eval.categories import category_section
from pumice.eval.published import published_section
from pumice.eval.report import ReportData, score_row, write_report
from pumice.eval.runner import SCORES
from pumice.eval.scores import Scores

# What the control changes in a protocol: it shows other images, so the items are others too.
_OF_CONTROL = ("control", "items_hash", "fingerprint")


def report_eval(model: str, runs: Sequence[tuple[Benchmark, Path, Scores]], out: Path) -> Path:
    """Writes `out`/report.html of benchmarks with the directories they were run in.

    Where the same model was asked the same with shuffled images into `out` before, these scores
    stand beside. A control's own page is report-shuffled.html or report-blank.html: it is run into
    the place of the scores it belongs to, and their page stays.
    """
    scores = [own for _, _, own in runs]
    controls = {own.protocol.get("control") for own in scores} - {None}
    path = out / f"{'-'.join(['report', *sorted(map(str, controls))])}.html"
    page = ReportData(
        title=model,
        about="".join(
            f"A control: asked with {name} images." for name in sorted(map(str, controls))
        ),
        scores=[
            score_row(
                own,
                bench.title,
                bench.headline,
                blind=_with_other_images(folder, own),
                most=bench.most,
            )
            for bench, folder, own in runs
        ],
        published="" if controls else published_section(scores),
        categories=category_section([(bench, own) for bench, _, own in runs]),
        browser=browse(runs),
        footnotes=[f"{own.benchmark}: {line}" for own in scores for line in own.notes],
    )
    write_report(path, page)
    return path


def _with_other_images(folder: Path, own: Scores) -> Scores | None:
    """The scores of the shuffled control that lies beside this run and belongs to it, if any."""
    path = folder.with_name(f"{folder.name}-shuffled") / SCORES
    if not path.is_file():
        return None
    found = Scores.from_dict(read_json(path))
    names = [name for name in (*own.protocol, *found.protocol) if name not in _OF_CONTROL]
    alike = all(own.protocol.get(name) == found.protocol.get(name) for name in names)
    return found if alike and found.origin.get("weights") == own.origin.get("weights") else None
