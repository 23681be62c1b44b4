"""How a judge's replies are read: by the option of now, and by whom the endpoint says they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from judged_files import ScriptedChat, both_with_images
from pumice.core.llm_types import ChatRequest, Reply
from pumice.core.types import Request, Result
from pumice.eval.benchmarks import llava_wild
from pumice.eval.benchmarks.llava_wild import LlavaWild
from pumice.eval.benchmarks.mmvet import MMVet
from pumice.eval.compare import compare_runs
from pumice.eval.judge import Judge
from pumice.eval.judged_benchmark import JudgedBenchmark
from pumice.eval.prediction_files import PREDICTIONS
from pumice.eval.runner import run_benchmark
from pumice.eval.scores import Scores


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return both_with_images(tmp_path / "data")


def judged(benchmark: JudgedBenchmark, data: Path, out: Path, chat: ScriptedChat) -> Scores:
    def model(requests: Sequence[Request], _: object) -> list[Result]:
        return [Result(id=request.id, text=f"It is {request.id}.") for request in requests]

    judge = Judge("endpoint", benchmark.official_judge, 1, chat)
    return run_benchmark(model, benchmark.judged_by(judge), data, out, weights="w")


def saying(replies: Sequence[str]) -> ScriptedChat:
    """One of the replies to each of the four questions, whatever else is asked."""
    return ScriptedChat(
        lambda request: next(
            reply
            for number, reply in enumerate(replies)
            if f"What is {number}?" in request.messages[-1]["content"]
        )
    )


@pytest.mark.parametrize(
    ("kind", "replies"),
    [(LlavaWild, ["15 8", "8 4", "9 9", "10 5"]), (MMVet, ["1e-1", "0.5", "1.0", "0.7"])],
)
@pytest.mark.parametrize("first", ["apart", "official"])
def test_another_reading_scores_as_if_it_had_been_the_first(
    kind: type[JudgedBenchmark], replies: list[str], first: str, data: Path, tmp_path: Path
) -> None:
    then = "official" if first == "apart" else "apart"
    judged(kind(unparsed=first), data, tmp_path / "a", saying(replies))
    switched = judged(kind(unparsed=then), data, tmp_path / "a", saying(replies))
    fresh = judged(kind(unparsed=then), data, tmp_path / "b", saying(replies))
    assert switched == fresh and fresh.metrics is not None
    assert fresh.judge["unparsed"] == (1 if then == "apart" else 0)


def test_a_score_that_a_judges_nan_leaves_undefined_is_none(data: Path, tmp_path: Path) -> None:
    official = {"unparsed": "official"}
    grades = judged(MMVet(**official), data, tmp_path / "v", saying(["nan", "0.5", "1.0", "0.7"]))
    assert grades.withheld and grades.failed
    assert grades.caution == "total is not defined for these answers; the score is withheld"
    pairs = judged(LlavaWild(**official), data, tmp_path / "w", saying(["nan 8", *["8 8"] * 3]))
    assert pairs.metrics == {"model": 80.0}
    assert pairs.notes[0] == (
        "relative is not defined for these answers; it is not among the metrics"
    )


class Redirected(ScriptedChat):
    """An endpoint that has another model answer in the place of one that is retired."""

    def ask_all(self, requests: Iterable[ChatRequest]) -> Iterator[Reply]:
        for reply in super().ask_all(requests):
            yield replace(reply, model="gpt-4-turbo")


def test_a_judge_that_another_model_stands_in_for_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava_wild.LlavaWild, "is_official", lambda *_: True)

    def say(request: ChatRequest) -> str:
        return "8 4\nx"

    own = judged(LlavaWild(), data, tmp_path / "a", ScriptedChat(say))
    assert own.judge["comparable"] == "published" and "answered_as" not in own.judge
    for chat in (Redirected(say), ScriptedChat(say)):
        # The second time nothing is asked: the rows know it.
        other = judged(LlavaWild(), data, tmp_path / "b", chat)
        assert other.metrics == own.metrics and other.judge["comparable"] == "same judge"
        assert other.judge["answered_as"] == {"gpt-4-turbo": 4}
        assert other.notes == (
            "gpt-4-0314 was asked for, and the endpoint says that 4 of 4 verdicts are by "
            "gpt-4-turbo",
        )
    assert not chat.asked
    rows = [json.loads(line) for line in (tmp_path / "b" / PREDICTIONS).read_text().splitlines()]
    assert rows[0]["extra"]["verdicts"][0]["model"] == "gpt-4-turbo"
    assert compare_runs(tmp_path / "a", tmp_path / "b")[0].metrics["relative"].difference == 0.0
