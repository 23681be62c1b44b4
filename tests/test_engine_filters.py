"""What the data engine compares and learns by: near copies, writing systems, examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Run
from pumice.core.errors import DataError, PumiceError
from pumice.core.files import read_jsonl
from pumice.core.llm_types import Reply
from pumice.data.engine_examples import read_examples
from pumice.data.engine_filters import check_language, fault_of
from pumice.data.engine_judge import Judge
from pumice.data.engine_prompts import KINDS, Pair, read_pairs, written_pairs
from pumice.data.engine_scenes import Described
from pumice.data.near_texts import NearTexts, nearness, words_of
from pumice.data.scripts import SCRIPTS, script_of, script_share
from pumice.world.teacher import Teacher, teaching

CONVERSATION = KINDS["conversation"]
SCENE = Described("7", "7.jpg", ("A cat sits on a wall.",))
LONG = "A grey cat sits on the old wall beside the gate and looks at the birds in the tree."
GOOD = (("Where is the cat?", LONG), ("Why is it there?", "Because it can see the birds."))


# --- near copies ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("abc ", min_size=1, max_size=24), min_size=1, max_size=14),
    st.sampled_from([0.2, 0.5, 0.75, 0.8, 1.0]),
)
def test_every_near_text_is_found_and_no_other(texts: list[str], least: float) -> None:
    near = NearTexts(least)
    for place, text in enumerate(texts):
        measures = [nearness(text, before) for before in texts[:place]]
        best = max(measures, default=0.0)
        expected = (str(measures.index(best)), best) if best >= least - 1e-9 else None
        assert near.find(text) == expected
        near.keep(str(place), text)


def test_nearness_by_hand() -> None:
    # Runs: a b c, b c d, c d e, d e f of the one; a b c, b c d, c d x, d x f of the other.
    assert nearness("a b c d e f", "A, b c d x f!") == 2 / 6
    assert nearness("a b", "a b") == 1 and nearness("a b", "b a") == 0
    assert words_of("猫坐在 the wall") == ["猫", "坐", "在", "the", "wall"]


def reply(text: str) -> Reply:
    return Reply(key="k", text=text, finish_reason="stop")


def test_a_conversation_that_nearly_repeats_an_earlier_one_is_named() -> None:
    judge = Judge(CONVERSATION, "en", 0.8)
    other = (GOOD[0], ("Why is it there?", "Because it can see the bird."))
    far = (("What is it?", "It is a small boat at the quay."), ("Is it old?", "Yes, it is."))
    said = [judge(SCENE, reply(written_pairs(CONVERSATION, p)))[1] for p in (GOOD, other, far)]
    assert said[0] is None and said[2] is None
    assert said[1] is not None and said[1].startswith("near_duplicate:") and "image '7'" in said[1]
    lenient = Judge(CONVERSATION, "en", 1.0)
    assert [lenient(SCENE, reply(written_pairs(CONVERSATION, p)))[1] for p in (GOOD, other)] == [
        None, None,
    ]  # fmt: skip


def test_questions_that_nearly_repeat_each_other() -> None:
    ask = "What is the man in the long red coat near the old station door doing now"
    pairs = [(f"{ask}?", "He waits."), (f"{ask} then?", "He is still there.")]
    assert (fault_of(CONVERSATION, pairs, "en") or "").startswith("near_question:")
    assert fault_of(CONVERSATION, pairs, "en", near=1.0) is None


# --- writing systems ------------------------------------------------------------------------------


def test_scripts_of_letters() -> None:
    letters = {"a": "latin", "é": "latin", "ж": "cyrillic", "猫": "han", "の": "hiragana",
               "고": "hangul", "ع": "arabic", "ก": "thai", "7": None, ".": None}  # fmt: skip
    assert {letter: script_of(letter) for letter in letters} == letters
    assert script_share("猫 cat", ("han",)) == 0.25 and script_share("12 + 3", ("greek",)) == 1
    assert len(set(map(SCRIPTS.__getitem__, SCRIPTS))) == len(SCRIPTS)


@pytest.mark.parametrize(
    ("language", "answer", "kept"),
    [
        ("script:han", "猫坐在墙上。", True),
        ("script:han", "The cat sits on a wall.", False),
        ("script:cyrillic,latin", "Это кошка, a cat.", True),
        ("script:latin", "El gato mira el mar azul mientras come una manzana grande.", True),
        ("en", "El gato mira el mar azul mientras come una manzana grande.", False),
        ("any", "猫坐在墙上。", True),
    ],
)
def test_answers_in_the_asked_script_are_kept(language: str, answer: str, kept: bool) -> None:
    check_language(language)
    pairs = [("Where?", answer), ("Is it?", answer)]
    fault = fault_of(CONVERSATION, pairs, language)
    assert (fault is None) == kept and (kept or "language" in str(fault))


@pytest.mark.parametrize("language", ["de", "script:runes", "script:", "han"])
def test_an_unknown_language_is_refused(language: str) -> None:
    with pytest.raises(PumiceError, match="script"):
        check_language(language)


# --- examples -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.text("ab .\n", min_size=1).map(str.strip).filter(bool)] * 2),
                min_size=1, max_size=4))  # fmt: skip
def test_what_is_written_is_read(pairs: list[Pair]) -> None:
    assert read_pairs(CONVERSATION, SCENE, written_pairs(CONVERSATION, pairs)) == pairs


def example(pairs: tuple[Pair, ...] = GOOD) -> dict[str, Any]:
    turns = [
        {"from": speaker, "value": value}
        for pair in pairs
        for speaker, value in zip(("human", "gpt"), pair, strict=True)
    ]
    return {"image": "e.jpg", "captions": ["A cat on a wall."], "conversations": turns}


def test_examples_stand_before_the_request_and_are_not_taken_for_replies(
    run: Run, tmp_path: Path
) -> None:
    file, scenes, out = (tmp_path / name for name in ("e.jsonl", "s.jsonl", "o.jsonl"))
    file.write_text(json.dumps(example()))
    scenes.write_text(json.dumps({"image": "1.jpg", "captions": ["A dog runs.", "A dog at sea."]}))
    (shown,) = read_examples(file, CONVERSATION, "en")
    asked, said = shown.messages(CONVERSATION)
    assert asked == {"role": "user", "content": "A cat on a wall."}
    assert read_pairs(CONVERSATION, SCENE, said["content"]) == list(GOOD)
    teacher = Teacher()
    with teaching(teacher) as url:
        line = ("data", "generate", "conversation", "--captions", scenes, "--endpoint", url)
        assert run(*line, "--out", out)[0] == 0
        (bare,) = [row for _, row in read_jsonl(out)]
        assert run(*line, "--out", out, "--examples", file)[0] == 0
    (row,) = [row for _, row in read_jsonl(out)]
    # Another request than without examples, so another call.
    assert teacher.stats()["paid"] == 2
    assert row["provenance"]["prompt_hash"] != bare["provenance"]["prompt_hash"]
    judge = Judge(CONVERSATION, "en", 0.8, [shown])
    assert "an example" in str(judge(SCENE, reply(said["content"]))[1])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (example((("Where?", "I'm sorry, I can't help."), GOOD[1])), "would not be kept.*refusal"),
        (example(GOOD[:1]), "would not be kept.*count"),
        ({**example(), "captions": []}, "caption"),
        ({**example(), "conversations": example()["conversations"][:3]}, "in turn"),
        ({**example(), "conversations": "x"}, "in turn"),
    ],
)
def test_a_bad_example_is_refused(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=told):
        read_examples(tmp_path / "e.jsonl", CONVERSATION, "en")
