"""Published scores to show beside one's own, with their source.

Liu et al., Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744, tables 3 and 4.
They are of the official splits and prompts: whoever asked others, or fewer, cannot compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.dot_plot import Dot, dot_plot
from pumice.eval.scores import Scores

SOURCE = "Liu et al., Improved Baselines with Visual Instruction Tuning (2023), tables 3 and 4"


@dataclass(frozen=True, slots=True)
class Published:
    """A benchmark's published scores: `items` of the split, and the score of each model."""

    split: str
    items: tuple[int, ...]
    scores: dict[str, float]


_OWN = "this model"
_NAMES = (
    "LLaVA 7B", "InstructBLIP 7B", "InstructBLIP 13B", "IDEFICS 9B", "IDEFICS 80B", "Qwen-VL",
    "Qwen-VL-Chat", "LLaVA-1.5 7B", "LLaVA-1.5 13B", "LLaVA-1.5-HD 13B",
)  # fmt: skip


def _row(split: str, items: tuple[int, ...], *scores: float | None) -> Published:
    found = zip(_NAMES, scores, strict=True)
    return Published(split, items, {name: score for name, score in found if score is not None})


# POPE: the mean of the three published F1 scores. SEED-Bench: images and videos.
PUBLISHED = {
    "vqav2": _row("test-dev", (107_394, 447_793),
                  None, None, None, 50.9, 60.0, 78.8, 78.2, 78.5, 80.0, 81.8),
    "gqa": _row("test-dev", (12_578,),
                None, 49.2, 49.5, 38.4, 45.2, 59.3, 57.5, 62.0, 63.3, 64.7),
    "vizwiz": _row("test", (8_000,),
                   None, 34.5, 33.4, 35.5, 36.0, 35.2, 38.9, 50.0, 53.6, 57.5),
    "scienceqa": _row("test, questions with an image", (4_241, 2_017),
                      None, 60.5, 63.1, None, None, 67.1, 68.2, 66.8, 71.6, 71.0),
    "textvqa": _row("val", (5_000,),
                    None, 50.1, 50.7, 25.9, 30.9, 63.8, 61.5, 58.2, 61.3, 62.5),
    "pope": _row("COCO, mean of three", (8_910, 9_000),
                 72.9, None, 78.9, None, None, None, None, 85.9, 85.9, 86.3),
    "mme": _row("perception", (2_374,),
                809.6, None, 1212.8, None, None, None, 1487.5, 1510.7, 1531.3, 1500.1),
    "mmbench": _row("dev", (4_377,),
                    38.7, 36.0, None, 48.2, 54.5, 38.2, 60.6, 64.3, 67.7, 68.8),
    "mmbench_cn": _row("dev", (4_329,),
                       36.4, 23.7, None, 25.2, 38.1, 7.4, 56.7, 58.3, 63.6, 61.9),
    "seed_bench": _row("images and videos", (19_242,),
                       33.5, 53.4, None, None, None, 56.3, 58.2, 58.6, 61.6, 62.6),
    "llava_wild": _row("60 questions", (60,),
                       62.8, 60.9, 58.2, None, None, None, None, 65.4, 72.5, 72.0),
    "mmvet": _row("218 questions", (218,),
                  25.5, 26.2, 25.6, None, None, None, None, 31.1, 36.1, 39.4),
}  # fmt: skip


def published_section(scores: Sequence[Scores]) -> str:
    """A plot for each benchmark and a table: the own scores beside the published ones.

    Empty when none was published. A score of other items than the official split's says so: it
    cannot be compared.
    """
    told = [own for own in scores if own.benchmark in PUBLISHED]
    if not told:
        return ""
    names = [name for name in _NAMES if any(name in PUBLISHED[o.benchmark].scores for o in told)]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", _OWN, *names))
    plots = "\n".join(map(_plot, told))
    lines = "\n".join(_line(own, names) for own in told)
    return (
        '<section>\n<h2>Beside published models</h2>\n<p class="lead">'
        f"{escape(SOURCE)}; official splits. A score of other questions, or of another prompt, or "
        "by another judge, is no rank among them: where these differ, the line says so and the "
        "mark is hollow, and equal numbers of questions alone do not make files the same. Every "
        "plot has an axis of its own; the bar is the 95 % interval.</p>\n"
        f'<div class="plots">\n{plots}\n</div>\n'
        "<details><summary>The numbers</summary>"
        f'<div class="scroll"><table class="published"><thead><tr>{head}</tr></thead><tbody>\n'
        f"{lines}\n</tbody></table></div></details>\n</section>"
    )


def _plot(own: Scores) -> str:
    row, benchmark = PUBLISHED[own.benchmark], BENCHMARKS[own.benchmark]
    value = (own.metrics or {}).get(benchmark.headline)
    dots = [Dot(name, score) for name, score in row.scores.items()]
    if value is not None:
        interval = own.interval.get(benchmark.headline)
        dots.append(Dot(_OWN, value, interval, own=True, other=_is_other(own)))
    withheld = "" if value is not None else "; this model's score is withheld"
    return (
        f"<figure><figcaption><strong>{escape(benchmark.title)}</strong>"
        f"<span>{escape(_split(own))}{withheld}</span></figcaption>"
        f"{dot_plot(dots, benchmark.title)}</figure>"
    )


def _line(own: Scores, names: Sequence[str]) -> str:
    row, benchmark = PUBLISHED[own.benchmark], BENCHMARKS[own.benchmark]
    value = (own.metrics or {}).get(benchmark.headline)
    shown = "withheld" if value is None else f"{value:,.1f}"
    cells = "".join(
        f"<td>{row.scores[name]:,.1f}</td>" if name in row.scores else "<td>–</td>"
        for name in names
    )
    return (
        f'<tr><td><strong>{escape(benchmark.title)}</strong><span class="off">'
        f'{escape(_split(own))}</span></td><td class="own">{shown}</td>{cells}</tr>'
    )


def _split(own: Scores) -> str:
    """The published split; its number of questions, the prompt and the judge, where others here."""
    row = PUBLISHED[own.benchmark]
    told = row.split
    if own.n not in row.items:
        told += f": {row.items[0]:,} questions, here {own.n:,}"
    if _other_prompt(own):
        told += "; here asked with another prompt"
    return f"{told}; {own.caution}" if own.judge and own.caution else told


def _is_other(own: Scores) -> bool:
    """Whether this is no rank among the published: other questions, another prompt or judge."""
    asked = own.n not in PUBLISHED[own.benchmark].items or _other_prompt(own)
    return asked or bool(own.judge and own.caution)


def _other_prompt(own: Scores) -> bool:
    return bool(own.protocol["protocol"] != "paper")
