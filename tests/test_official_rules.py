"""Every parser and metric beside a second implementation, on thousands of answers made to fool."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import official_rules as rules
from eval_files import pope_files, science_files, vqa_files
from pumice.eval.answers import CONTRACTIONS, normalise, normalise_m4c, prepare, vqa_accuracy
from pumice.eval.benchmark import Benchmark, Item
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.metrics import evaluate, score_item
from pumice.eval.option_letters import letter_2023, letter_now
from shelf_files import gqa_files, mmbench_files, mme_files, seed_files, textvqa_files, vizwiz_files

ROUNDS = 4000
JOINTS = ("", "", " ", " ", " ", "  ", "\n", "\t", "\u00a0", ",", ", ", ".", ". ", "/", "-", " -",
          "'", "'s", "\u2019s", "?", "!", ":", ";", "(", ")", "[", "]", "*", "**", "_", "`", "@",
          "...", "." * 40)  # fmt: skip
SHORT = ["yes", "Yes", "YES", "no", "No", "NO", "not", "Not", "none", "None", "nope", "know",
         "snow", "eyes", "isn't", "yesterday", "there", "a", "A", "an", "the", "The", "zero", "two",
         "Ten", "1,000", "3", "0", "2.0", ".5", "3.", "1.5.2", "10:30", "u.s.a.", "n/a", "men",
         "mcdonald", "red", "cat", "hot", "dog", "unanswerable", "Unanswerable", "\u732b",
         "\u00e9t\u00e9", "\u0661,\u0662", "\uff11", "\u0130", "\u00df", "50%", "$5", "#1",
         "&"]  # fmt: skip
LETTERS = ["A", "B", "C", "D", "E", "F", "Z", "a", "b", "\uff21", "A.", "B)", "(C)", "(D).", "C,",
           ":A", "B:", "A. ", "The answer is", "The answer is ", "The answer is B",
           "The answer is C.", "the answer is", "answer is",
           "Answer", "option", "because it is", "cat", "a dog", "Red car", "None of these",
           "\uff08B\uff09", "\u7b54\u6848\u662fB\u3002", "**B**", "# C", "{D}", "[A]"]  # fmt: skip
OPTIONS = {"A": "cat", "B": "a dog", "C": "Red car", "D": "None of these"}


def texts(pieces: Sequence[str], seed: int, count: int = ROUNDS) -> list[str]:
    """Pieces and joints in a row; a third of them has just one piece, as answers mostly have."""
    rng = random.Random(seed)
    out = ["", " ", ".", "\n"]
    for _ in range(count):
        length = rng.choice((1, 1, 2, 3, 4, 6))
        text = "".join(rng.choice(pieces) + rng.choice(JOINTS) for _ in range(length))
        out.append(rng.choice(JOINTS) + text if rng.random() < 0.2 else text)
    return out


def item(benchmark: str, **extra: object) -> Item:
    return Item("1", None, "", "A", "g", benchmark, extra=dict(extra))


# --- parsers ------------------------------------------------------------------------------------


def test_normalisers() -> None:
    for text in texts([*SHORT, *CONTRACTIONS], 0):
        assert normalise(text) == rules.vqa(text), repr(text)
        assert normalise_m4c(text) == rules.m4c(text), repr(text)


@pytest.mark.parametrize("version", rules.VQA_SCORES)
def test_vqa_scores(version: str) -> None:
    rng = random.Random(1)
    pool = texts([*SHORT, "dont", "Id've", "somebody'd"], 2)
    scores = []
    for _ in range(1500):
        # What annotators write comes in a few spellings, often of the very answer.
        few = rng.sample(pool, rng.choice((1, 2, 3)))
        said = rng.choice([*few, f"{few[0]}.", few[0].upper(), f" {few[0]}\n", rng.choice(pool)])
        truths = [rng.choice(few) for _ in range(10)]
        ours = vqa_accuracy(prepare(said, truths, version), truths, version)
        assert ours == pytest.approx(float(rules.VQA_SCORES[version](said, truths))), (said, truths)
        scores.append(round(ours, 1))
    assert set(scores) == {0, 0.3, 0.6, 0.9, 1.0}


def test_yes_and_no() -> None:
    told = defaultdict(set)
    for text in texts(SHORT, 3):
        assert BENCHMARKS["pope"].parse(text, item("random")) == rules.pope(text), repr(text)
        mme = BENCHMARKS["mme"].parse(text, item("count"))
        assert (mme or "other") == rules.mme(text), repr(text)
        assert (BENCHMARKS["gqa"].parse(text, item("query")) or "") == rules.gqa(text), repr(text)
        told["pope"].add(rules.pope(text))
        told["mme"].add(rules.mme(text))
    assert [len(words) for words in told.values()] == [2, 3]


def test_letters() -> None:
    seen = defaultdict(set)
    for text in texts(LETTERS, 4):
        for choices in (2, 4, 5):
            read = BENCHMARKS["scienceqa"].parse(text, item("", letters="ABCDE"[:choices]))
            assert read == rules.scienceqa(text, choices), repr(text)
            seen["scienceqa"].add(read)
        for letter in "ABCD":
            read = BENCHMARKS["seed_bench"].parse(text, item(""))
            assert (read == letter) == rules.seed(text, letter), repr(text)
        some = {key: OPTIONS[key] for key in "ABCD"[: 2 + len(text) % 3]}
        assert letter_2023(text, some) == rules.mmbench_2023(text, some), (text, some)
        assert letter_now(text, some) == rules.mmbench_now(text, some), (text, some)
        seen["2023"].add(letter_2023(text, some))
        seen["now"].add(letter_now(text, some))
    assert seen["scienceqa"] == {*"ABCDE", None}
    assert (seen["2023"], seen["now"]) == ({*"ABCDE", None}, {*"ABCDZ", None})


# --- metrics of whole sets ----------------------------------------------------------------------


Files = Callable[[Path], Path]


def answered(
    name: str, root: Path, pieces: Sequence[str], seed: int
) -> tuple[Benchmark, list[Item], list[str], dict[str, float]]:
    """A benchmark with its items, an answer made to fool for each, and our metrics."""
    benchmark = BENCHMARKS[name]
    items = benchmark.load(root)
    rng = random.Random(seed)
    fooling = texts(pieces, seed, 3 * len(items))
    said = [
        benchmark.truth_text(one) if rng.random() < 0.6 else rng.choice(fooling) for one in items
    ]
    rows = [score_item(benchmark, *pair) for pair in zip(items, said, strict=True)]
    return benchmark, items, said, evaluate(benchmark, rows)


@pytest.mark.parametrize("seed", range(12))
def test_scores_of_yes_and_no(seed: int, tmp_path: Path) -> None:
    counts = {"adversarial": 7, "popular": 6, "random": 5}
    _, items, said, ours = answered("pope", pope_files(tmp_path, counts), SHORT, seed)
    parts = defaultdict(list)
    for one, text in zip(items, said, strict=True):
        parts[one.category].append((text, str(one.truth)))
    mean = sum(map(rules.pope_f1, parts.values())) / 3
    assert ours["mean_f1"] == pytest.approx(mean, abs=1e-3)
    _, items, said, ours = answered("mme", mme_files(tmp_path), SHORT, seed)
    tasks = defaultdict(list)
    for one, text in zip(items, said, strict=True):
        tasks[one.category].append((text, str(one.truth)))
    total = sum(map(rules.mme_score, tasks.values()))
    assert ours["perception"] == pytest.approx(total, abs=1e-3)
    assert ours["perception_most"] == 200 * len(tasks)


@pytest.mark.parametrize("seed", range(12))
def test_scores_of_letters(seed: int, tmp_path: Path) -> None:
    _, items, said, ours = answered("mmbench", mmbench_files(tmp_path), LETTERS, seed)
    right = [
        (int(one.id), rules.mmbench_2023(text, one.extra["options"]) == one.truth)
        for one, text in zip(items, said, strict=True)
    ]
    assert ours["circular_accuracy"] == pytest.approx(rules.circular(right), abs=1e-3)
    _, items, said, ours = answered("scienceqa", science_files(tmp_path), LETTERS, seed)
    hits = [rules.scienceqa(text, 3) == one.truth for one, text in zip(items, said, strict=True)]
    shown = [hit for hit, one in zip(hits, items, strict=True) if one.image is not None]
    assert ours["accuracy"] == pytest.approx(100 * sum(hits) / len(hits), abs=1e-3)
    assert ours["img_accuracy"] == pytest.approx(100 * sum(shown) / len(shown), abs=1e-3)
    _, items, said, ours = answered("seed_bench", seed_files(tmp_path), LETTERS, seed)
    hits = [text == one.truth for one, text in zip(items, said, strict=True)]
    assert ours["accuracy"] == pytest.approx(100 * sum(hits) / len(hits), abs=1e-3)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("name", "files", "version"),
    [
        ("vqav2", vqa_files, "2021"),
        ("vizwiz", vizwiz_files, "m4c"),
        ("textvqa", textvqa_files, "m4c"),
    ],
)
def test_scores_of_short_answers(
    name: str, files: Files, version: str, seed: int, tmp_path: Path
) -> None:
    _, items, said, ours = answered(name, files(tmp_path), SHORT, seed)
    scores = [
        rules.VQA_SCORES[version](text, one.truth) for one, text in zip(items, said, strict=True)
    ]
    assert ours["accuracy"] == round(float(100 * sum(scores) / len(scores)), 2)


@pytest.mark.parametrize("seed", range(12))
def test_scores_of_gqa(seed: int, tmp_path: Path) -> None:
    _, items, said, ours = answered("gqa", gqa_files(tmp_path), [*SHORT, "table", "left"], seed)
    hits = [rules.gqa(text) == one.truth for one, text in zip(items, said, strict=True)]
    assert ours["accuracy"] == pytest.approx(100 * sum(hits) / len(hits), abs=1e-3)
