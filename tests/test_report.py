"""The report: self-contained, escaped, honest about withheld scores; charts put points right."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from transformers import PreTrainedTokenizerFast

import tiny
from pumice.cli.run_report import _tiling
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.charts import interval_plot, loss_chart, nice_ticks, running_mean
from pumice.eval.dot_plot import Dot, dot_plot
from pumice.eval.examples import pick_examples
from pumice.eval.report import (
    Example,
    ReportData,
    ScoreRow,
    Tiling,
    score_row,
    verdict,
    write_report,
)
from pumice.eval.runner import rescore
from pumice.models.tiling import TilingSpec
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor

VOID = {"meta", "img", "br", "wbr", "line", "circle", "path", "rect"}


class Balance(HTMLParser):
    """Reads a page and notes every tag that is not closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


def picture(size: tuple[int, int], mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new(mode, size, 90).save(buffer, "PNG")
    return buffer.getvalue()


def full_report() -> ReportData:
    scores = [
        ScoreRow(
            title="POPE",
            metric="mean f1",
            value=92.4,
            interval=(91.2, 93.5),
            base_rate=66.7,
            blind=51.3,
            n=9000,
        ),
        ScoreRow(title="Detail", metric="f1", value=None, n=10, note="3 items ended in an error"),
    ]
    examples = [
        Example(question="q?", answer="</div><script>", truth="a & b", right=False, image=image)
        for image in (picture((72, 72)), picture((900, 600)), picture((9, 9), "L"), None)
    ]
    return ReportData(
        title="runs/pocket <1>",
        scores=scores,
        curves={"align": [(n, 4 / n) for n in range(1, 900)], "tune": [(1, 1.0)]},
        examples=examples,
        recipe="# a recipe\nseed: 0  # why\nname: '<b>'\n",
        facts={"Seed": "0", "Data": "a/b_c"},
        costs=[{"Part": "align", "Time": "38 s"}, {"Part": "tune", "Time": "3 min"}],
    )


def test_the_page_is_well_formed_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full_report())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Balance()
    reader.feed(page)
    assert not reader.open and not reader.wrong
    assert "script" not in reader.tags and "link" not in reader.tags
    assert [address[:11] for address in reader.addresses] == ["data:image/"] * 3
    assert not re.search(r"https?://|url\((?!#)|@import", page)
    # Paths may be broken behind their signs, and are then not broken within a word.
    assert "<h1>runs/<wbr>pocket &lt;1&gt;</h1>" in page and "<dd>a/<wbr>b_<wbr>c</dd>" in page
    assert "a &amp; b" in page and "&lt;b&gt;" in page


def test_every_section_is_there_and_an_empty_one_is_not(tmp_path: Path) -> None:
    write_report(tmp_path / "full.html", full_report())
    full = (tmp_path / "full.html").read_text(encoding="utf-8")
    titles = ["Scores", "Training", "Held-out images", "Time and memory", "Recipe"]
    assert re.findall("<h2>(.*?)</h2>", full) == titles
    assert full.count('class="chart"') == 2 and "withheld" in full
    assert "3 items ended in an error" in full
    write_report(tmp_path / "bare.html", ReportData(title="bare", scores=[]))
    assert "<h2>" not in (tmp_path / "bare.html").read_text(encoding="utf-8")


def test_tiles_are_shown_where_a_model_tiles(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    tiling = Tiling(drawing=picture((300, 200)), words="2 x 1 tiles & 40 image tokens")
    write_report(path, ReportData(title="hd", scores=[], tiling=tiling))
    page = path.read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == ["Tiles"]
    assert "2 x 1 tiles &amp; 40 image tokens" in page
    assert page.count('class="tiles" alt="The image cut into tiles" src="data:image/png;') == 1


def test_the_largest_example_is_tiled(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.tokenizer_folder(tmp_path / "words"))
    examples = [
        Example(question="q", answer="a", truth="a", right=True, image=image)
        for image in (picture((20, 20)), picture((64, 32)), None)
    ]
    hd = ImageSpec("pad", 32, tiling=TilingSpec("hd", 32))
    for spec, extra, said in [
        (hd, {"view_side": 4}, "2 x 1 tiles of 32 pixels, 3 views and 52 image tokens: 16 of"),
        (hd, {"image_mark": True}, "3 views and one position in the text"),
        (ImageSpec("pad", 32), {"view_side": 4}, None),
    ]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        Processor(tokenizer, spec, "vicuna_v1", "", 16, **extra).save(folder)  # type: ignore[arg-type]
        tiling = _tiling(folder, examples)
        assert (tiling is None) == (said is None)
        if tiling is not None and said is not None:
            assert said in tiling.words
            assert PIL.Image.open(io.BytesIO(tiling.drawing)).format == "PNG"
        assert _tiling(folder, examples[2:]) is None


def test_small_pictures_stay_exact_and_large_ones_shrink(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full_report())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<img class="small"') == 2
    assert len(re.findall("data:image/jpeg", page)) == 1 and len(page) < 60_000


def test_a_score_is_drawn_at_its_value() -> None:
    strip = interval_plot(92.4, (91.2, 93.5), 66.7, 101.0)
    assert 'class="score" cx="92.40%"' in strip
    assert 'class="interval" x1="91.20%" x2="93.50%"' in strip
    assert 'class="base" x1="66.70%"' in strip
    assert 'class="blind" cx="100.00%"' in strip
    assert 'class="score"' not in interval_plot(None, None, 50, None)


def test_dots_stand_in_their_order_and_within_the_axis() -> None:
    dots = [Dot("A", 10.0), Dot("B", 30.0), Dot("me", 20.0, (5.0, 35.0), own=True, other=True)]
    plot = dot_plot(dots, "T & U")
    assert 'aria-label="T &amp; U: B 30.0, me 20.0, A 10.0"' in plot
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', plot)]
    b, me, a = places
    assert me - a == pytest.approx(b - me, abs=0.11) and a < me
    [(low, high)] = re.findall(r'class="interval" x1="([\d.]+)" x2="([\d.]+)"', plot)
    left, right = float(low), float(high)
    assert (right - left) == pytest.approx((b - a) * 30 / 20, abs=0.3)
    ticks = {float(t): float(x) for x, t in re.findall(r'"tick" x="([\d.]+)"[^>]*>(\d+)<', plot)}
    # Whole marks, also at the ends.
    assert 136 + 5 < left and right < 280 - 5
    assert len(ticks) >= 3 and ticks[20] == pytest.approx(me, abs=0.11)
    assert dot_plot([Dot("A", 1.0)], "one").count("<circle") == 1


def test_the_loss_axis_is_logarithmic_only_when_the_loss_falls_far() -> None:
    far = loss_chart([(n, 5.0 * 0.99**n + 0.01) for n in range(800)], "align")
    near = loss_chart([(n, 2.0 - n / 1000) for n in range(800)], "tune")
    assert "log scale" in far and "log scale" not in near
    assert loss_chart([(1, float("nan"))], "empty") == ""
    for chart in (far, near, loss_chart([(5, 0.0)], "one"), loss_chart([(0, 2.0)] * 3, "flat")):
        places = [float(y) for y in re.findall(r'class="end" cx="[\d.]+" cy="([-\d.]+)"', chart)]
        assert len(places) == 1 and 10 <= places[0] <= 260
        assert "nan" not in chart


def test_thinning_keeps_the_highest_spike() -> None:
    points = [(n, 1.0) for n in range(5000)]
    points[2345] = (2345, 1.9)
    plain = loss_chart(points, "a")
    raw = re.search(r'class="raw"[^>]* d="M([^"]+)"', plain)
    assert raw is not None
    heights = [float(place.split(",")[1]) for place in raw.group(1).split("L")]
    assert len(heights) < 500 and min(heights) < max(heights)


def test_running_mean_is_centred_and_keeps_a_line_straight() -> None:
    line = np.arange(600, dtype=np.float64)
    smooth = running_mean(line)
    assert np.allclose(smooth[:590], line[:590])
    noisy = np.random.default_rng(0).normal(size=6000)
    assert running_mean(noisy).std() < 0.15
    assert running_mean(np.array([3.0])).tolist() == [3.0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1400, [0, 500, 1000]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (2, 2.5, [2, 2.1, 2.2, 2.3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high, 5)[: len(expected)] == pytest.approx(expected)


def test_the_verdict_says_when_the_model_does_not_look() -> None:
    seeing = ScoreRow(title="A", metric="", value=90, interval=(88, 92), base_rate=50, blind=60)
    guessing = ScoreRow(title="B", metric="", value=62, interval=(58, 66), base_rate=50, blind=60)
    withheld = ScoreRow(title="C", metric="", value=None, base_rate=50)
    assert "on every benchmark: A 90.0 (blind 60.0)." in verdict([seeing])
    assert "1 of 2" in verdict([seeing, guessing])
    assert verdict([guessing]).startswith("On no benchmark")
    assert verdict([seeing, withheld]).endswith("No score is given for C.")
    assert verdict([withheld]).startswith("No benchmark")


def test_rows_and_examples_come_from_a_runs_files(tmp_path: Path) -> None:
    labels, rows = [], []
    for n in range(8):
        name = f"COCO_val2014_{n // 2:012d}.jpg"
        path = tmp_path / "val2014" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture((72, 72)))
        labels.append({"question_id": n, "image": name, "text": f"Is there {n}?", "label": "yes"})
        rows.append({"id": f"random/{n}", "text": "Yes" if n < 6 else "No"})
    label_file = tmp_path / "coco_pope_random.json"
    label_file.write_text("".join(json.dumps(row) + "\n" for row in labels))
    (tmp_path / "out").mkdir()
    answers = tmp_path / "out" / "predictions.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pope = BENCHMARKS["pope"]
    scores = rescore(pope, tmp_path, answers)
    line = score_row(scores, pope.title, pope.headline, blind=scores)
    assert (line.value, line.base_rate, line.n) == (line.blind, 100, 8)
    assert line.interval is not None and line.interval[0] < (line.value or 0) < line.interval[1]
    picked = pick_examples(pope, tmp_path, tmp_path / "out", 12)
    assert len(picked) == 4 and sum(example.right for example in picked) == 3
    assert all(re.fullmatch(r"Is there \d\?", example.question) for example in picked)


def test_points_of_another_most_are_drawn_on_the_same_axis(tmp_path: Path) -> None:
    rows = [
        ScoreRow(title="MME", metric="perception", value=1500, interval=(1400, 1600), most=2000,
                 base_rate=1000, n=9),
        ScoreRow(title="POPE", metric="f1", value=75, interval=(70, 80), base_rate=50, n=9),
    ]  # fmt: skip
    path = tmp_path / "report.html"
    write_report(path, replace(full_report(), scores=rows))
    strips = re.findall(r'<svg class="strip" .*?</svg>', path.read_text())
    assert strips[0] == strips[1]
    assert "perception of 2,000" in path.read_text()
