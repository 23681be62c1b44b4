"""The endpoint client against the scripted teacher: faults, limits, money, and what is kept."""

from __future__ import annotations

import base64
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import PIL.Image
import pytest

from pumice.core.errors import DataError, PumiceError
from pumice.core.llm_client import Endpoint, LLMClient, _retry_after
from pumice.core.llm_limits import Budget, RateLimit
from pumice.core.llm_types import ChatRequest, Prices, chat_messages
from pumice.core.types import assistant, user
from pumice.world.teacher import PASSING, Teacher, parse_faults, teaching

PRICES = Prices(prompt=1e6, completion=1e6)  # one unit of money for a token


def request(text: str = "Two cats sleep.", **more: Any) -> ChatRequest:
    return ChatRequest("pumice-teacher", ({"role": "user", "content": text},), **more)


def many(n: int) -> list[ChatRequest]:
    return [request(f"{n} cats sleep in {k} beds.") for k in range(n)]


def endpoint(url: str, **more: Any) -> Endpoint:
    return Endpoint(**{"url": url, "first_wait": 0.01, "longest_wait": 0.1, "timeout": 5.0} | more)


@contextmanager
def asking(
    teacher: Teacher, cache: Path | None = None, *, over: dict[str, Any] | None = None, **more: Any
) -> Iterator[LLMClient]:
    with teaching(teacher) as url, LLMClient(endpoint(url, **over or {}), cache=cache, **more) as c:
        yield c


# --- faults ---------------------------------------------------------------------------------------


def test_requests_left_half_way_do_not_end_the_client() -> None:
    with teaching(Teacher()) as url, LLMClient(endpoint(url)) as client:
        replies = client.ask_all(many(40))
        assert next(replies).failure is None
        replies.close()
        assert all(reply.failure is None for reply in client.ask_all(many(60)[40:]))
        client.stop()
        replies = client.ask_all(many(80)[60:])
        failure = next(replies).failure
        assert failure is not None and failure.kind == "stopped"
        replies.close()
        assert client.ask(request("Three cows graze.")).failure is not None


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again_and_paid_once(fault: str) -> None:
    teacher = Teacher(faults={fault: 1.0}, hang=0.4)
    with asking(teacher, over={"timeout": 0.15}) as client:
        reply = client.ask(request())
    assert reply.failure is None and reply.text
    # Half a response was charged by its first call; the others carry its Idempotency-Key.
    assert reply.attempts == 3 and teacher.met[fault] == 2
    assert teacher.stats()["paid"] == 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("rate_limit", "rate_limited"),
        ("server_error", "server_error"),
        ("timeout", "timeout"),
        ("broken", "bad_reply"),
    ],
)
def test_what_does_not_pass_is_a_failure_with_its_reason(fault: str, kind: str) -> None:
    with asking(
        Teacher(faults={fault: 1.0}, hang=0.3), over={"attempts": 2, "timeout": 0.1}
    ) as client:
        reply = client.ask(request())
    assert reply.failure is not None and reply.failure.kind == kind
    assert reply.failure.reason and not reply.text and reply.attempts == 2


def test_a_reply_that_is_nested_without_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    answer = httpx2.Response(200, text=deep)
    monkeypatch.setattr(httpx2.Client, "post", lambda *_, **__: answer)
    monkeypatch.setattr(httpx2.Client, "get", lambda *_, **__: answer)
    with LLMClient(endpoint("http://127.0.0.1:1/v1", attempts=1)) as client:
        failure = client.ask(request()).failure
        assert failure is not None and failure.kind == "bad_reply" and "[[[" in failure.reason
        assert client.models() == []


def test_a_refused_request_is_not_asked_again() -> None:
    teacher = Teacher()
    with asking(teacher) as client:
        reply = client.ask(ChatRequest("m", ()))
    assert reply.failure is not None and reply.failure.kind == "refused_by_server"
    assert "400" in reply.failure.reason and "messages" in reply.failure.reason
    assert reply.attempts == 1


def test_nobody_there_is_a_failure() -> None:
    with LLMClient(endpoint("http://127.0.0.1:9", attempts=2)) as client:
        reply = client.ask(request())
    assert reply.failure is not None and reply.failure.kind == "connection"


def test_a_pause_that_the_server_asks_for_is_kept_by_all() -> None:
    teacher = Teacher(faults={"rate_limit": 1.0}, retry_after=1.0)
    with asking(teacher, over={"longest_wait": 5.0, "attempts": 2}) as client:
        first = threading.Thread(target=client.ask, args=(request(),))
        first.start()
        while not teacher.met["rate_limit"]:
            time.sleep(0.01)
        start = time.monotonic()
        # The rest of the first one's pause, and then a pause of its own.
        client.ask(request("Another one."))
        assert time.monotonic() - start >= 0.7 + 1.0
        first.join()


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _retry_after("2.5") == 2.5
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9
    assert _retry_after("soon") == _retry_after(None) == 0.0


def test_an_empty_answer_is_a_failure_and_stays_paid(tmp_path: Path) -> None:
    row = {"key": "", "text": " ", "finish_reason": "stop", "cost": 3.0}
    ask = request()
    with teaching(Teacher()) as url:
        row["key"] = ask.key(url)
        (tmp_path / "kept.jsonl").write_text(json.dumps(row) + "\n")
        with LLMClient(endpoint(url), cache=tmp_path / "kept.jsonl") as client:
            reply = client.ask(ask)
    assert reply.cached and reply.failure is not None and reply.failure.kind == "empty"


# --- what is kept ---------------------------------------------------------------------------------


def test_replies_come_in_order_and_a_repeated_request_costs_nothing(tmp_path: Path) -> None:
    teacher = Teacher(latency=0.01, faults={"server_error": 0.3})
    asked = many(40) + many(40)
    with teaching(teacher) as url:
        with LLMClient(endpoint(url), cache=tmp_path / "kept.jsonl", prices=PRICES) as client:
            replies = list(client.ask_all(asked))
            keys = [r.key(client.url) for r in asked]
            spent = client.budget.spent
        paid = teacher.stats()["paid"]
        with LLMClient(endpoint(url), cache=tmp_path / "kept.jsonl", prices=PRICES) as client:
            again = list(client.ask_all(asked))
            assert client.budget.spent == pytest.approx(spent)
    assert [r.key for r in replies] == keys
    assert paid == 40 == teacher.stats()["paid"]
    assert [r.text for r in again] == [r.text for r in replies]
    assert all(r.cached and r.attempts == 0 for r in again)


def test_draws_and_every_part_of_a_request_are_told_apart() -> None:
    base = request()
    others = [
        request(draw=1),
        request(temperature=1.0),
        request(max_tokens=5),
        request(options={"top_p": 0.9}),
        request("Two cats sleep!"),
    ]
    keys = {r.key("http://a/v1") for r in [base, *others]} | {base.key("http://b/v1")}
    assert len(keys) == 7
    assert "max_tokens" not in request(options={"max_tokens": None}).body()


def test_a_row_that_a_crash_cut_short_is_asked_again(tmp_path: Path) -> None:
    teacher, kept = Teacher(idempotent=False), tmp_path / "kept.jsonl"
    with teaching(teacher) as url:
        with LLMClient(endpoint(url), cache=kept) as client:
            first = [r.text for r in client.ask_all(many(3))]
        kept.write_bytes(kept.read_bytes()[:-20])
        with LLMClient(endpoint(url), cache=kept) as client:
            assert [r.text for r in client.ask_all(many(3))] == first
        assert teacher.stats()["paid"] == 4
        with LLMClient(endpoint(url), cache=kept, mode="replay") as client:
            assert [r.text for r in client.ask_all(many(3))] == first
            missed = client.ask(request("Never asked."))
    assert missed.failure is not None and missed.failure.kind == "not_recorded"
    assert teacher.stats()["paid"] == 4


def test_two_processes_cannot_pay_into_one_file(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    with (
        LLMClient(endpoint("http://127.0.0.1:9"), cache=kept),
        pytest.raises(PumiceError, match="in use by another process"),
    ):
        LLMClient(endpoint("http://127.0.0.1:9"), cache=kept)
    # The lock is not the file of replies, which some versions of filelock would empty.
    assert (tmp_path / "kept.jsonl.lock").is_file()
    kept.write_text('{"id": 3}\n')
    with pytest.raises(PumiceError, match="line 1: this is no reply"):
        LLMClient(endpoint("http://127.0.0.1:9"), cache=kept)


# --- money and pace -------------------------------------------------------------------------------


def test_the_cap_is_never_passed_and_counts_earlier_runs(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    one = PRICES.most(request("20 cats sleep in 10 beds.", max_tokens=30))
    asked = [request(f"20 cats sleep in {k} beds.", max_tokens=30) for k in range(10, 60)]
    with teaching(Teacher()) as url:
        for cap in (3.5 * one, 3.5 * one, 5.5 * one):
            with LLMClient(endpoint(url), cache=kept, prices=PRICES, cost_cap=cap) as client:
                replies = list(client.ask_all(asked))
                assert client.budget.spent <= cap
                # It stops only when one more call could pass the cap.
                assert client.budget.spent + one > cap
            failed = [r.failure for r in replies if r.failure]
            assert failed and {f.kind for f in failed} == {"cost_cap"}
            assert all(r.text for r in replies if not r.failure)


def test_a_lost_reply_counts_as_the_most_it_can_cost(tmp_path: Path) -> None:
    teacher = Teacher(faults={"timeout": 1.0}, hang=0.3)
    with asking(
        teacher, tmp_path / "kept.jsonl", over={"timeout": 0.1, "attempts": 1}, prices=PRICES
    ) as client:
        assert client.ask(request()).failure
        assert client.budget.spent == PRICES.most(request())
        assert client.cache is not None and client.cache.lost == client.budget.spent


def test_a_cap_needs_prices_and_settings_make_sense() -> None:
    with pytest.raises(PumiceError, match="needs prices"):
        LLMClient(endpoint("http://x/v1"), cost_cap=1.0)
    for cap in (-1.0, math.nan, math.inf):
        with pytest.raises(PumiceError, match="a number from 0"):
            LLMClient(endpoint("http://x/v1"), prices=PRICES, cost_cap=cap)
    for wrong in (
        {"url": "x/v1"}, {"concurrency": 0}, {"timeout": 0}, {"timeout": math.nan},
        {"per_minute": 0}, {"per_minute": math.nan},
    ):  # fmt: skip
        with pytest.raises(PumiceError, match="given|must"):
            endpoint(**{"url": "http://x/v1"} | wrong)
    with pytest.raises(PumiceError, match="a price is negative"):
        Prices(-1, 0)
    for url in ("http://", "http://[bad/v1"):
        with pytest.raises(PumiceError, match="names no host"):
            endpoint(url)
    for key, place in (("sk-é1", 4), ("sk\n", 3), ("–sk", 1)):
        with pytest.raises(PumiceError, match=f"at place {place} of {len(key)}") as caught:
            endpoint("http://x/v1", api_key=key)
        assert "sk" not in str(caught.value)


def test_a_budget_waits_for_calls_that_may_turn_out_cheaper() -> None:
    budget = Budget(10.0)
    assert budget.reserve(8.0)
    got: list[bool] = []
    waiting = threading.Thread(target=lambda: got.append(budget.reserve(8.0)))
    waiting.start()
    budget.settle(8.0, 1.0)
    waiting.join(5)
    assert got == [True] and budget.spent == 1.0
    assert not budget.reserve(9.5)


def test_calls_start_no_faster_than_the_rate() -> None:
    limit, stop = RateLimit(per_minute=60 / 0.02), threading.Event()
    start = time.monotonic()
    for _ in range(6):
        limit.wait(stop)
    assert time.monotonic() - start >= 5 * 0.02
    limit.pause(60)
    stop.set()
    limit.wait(stop)


def test_no_more_calls_at_a_time_than_asked_for() -> None:
    teacher = Teacher(latency=0.03)
    now = most = 0
    lock = threading.Lock()
    whole = teacher.passing_fault

    def counted(name: str) -> str | None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return whole(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "passing_fault", lambda self, name: counted(name))
        with asking(teacher, over={"concurrency": 3}) as client:
            list(client.ask_all(many(12)))
    assert 1 < most <= 3


# --- messages -------------------------------------------------------------------------------------


def test_images_travel_as_data_uris(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (4, 3), "red").save(tmp_path / "a.jpg")
    PIL.Image.new("RGB", (4, 3), "red").save(tmp_path / "a.bmp")
    for name, media in (("a.jpg", "image/jpeg"), ("a.bmp", "image/png")):
        sent = chat_messages((user("What?", tmp_path / name), assistant("Red.")))
        image, text = sent[0]["content"]
        head, _, data = image["image_url"]["url"].partition(";base64,")
        assert head == f"data:{media}" and text == {"type": "text", "text": "What?"}
        if media == "image/jpeg":
            assert base64.b64decode(data) == (tmp_path / name).read_bytes()
        assert sent[1] == {"role": "assistant", "content": "Red."}
    (tmp_path / "b.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"b\.png"):
        chat_messages((user("What?", tmp_path / "b.png"),))


# --- the teacher ----------------------------------------------------------------------------------


def test_the_teacher_is_a_function_of_its_seed() -> None:
    def told(seed: int) -> list[str]:
        with asking(Teacher(seed=seed, faults={"server_error": 0.5})) as client:
            asked = (request(f"{k} cats sleep.\n\ncat: [0, 0, 0.5, 0.5]") for k in range(12))
            return [r.text for r in client.ask_all(asked)]

    assert told(0) == told(0) != told(1)


def test_faults_are_checked() -> None:
    assert parse_faults(["timeout=0.5"]) == {"timeout": 0.5}
    with pytest.raises(PumiceError, match="Did you mean 'timeout'"):
        Teacher(faults={"timeot": 0.1})
    with pytest.raises(PumiceError, match="0 to 1"):
        Teacher(faults={"timeout": 2})
    with pytest.raises(PumiceError, match="NAME=SHARE"):
        parse_faults(["timeout"])
