"""Parsers and normalisers: tables made to fool a naive one, and what holds for any text."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pumice.eval.answers import CONTRACTIONS, RULES, normalise, normalise_m4c, prepare, vqa_accuracy
from pumice.eval.benchmark import Item
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.option_letters import LETTER_RULES, REFUSED, letter_2023, letter_now

OPTIONS = {"A": "cat", "B": "a dog", "C": "Red car", "D": "None of these"}
ITEM = Item("1", None, "", "A", "g", extra={"letters": "ABC", "options": OPTIONS})
WORDS = st.sampled_from(
    ["yes", "No", "two", "none", "the", "A", "men's", "dont", "Id've", "1,000", "3.", ".5",
     "u.s.a.", "cat", "red/blue", "B.", "(A)", "answer is", "**C**", "D,",
     "　", "é", "猫", "\n", "\t", "a,b"]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=30), st.lists(WORDS, max_size=8).map(" ".join))


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b", "ab"),
        ("1,000", "1000"),
        ("men's", "men 's"),
        ("It's?", "it 's"),
        ("The Two cats.", "2 cats"),
        ("yes,\nit is", "yes it is"),
        ("dont", "don't"),
        ("red/blue", "red blue"),
        ("hot -dog", "hot dog"),
        ("2.0", "2.0"),
        ("", ""),
        ("?", ""),
        ("a", ""),
        ("N/A", "n"),
    ],
)
def test_m4c_splits_possessives_and_joins_at_commas(text: str, expected: str) -> None:
    assert normalise_m4c(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"), ("no.", "no"), ("yes\n", "yes"), ("NO", "no"), ("eyes", "yes"),
        ("know", "no"), ("snow", "no"), ("Another", "no"), ("not", "no"), ("no, yes", "no"),
        ("  yes", None), (" yes", "yes"), ("   yes", None), ("**Yes**", None), ("y", None),
        ("The answer is yes", None), ("", None), ("yno", "no"), ("１yes", "yes"),
    ],
)  # fmt: skip
def test_mme_reads_four_characters(text: str, expected: str | None) -> None:
    assert BENCHMARKS["mme"].parse(text, ITEM) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"), ("yes. ", "yes. "), ("Yes, it is", "yes, it is"),
        ("the table", "the table"),
        (" Left", " left"), ("no..", "no"), (".", None), ("", None), ("Café", "café"),
    ],
)  # fmt: skip
def test_gqa_strips_full_stops_at_the_end_alone(text: str, expected: str | None) -> None:
    assert BENCHMARKS["gqa"].parse(text, ITEM) == expected


@pytest.mark.parametrize("text", ["A.", " A", "a", "A\n", "A B", "(A)", "Ａ", "E", ""])
def test_seed_bench_reads_nothing_but_the_letter(text: str) -> None:
    assert BENCHMARKS["seed_bench"].parse(text, ITEM) is None
    assert BENCHMARKS["seed_bench"].parse("A", ITEM) == "A"


@pytest.mark.parametrize(
    ("text", "then", "now"),
    [
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("(B)", "B", "B"),
        ("(B).", "B", "B"),
        ("[B]", None, "B"),
        ("B;", None, "B"),
        ("B: a thing", "B", "B"),
        ("b", None, None),
        ("Answer:B", None, "B"),
        # "A" among more than three words is no letter in 2023.
        ("A", "A", "A"),
        ("A is right", "A", "A"),
        ("A is right here", None, "A"),
        ("It is a car: A", None, "A"),
        # Two letters are none, unless one is dressed up.
        ("A or B", None, None),
        ("A or B.", "A", None),
        ("A B (C)", "C", None),
        # A letter far from the end is not trusted now.
        ("B because it has", "B", "B"),
        ("B because it has ears", "B", None),
        ("The answer is B because it is very furry indeed", "B", "B"),
        ("The answer is **B** as anyone can see here", None, "B"),
        ("E", "E", None),
        ("Z", None, REFUSED),
        ("Cannot determine the answer", None, REFUSED),
        # The text of one option, and of no other.
        ("it is the red CAR", "C", "C"),
        ("a cat and a dog", None, None),
        ("cat " + "very " * 20, "A", None),
        ("（B）", None, None),
        ("Ｂ", None, None),
        ("答案是B。", None, None),
        ("", None, None),
        ("Failed to obtain answer via API B", None, None),
    ],
)
def test_letters_then_and_now(text: str, then: str | None, now: str | None) -> None:
    assert letter_2023(text, OPTIONS) == then
    assert letter_now(text, OPTIONS) == now


def test_every_contraction_is_restored_unless_it_never_could_be() -> None:
    for bare, whole in CONTRACTIONS.items():
        expected = bare.lower() if bare != bare.lower() else whole
        assert normalise(f"x {bare}") == f"x {expected}"


# --- what holds for any text --------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=10, max_size=10))
@example("yes", ["yes"] * 10)
def test_vqa_scores_are_steps_and_know_no_order(text: str, truths: list[str]) -> None:
    turned = truths[3:] + truths[:3]
    for rule in RULES:
        prepared = prepare(text, truths, rule)
        score = vqa_accuracy(prepared, truths, rule)
        assert round(score, 9) in (0, 0.3, 0.6, 0.9, 1)
        assert vqa_accuracy(prepare(text, turned, rule), turned, rule) == pytest.approx(score)
        # What all but one annotator say is fully right, whoever the other is.
        agreed = [text] * 9 + [f"{text} other"]
        if rule != "before-2021":
            assert vqa_accuracy(prepare(text, agreed, rule), agreed, rule) == 1


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_normalising_forgets_capitals_and_ends(text: str) -> None:
    assert normalise_m4c(f" {text}\n") == normalise_m4c(text)
    for read in (normalise, normalise_m4c):
        out = read(text)
        assert out == out.strip() and "\n" not in out and "  " not in out
        assert not {"a", "an", "the"} & set(out.split())


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_parsers_read_only_what_they_may(text: str) -> None:
    assert BENCHMARKS["pope"].parse(text, ITEM) in ("yes", "no")
    assert BENCHMARKS["mme"].parse(text, ITEM) in ("yes", "no", None)
    start = text.lower()[:4].ljust(4)
    assert BENCHMARKS["mme"].parse(f"{start}yes no", ITEM) == BENCHMARKS["mme"].parse(start, ITEM)
    assert BENCHMARKS["scienceqa"].parse(text, ITEM) in ("A", "B", "C", None)
    for rule in LETTER_RULES:
        letter = LETTER_RULES[rule](text, OPTIONS)
        assert letter in (*"ABCD", "E" if rule == "2023" else REFUSED, None)


@settings(max_examples=100, deadline=None)
@given(st.permutations("ABCD"), st.sampled_from(["{}", "{}.", "({})", "Answer: {}"]))
def test_letters_follow_a_renaming_of_the_options(names: list[str], form: str) -> None:
    """Nothing in either rule prefers an option, where no word could be the article "A"."""
    texts = list(OPTIONS.values())
    renamed = dict(sorted(zip(names, texts, strict=True)))
    for old, new in zip("ABCD", names, strict=True):
        for rule in (letter_2023, letter_now):
            assert rule(form.format(old), OPTIONS) == old
            assert rule(form.format(new), renamed) == new
