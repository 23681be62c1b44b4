"""A judge that fails, is cut short or killed: the same score, or a count of what is lacking."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval_files import Scripted
from judged_files import (
    ScriptedChat,
    answers_file,
    both_with_images,
)
from pumice.core.errors import PumiceError
from pumice.core.llm_client import Endpoint, LLMClient
from pumice.core.llm_types import ChatRequest, Prices
from pumice.core.types import Request, Result
from pumice.eval.benchmark import Benchmark
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.benchmarks.llava_wild import LlavaWild
from pumice.eval.benchmarks.mmvet import MMVet
from pumice.eval.compare import compare_runs
from pumice.eval.eval_report import report_eval
from pumice.eval.judge import GIVE_UP_AFTER, Judge
from pumice.eval.judged_benchmark import JudgedBenchmark
from pumice.eval.local_judge import LocalChat
from pumice.eval.prediction_files import PREDICTIONS
from pumice.eval.runner import SCORES, rescore, run_benchmark
from pumice.eval.scores import Scores
from pumice.infer.engine import Engine
from pumice.world.teacher import PASSING, Teacher, teaching

Run = Callable[..., tuple[int, str, str]]
PRICES = Prices(prompt=1e6, completion=1e6)


class Answering(Scripted):
    """A model that answers each question with its truth's first words."""

    def __init__(self, benchmark: Benchmark, data: Path) -> None:
        self.truth = {item.id: f"{item.truth} at {item.id}" for item in benchmark.load(data)}
        self.die_after, self.fail, self.asked = -1, "", []


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return both_with_images(tmp_path / "data")


@contextmanager
def judging(
    url: str, replies: Path, runs: int = 2, *, timeout: float = 5.0, **more: Any
) -> Iterator[Judge]:
    place = Endpoint(url=url, timeout=timeout, first_wait=0.01, longest_wait=0.1)
    with LLMClient(place, cache=replies, **more) as client:
        yield Judge("endpoint", "pumice-teacher", runs, client)


def undisturbed(benchmark: JudgedBenchmark, data: Path, out: Path, runs: int = 2) -> Scores:
    with teaching(Teacher()) as url, judging(url, out / "replies.jsonl", runs) as judge:
        return run_judged(benchmark, data, out, judge)


def run_judged(
    benchmark: JudgedBenchmark, data: Path, out: Path, judge: Judge | None, **more: Any
) -> Scores:
    model = Answering(benchmark, data)
    return run_benchmark(model, benchmark.judged_by(judge), data, out, weights="w", **more)


@pytest.mark.parametrize("benchmark", [LlavaWild(), MMVet()], ids=lambda b: str(b.name))
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_leaves_no_trace(
    benchmark: JudgedBenchmark, fault: str, data: Path, tmp_path: Path
) -> None:
    whole = undisturbed(benchmark, data, tmp_path / "whole")
    assert whole.metrics is not None and whole.judge["verdicts"] == 8
    teacher = Teacher(faults={fault: 0.6}, hang=0.3, retry_after=0.01)
    with (
        teaching(teacher) as url,
        judging(url, tmp_path / "replies.jsonl", timeout=0.15) as judge,
    ):
        assert run_judged(benchmark, data, tmp_path / "out", judge) == whole
    # Two runs ask the same words, each once.
    assert teacher.met[fault] > 0 and set(teacher.paid.values()) == {2}


@pytest.mark.parametrize("fault", ["malformed", "refusal", "truncated"])
def test_what_stays_is_counted_and_never_scored(fault: str, data: Path, tmp_path: Path) -> None:
    wild = LlavaWild()
    with teaching(Teacher(faults={fault: 1.0})) as url, judging(url, tmp_path / "r.jsonl") as judge:
        scores = run_judged(wild, data, tmp_path / "out", judge)
    if fault == "truncated":
        # The first line was whole, so its numbers count.
        assert scores.metrics is not None and scores.judge["unparsed"] == 0
        return
    assert scores.metrics is None and scores.judge["unparsed"] == 8 == scores.judge["verdicts"]
    assert (scores.unparsed, scores.errors, scores.missing) == (4, 0, 0)
    assert "8 of 8 verdicts cannot be read" in scores.notes[-1]


def test_verdicts_that_cannot_be_read_leave_the_others_score(data: Path, tmp_path: Path) -> None:
    def say(request: ChatRequest) -> str:
        words = request.messages[-1]["content"]
        return "Sorry" if "What is 2?" in words and request.draw else "8 4\nx"

    chat = ScriptedChat(say)
    scores = run_judged(LlavaWild(), data, tmp_path, Judge("endpoint", "j", 2, chat))
    assert scores.metrics is not None and scores.metrics["relative"] == 50.0
    assert (scores.unparsed, scores.judge["unparsed"], scores.judge["failed"]) == (0, 1, 0)
    row = json.loads((tmp_path / PREDICTIONS).read_text().splitlines()[2])
    assert (row["parsed"], row["score"]) == ("8 4; -", 0.4)
    assert row["extra"]["verdicts"][1] == {"content": "Sorry", "values": None, "error": None}


def test_a_judge_that_is_understood_less_than_half_the_time_gives_no_score(
    data: Path, tmp_path: Path
) -> None:
    chat = ScriptedChat(lambda r: "1.0" if "What is 0?" in r.messages[-1]["content"] else "Hm")
    judge = Judge("endpoint", "j", 1, chat)
    scores = run_judged(MMVet(), data, tmp_path, judge)
    assert scores.metrics is None and (scores.unparsed, scores.errors) == (3, 0)
    assert "only 1 of 4 answers have a verdict that can be read" in scores.notes[0]
    allowed = run_judged(MMVet(), data, tmp_path, judge, allow_errors=True)
    assert allowed.metrics == {"total": 100.0} and "these alone are scored" in allowed.notes[0]


def test_verdicts_that_never_come_withhold_the_score(data: Path, tmp_path: Path) -> None:
    silent = {"on": True}

    def say(request: ChatRequest) -> str | None:
        unheard = silent["on"] and "What is 1?" in request.messages[-1]["content"]
        return None if unheard else "0.5"

    judge = Judge("endpoint", "j", 2, ScriptedChat(say))
    scores = run_judged(MMVet(), data, tmp_path, judge)
    assert scores.metrics is None and (scores.errors, scores.unparsed) == (1, 0)
    assert scores.judge["failed"] == 2
    assert "1 answers have no verdict (the first: timeout: no answer" in scores.notes[0]
    allowed = run_judged(MMVet(), data, tmp_path, judge, allow_errors=True)
    assert allowed.metrics == {"total": 50.0} and allowed.errors == 1
    assert "left out of the score" in allowed.notes[0]
    silent["on"] = False
    model = Answering(MMVet(), data)
    mended = run_benchmark(model, MMVet().judged_by(judge), data, tmp_path, weights="w")
    assert mended.metrics == {"total": 50.0} and mended.errors == 0
    # Neither the model nor the judge was asked again for what was there.
    assert not model.asked and len(judge.chat.asked) == 8 + 2 + 2  # type: ignore[union-attr]


def test_a_dead_judge_is_not_asked_to_the_end(data: Path, tmp_path: Path) -> None:
    alive = {"calls": 10}

    def say(request: ChatRequest) -> str | None:
        alive["calls"] -= 1
        return "0.5" if alive["calls"] >= 0 else None

    chat = ScriptedChat(say)
    scores = run_judged(MMVet(), data, tmp_path, Judge("endpoint", "j", 100, chat))
    assert len(chat.asked) == 10 + GIVE_UP_AFTER
    assert scores.metrics is None and scores.errors == 4
    assert (scores.judge["verdicts"], scores.judge["failed"]) == (400, 390)
    mended = run_judged(
        MMVet(), data, tmp_path, Judge("endpoint", "j", 100, ScriptedChat(lambda _: "1.0"))
    )
    assert mended.metrics == {"total": 100.0}


def test_an_interrupted_judging_goes_on(data: Path, tmp_path: Path) -> None:
    vet, out, teacher = MMVet(), tmp_path / "out", Teacher()
    whole = undisturbed(vet, data, tmp_path / "whole")
    with teaching(teacher) as url, judging(url, tmp_path / "r.jsonl") as judge:
        client = judge.chat
        assert isinstance(client, LLMClient)
        dying = ScriptedChat(lambda request: client.ask(request).text, die_after=5)
        with pytest.raises(KeyboardInterrupt):
            run_judged(vet, data, out, replace(judge, chat=dying))
        left = Scores.from_dict(json.loads((out / SCORES).read_text()))
        assert left.metrics is None and (left.errors, left.missing) == (4, 0)
        assert "4 of 4 answers were not judged yet" in left.notes[0]
        assert teacher.calls == 5
        assert run_judged(vet, data, out, judge) == whole
    assert teacher.calls == 8
    assert (out / PREDICTIONS).read_text() == (tmp_path / "whole" / PREDICTIONS).read_text()


def test_replies_cut_at_any_byte_are_asked_for_again(data: Path, tmp_path: Path) -> None:
    wild, replies, teacher = LlavaWild(), tmp_path / "r.jsonl", Teacher()
    with teaching(teacher) as url:
        with judging(url, replies, 1) as judge:
            whole = run_judged(wild, data, tmp_path / "whole", judge)
        content = replies.read_bytes()
        for size in range(0, len(content), len(content) // 7):
            replies.write_bytes(content[:size])
            before = teacher.calls
            with judging(url, replies, 1) as judge:
                assert run_judged(wild, data, tmp_path / f"out{size}", judge) == whole
            # Only the reply that was being written may be lost.
            left = 4 - content[:size].count(b"\n")
            assert teacher.calls - before in (left, left - 1)


def test_the_budget_stops_the_judging_and_a_larger_one_goes_on(data: Path, tmp_path: Path) -> None:
    vet, out, replies, teacher = MMVet(), tmp_path / "out", tmp_path / "r.jsonl", Teacher()
    whole = undisturbed(vet, data, tmp_path / "whole")
    with teaching(teacher) as url:
        with judging(url, replies, prices=PRICES, cost_cap=220.0) as judge:
            short = run_judged(vet, data, out, judge)
            assert isinstance(judge.chat, LLMClient) and judge.chat.budget.spent <= 220.0
        assert short.metrics is None and "cost_cap" in short.notes[0]
        assert 0 < teacher.calls < 8 and 0 < short.errors <= 4
        with judging(url, replies, prices=PRICES, cost_cap=1e6) as judge:
            assert run_judged(vet, data, out, judge) == whole
    assert teacher.calls == 8


def test_a_killed_judging_ends_as_an_undisturbed_one(data: Path, tmp_path: Path) -> None:
    teacher, path = Teacher(latency=0.05), answers_file(tmp_path)
    with teaching(teacher) as url:
        command = [
            *(sys.executable, "-m", "pumice", "score", "mmvet", "--data", data, "--answers", path),
            *("--judge", url, "--judge-model", "j", "--judge-concurrency", "1", "--json"),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while teacher.calls < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 5 <= teacher.calls < 20
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        # The call that was on its way is made again, with the same Idempotency-Key.
        assert teacher.calls <= 21 and teacher.paid.total() == 20
        with judging(url, tmp_path / "r.jsonl", 5) as judge:
            judge = replace(judge, model="j")
            whole = rescore(MMVet().judged_by(judge), data, path)
    assert json.loads(done.stdout) == json.loads(json.dumps(whole.to_dict()))


# --- who judged, and whose answers ----------------------------------------------------------------


def test_another_judge_is_asked_and_the_model_is_not(data: Path, tmp_path: Path) -> None:
    vet, asked = MMVet(), []
    half, full = (ScriptedChat(lambda request, said=said: said) for said in ("0.5", "1.0"))
    for judge in (
        None,
        Judge("endpoint", "a", 2, half),
        Judge("endpoint", "b", 2, full),
        Judge("endpoint", "a", 2, half),
        Judge("endpoint", "a", 3, half),
        None,
    ):
        model = Answering(vet, data)
        scores = run_benchmark(model, vet.judged_by(judge), data, tmp_path, weights="w")
        asked.append((len(model.asked), len(half.asked), len(full.asked), scores.label))
        assert scores.metrics is not None
        if judge is not None:
            assert scores.metrics["total"] == (50.0 if judge.model == "a" else 100.0)
    assert asked == [
        (4, 0, 0, "mmvet (rubric)"),
        (0, 8, 0, "mmvet (judge a, 2 runs)"),
        (0, 8, 8, "mmvet (judge b, 2 runs)"),
        # Rows hold the last judge's verdicts; earlier ones are in an endpoint's file of replies.
        (0, 16, 8, "mmvet (judge a, 2 runs)"),
        (0, 28, 8, "mmvet (judge a, 3 runs)"),
        (0, 28, 8, "mmvet (rubric)"),
    ]


def test_judged_runs_are_compared_and_looked_at(data: Path, tmp_path: Path) -> None:
    wild = LlavaWild()
    for name, said in (("a", "8 4\nGood, <b>but</b>"), ("b", "8 8\nBetter")):
        judge = Judge("endpoint", "j", 2, ScriptedChat(lambda request, said=said: said))
        run_judged(wild, data, tmp_path / name / "llava_wild", judge)
    (found,) = compare_runs(tmp_path / "a", tmp_path / "b")
    assert found.metrics["relative"].difference == 50.0 and found.b_better == 4
    rubric = run_judged(wild, data, tmp_path / "c" / "llava_wild", None)
    with pytest.raises(PumiceError, match="cannot be compared.*judge"):
        compare_runs(tmp_path / "a", tmp_path / "c")
    path = report_eval("m", [(wild, tmp_path / "c" / "llava_wild", rubric)], tmp_path / "c")
    page = path.read_text()
    assert "LLaVA-Bench (rubric)" in page and "rubric: not comparable" in page


def test_a_local_model_judges_and_its_replies_are_kept(
    data: Path, tmp_path: Path, engine: Engine
) -> None:
    calls: list[int] = []

    def answer(requests: list[Request], keep: Callable[[Result], None] | None) -> list[Result]:
        calls.append(len(requests))
        assert keep is not None
        assert [m.role for m in requests[0].messages] == ["system", "user"]
        for request in requests:
            keep(Result(id=request.id, text="8 6\nx", finish_reason="stop", new_tokens=4))
        return []

    for _ in range(2):
        chat = LocalChat(answer, "hash", tmp_path / "r.jsonl")  # type: ignore[arg-type]
        judge = Judge("local model", "m hash", None, chat)
        scores = run_judged(LlavaWild(), data, tmp_path / f"out{len(calls)}", judge)
        chat.close()
        assert scores.metrics is not None and scores.metrics["relative"] == 75.0
        assert scores.judge["comparable"] == "no other" and scores.judge["verdicts"] == 4
        assert "NOT COMPARABLE" in scores.notes[-1]
    assert calls == [4]
    # A real model that never learnt to judge gives no score, and not a bad one.
    chat = LocalChat(engine.generate, "other", tmp_path / "r2.jsonl")
    short = MMVet().judged_by(Judge("local model", "m", None, chat))
    told = rescore(short, data, answers_file(tmp_path))
    chat.close()
    assert told.metrics is None and told.judge["unparsed"] + 4 * told.errors >= 4


def test_a_judges_failing_model_is_no_verdict(data: Path, tmp_path: Path) -> None:
    def answer(requests: list[Request], keep: object) -> list[Result]:
        return [Result(id=request.id, error="out of memory") for request in requests]

    chat = LocalChat(answer, "hash", tmp_path / "r.jsonl")  # type: ignore[arg-type]
    scores = run_judged(MMVet(), data, tmp_path, Judge("local model", "m", None, chat))
    assert scores.metrics is None and scores.errors == 4 and "out of memory" in scores.notes[0]


# --- the command line -----------------------------------------------------------------------------


def test_eval_with_a_judge_from_the_command_line(
    world: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUMICE_JUDGE_API_KEY", "a-secret")
    with teaching(Teacher()) as url:
        args = ["eval", "pocket", "--bench", "llava_wild,mmvet", "--data", world, "--limit", "6"]
        args += ["--judge", url, "--judge-model", "pumice-teacher", "--judge-runs", "2"]
        args += ["--judge-price-in", "30", "--judge-price-out", "60", "--judge-budget", "50"]
        code, out, err = run(*args, "--out", tmp_path)
    assert code == 0, err
    assert "llava_wild (judge pumice-teacher, 2 runs)" in out and "spent so far" in err
    assert "12 verdicts of pumice-teacher; the rest costs about" in err or "verdicts" in err
    for path in tmp_path.rglob("*.json*"):
        assert "a-secret" not in path.read_text()
    assert (tmp_path / "judge.replies.jsonl").is_file()


def test_what_was_spent_is_told_when_the_score_is_withheld(
    world: Path, tmp_path: Path, run: Run
) -> None:
    with teaching(Teacher(faults={"malformed": 1.0})) as url:
        args = ["eval", "pocket", "--bench", "llava_wild", "--data", world, "--limit", "2"]
        args += ["--judge", url, "--judge-model", "t", "--judge-runs", "1", "--out", tmp_path]
        code, out, err = run(*args, "--judge-price-in", "30", "--judge-price-out", "60")
    assert code == 1 and "withheld" in out and "spent so far" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--judge", "http://127.0.0.1:9/v1"), "--judge-model not given"),
        (("--judge-model", "gpt-4"), "does not go with --judge rubric"),
        (("--judge-runs", "3"), "--judge-runs does not go with --judge rubric"),
        (("--judge", "pocket", "--judge-budget", "3"), "--judge-budget does not go with"),
        (
            ("--judge", "http://h/v1", "--judge-model", "m", "--judge-budget", "1"),
            "--judge-budget needs the judge's prices",
        ),
        (
            ("--judge", "http://h/v1", "--judge-model", "m", "--judge-price-in", "1"),
            "give both --judge-price-in and --judge-price-out",
        ),
        (("--judge", "no-such-model"), "no-such-model"),
        (("--reviews", "r.jsonl", "--judge", "pocket"), "one of them scores the answers"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_named(
    args: tuple[str, ...], said: str, data: Path, tmp_path: Path, run: Run
) -> None:
    path = answers_file(tmp_path)
    code, out, err = run("score", "mmvet", "--data", data, "--answers", path, *args)
    assert (code, out) == (2, "") and said in err


def test_a_judge_without_anything_to_judge_is_refused(tmp_path: Path, run: Run) -> None:
    args = ("--data", tmp_path, "--answers", "x", "--judge", "http://h/v1")
    code, _, err = run("score", "pope", *args)
    assert code == 2 and "--judge is for benchmarks that a judge scores" in err
    code, _, err = run("score", "pope", "--data", tmp_path)
    assert code == 2 and "--answers not given" in err
    assert {"llava_wild", "mmvet"} <= set(BENCHMARKS.names())
