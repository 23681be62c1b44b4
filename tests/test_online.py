"""Many clients at once: what each gets is what it would get alone, and its place is freed."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from pumice.core.errors import DataError, PumiceError
from pumice.core.types import Request, Result, Sampling, assistant, user
from pumice.infer.engine import Engine
from pumice.infer.online import BusyError, Counters, Handle, Online, Piece
from pumice.infer.rows import Row
from pumice.infer.scheduler import Limits
from pumice.models.lmm import LMM
from pumice.models.tiling import TilingSpec
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor

PATIENCE = 60.0


@pytest.fixture(params=["pad", "hd"])
def model(request: pytest.FixtureRequest, folders: SimpleNamespace) -> Engine:
    """One view an image, or tiles."""
    tiling = TilingSpec("hd", tiny.IMAGE_SIZE, max_tiles=4) if request.param == "hd" else None
    lmm = tiny.new_lmm(folders.vision, folders.language, tiling=tiling)
    tokenizer = tiny.processor_for(lmm, folders.language).tokenizer
    processor = Processor(
        tokenizer, ImageSpec("pad", tiny.IMAGE_SIZE, tiling=tiling), "vicuna_v1", "",
        lmm.image_tokens, view_side=lmm.view_side,
    )  # fmt: skip
    return Engine(lmm, processor, max_batch=4)


def mixed(pictures: Path) -> list[Request]:
    """No image, one, two, wide ones, a conversation; greedy and drawn; with and without stops."""
    one, two, wide = pictures / "0.png", pictures / "1.png", tiny.noise(7, (90, 30))
    turns = [
        (user("what is in the red circle"),),
        (user("what", one),),
        (user("a red dog?", wide),),
        (user("what is the cat", one, two),),
        (user("what is the cat", one), assistant("a dog in a square"), user("and the red one?")),
        (user("Answer " * 30, wide),),
    ]
    requests = []
    for place, messages in enumerate([*turns, *turns]):
        drawn = {"temperature": 1.0, "top_p": 0.9} if place >= len(turns) else {}
        settings = Sampling(max_new_tokens=4 + 3 * (place % 5), seed=place, stop=("zq",), **drawn)
        requests.append(Request(messages, settings, id=str(place)))
    return requests


def fresh(engine: Engine, requests: list[Request]) -> list[Result]:
    """Each request alone, with nothing known from before."""
    return [Engine(engine.lmm, engine.processor, 1).generate([one])[0] for one in requests]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("clients", [1, 3, 12])
def test_every_arrival_order_gives_the_answers_of_single_requests(
    model: Engine, pictures: Path, clients: int
) -> None:
    requests = mixed(pictures)
    alone = fresh(model, requests)
    assert len({result.text for result in alone}) > 8
    order = list(range(len(requests)))
    random.Random(clients).shuffle(order)
    told: dict[int, tuple[list[str], Result]] = {}

    def client(places: list[int]) -> None:
        for place in places:
            handle = online.submit(requests[place])
            pieces = list(handle)
            told[place] = pieces, handle.result()

    with Online(model, prefill_chunk=7) as online:
        threads = [
            threading.Thread(target=client, args=(order[first::clients],))
            for first in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    for place, result in enumerate(alone):
        pieces, found = told[place]
        assert found == result
        assert "".join(pieces) == result.text
    counters = online.counters()
    assert counters.finished == len(requests) and not counters.failed
    assert counters.reused_tokens > 0 and counters.prompt_tokens > counters.reused_tokens


def test_joining_a_running_batch_changes_nothing(engine: Engine, pictures: Path) -> None:
    requests = [
        Request((user(text, pictures / "0.png"),), Sampling(max_new_tokens=40, seed=place))
        for place, text in enumerate(("what", "is the red dog in a circle", "Answer?"))
    ]
    alone = fresh(engine, requests)
    with Online(engine) as online:
        handles = []
        for place, request in enumerate(requests):
            handles.append(online.submit(request))
            # The next one comes when this one is some tokens on its way.
            until(
                lambda place=place: online.counters().new_tokens >= 0 and _tokens(handles) > place
            )
        assert [handle.result(PATIENCE) for handle in handles] == alone


def _tokens(handles: list[object]) -> int:
    return sum(handle._row.answer.new_tokens for handle in handles)  # type: ignore[attr-defined]


def test_a_cancelled_request_frees_its_place_and_keeps_its_text(
    engine: Engine, pictures: Path
) -> None:
    long = Request((user("what is", pictures / "0.png"),), Sampling(max_new_tokens=400))
    short = Request((user("red?"),), Sampling(max_new_tokens=5))
    [alone], [full] = fresh(engine, [short]), fresh(engine, [long])
    assert full.new_tokens > 100
    with Online(engine, max_batch=1) as online:
        first, second, third = online.submit(long), online.submit(long), online.submit(short)
        pieces = iter(first)
        heard = next(pieces)
        second.cancel()  # still in the queue
        until(lambda: online.counters().cancelled == 1)
        assert not third._done.is_set()
        first.cancel()
        assert third.result(PATIENCE) == alone
        heard += "".join(pieces)
        result = first.result(PATIENCE)
        first.cancel()  # harmless
    assert result.finish_reason == "cancelled" and result.error is None
    assert full.text.startswith(result.text) and heard == result.text
    assert second.result(0).text == "" and second.result(0).finish_reason == "cancelled"
    after = online.counters()
    assert (after.waiting, after.reading, after.running, after.positions) == (0, 0, 0, 0)
    assert (after.finished, after.cancelled, after.reserved) == (1, 2, 0)


class Leaving(Row):
    """A request whose client leaves just after the engine has looked at it so often."""

    __slots__ = ()
    looks = 0

    @property
    def cancelled(self) -> bool:  # type: ignore[override]
        Leaving.looks -= 1
        return Leaving.looks < 0


def test_who_leaves_between_any_two_looks_is_over_once(engine: Engine, pictures: Path) -> None:
    asked = Request((user("what is", pictures / "0.png"),), Sampling(max_new_tokens=5))
    [alone] = fresh(engine, [asked])
    ends = []
    for looks in range(40):
        scheduler = engine.scheduler(Limits(max_batch=2, prefill_chunk=8))
        leaves, other = engine.row(asked), engine.row(asked)
        leaves.__class__, Leaving.looks = Leaving, looks
        scheduler.add(leaves)
        scheduler.add(other)
        over: list[Row] = []
        while not scheduler.idle:
            over += scheduler.step()
        assert len(over) == 2 and set(over) == {leaves, other}
        assert other.result(engine.processor.decode).text == alone.text
        ends.append(leaves.result(engine.processor.decode).finish_reason)
    assert ends[0] == "cancelled" and ends[-1] == alone.finish_reason


def test_the_budget_is_kept(engine: Engine) -> None:
    requests = [
        Request((user("what " * count),), Sampling(max_new_tokens=20)) for count in (1, 30, 3, 20)
    ]
    alone = fresh(engine, requests)
    longest = max(result.prompt_tokens for result in alone) + 20
    budget = 2 * longest
    with Online(engine, token_budget=budget, prefill_chunk=8) as online:
        seen: list[Counters] = []
        handles = [online.submit(request) for request in requests * 3]
        while not all(handle._done.is_set() for handle in handles):
            seen.append(online.counters())
        assert [handle.result(0) for handle in handles] == alone * 3
        assert max(counters.positions for counters in seen) <= budget
        assert max(counters.running + counters.reading for counters in seen) > 1
        too_long = Request((user("what"),), Sampling(max_new_tokens=budget))
        with pytest.raises(PumiceError, match=f"at most {budget} are held"):
            online.submit(too_long)


def test_a_full_queue_says_so(engine: Engine) -> None:
    long = Request((user("what is"),), Sampling(max_new_tokens=300))
    with Online(engine, max_batch=1, max_waiting=2, max_waiting_tokens=700) as online:
        running = online.submit(long)
        until(lambda: online.counters().running == 1)
        waiting = [online.submit(long), online.submit(long)]
        with pytest.raises(BusyError, match="2 requests are waiting"):
            online.submit(long)
        waiting[0].cancel()
        until(lambda: online.counters().waiting == 1)
        more = Request((user("what is"),), Sampling(max_new_tokens=480))
        with pytest.raises(BusyError, match="at most 700 may wait"):
            online.submit(more)
        online.submit(Request((user("red"),), Sampling(max_new_tokens=3)))
        running.cancel()
    with pytest.raises(BusyError, match="closing"):
        online.submit(long)


def test_who_finds_a_place_does_not_wait_for_it(engine: Engine, pictures: Path) -> None:
    ask = Request((user("what is", pictures / "0.png"),), Sampling(max_new_tokens=3))
    alone = engine.generate([ask])
    for limits, places in (
        ({"max_batch": 2}, 2),
        ({"max_batch": 9, "token_budget": 2 * engine.row(ask).max_positions}, 2),
    ):
        for together in (1, 2, 5):
            with Online(engine, max_waiting=0, **limits) as online:
                step, go_on = online._scheduler.step, threading.Event()
                online._scheduler.step = lambda go=go_on, s=step: (go.wait(), s())[1]  # type: ignore[method-assign]
                try:
                    # Nothing has begun: the first step takes long.
                    handles = []
                    while len(handles) < places:
                        handles += online.submit_together([ask] * together)
                    with pytest.raises(BusyError, match="are waiting, and at most 0 may"):
                        online.submit_together([ask, ask])
                    assert len(online._handles) == len(handles)
                finally:
                    go_on.set()
                assert [handle.result(60) for handle in handles] == [
                    replace(alone[0], cached_tokens=handle.result().cached_tokens)
                    for handle in handles
                ]
                online.submit(ask).result(60)


def test_an_image_that_requests_share_is_opened_once(
    lmm: LMM, processor: Processor, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    load = Processor.load_image
    monkeypatch.setattr(
        Processor, "load_image", lambda *given: (opened.append(""), load(*given))[1]
    )
    image = pictures / "0.png"
    asked = [
        Request((user("what", image, image),), Sampling(max_new_tokens=2, temperature=1.0, seed=n))
        for n in range(4)
    ]
    with Online(Engine(lmm, processor, 4)) as online:
        for handle in online.submit_together(asked):
            assert handle.result(60).error is None
    assert len(opened) == 1


def test_what_is_wrong_is_said_at_once_and_the_others_go_on(
    engine: Engine, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Request((user("what is", pictures / "0.png"),), Sampling(max_new_tokens=9))
    [alone] = fresh(engine, [good])
    with Online(engine) as online:
        with pytest.raises(DataError, match=r"broken\.png"):
            online.submit(Request((user("what", pictures / "broken.png"),)))
        with pytest.raises(PumiceError, match="temperature is -1"):
            online.submit(Request((user("a"),), Sampling(temperature=-1)))
        assert online.submit(good).result(PATIENCE) == alone
        step = online._scheduler.step
        monkeypatch.setattr(online._scheduler, "step", _raise)
        failed = online.submit(good)
        error = failed.result(PATIENCE).error
        assert error is not None and "RuntimeError: no memory" in error
        with pytest.raises(PumiceError, match="no memory"):
            list(failed)
        monkeypatch.setattr(online._scheduler, "step", step)
        assert online.submit(good).result(PATIENCE) == alone


def _raise() -> list[object]:
    raise RuntimeError("no memory")


def test_pieces_in_an_event_loop(engine: Engine, pictures: Path) -> None:
    requests = mixed(pictures)[:4]
    alone = fresh(engine, requests)

    async def listen(online: Online, request: Request) -> str:
        handle = await asyncio.to_thread(online.submit, request)
        return "".join([piece.text async for piece in handle.pieces()])

    async def all_of_them(online: Online) -> list[str]:
        return list(await asyncio.gather(*(listen(online, request) for request in requests)))

    with Online(engine) as online:
        assert asyncio.run(all_of_them(online)) == [result.text for result in alone]


def test_closing_lets_requests_end_or_ends_them(engine: Engine) -> None:
    request = Request((user("what is"),), Sampling(max_new_tokens=30))
    [alone] = fresh(engine, [request])
    engine.lmm.train()
    online = Online(engine)
    assert not engine.lmm.training
    handle = online.submit(request)
    online.close(drain=PATIENCE)
    assert handle.result(0) == alone and engine.lmm.training
    online = Online(engine)
    endless = online.submit(Request((user("what is"),), Sampling(max_new_tokens=400)))
    online.close()
    assert endless.result(0).finish_reason == "cancelled"
    with pytest.raises(TimeoutError):
        _unanswered(engine).result(0.01)


def _unanswered(engine: Engine) -> Handle:
    return Handle(engine.row(Request((user("what"),))), engine.processor.decode, lambda: None)


def test_log_probabilities_are_those_of_the_model(engine: Engine, pictures: Path) -> None:
    messages = (user("what is", pictures / "0.png"),)
    settings = Sampling(max_new_tokens=6, temperature=0.7, seed=3, top_logprobs=2)
    with Online(engine) as online:
        result = online.submit(Request(messages, settings)).result(PATIENCE)
    assert result.logprobs is not None and len(result.logprobs) == 6
    ids = [entry.token_id for entry in result.logprobs]
    prompt = engine.processor.encode_prompt(messages)
    with torch.no_grad():
        logits = engine.lmm(
            torch.tensor([prompt.input_ids + ids[:-1]]), pixel_values=prompt.pixel_values
        )[0, -6:]
    expected = logits.log_softmax(-1)
    for place, entry in enumerate(result.logprobs):
        assert entry.logprob == pytest.approx(float(expected[place, ids[place]]), abs=1e-4)
        best = expected[place].topk(2)
        assert [token for token, _, _ in entry.top] == best.indices.tolist()
        assert [value for *_, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert entry.token == engine.processor.decode([entry.token_id])
    plain = engine.generate([Request(messages, Sampling(max_new_tokens=6))])[0]
    assert plain.logprobs is None


def test_every_piece_has_the_log_probabilities_of_its_tokens(
    engine: Engine, pictures: Path
) -> None:
    requests = [
        Request(one.messages, replace(one.sampling, top_logprobs=1, stop=stop))
        for one, stop in zip(mixed(pictures), [(), ("e",), ("a", " t")] * 4, strict=True)
    ]

    async def listen(online: Online, request: Request) -> tuple[list[Piece], Result]:
        handle = await asyncio.to_thread(online.submit, request)
        return [piece async for piece in handle.pieces()], handle.result(0)

    async def all_of_them(online: Online) -> list[tuple[list[Piece], Result]]:
        return list(await asyncio.gather(*(listen(online, request) for request in requests)))

    with Online(engine) as online:
        told = asyncio.run(all_of_them(online))
    assert sum(len(pieces) for pieces, _ in told) > 40
    for pieces, result in told:
        assert "".join(piece.text for piece in pieces) == result.text
        tokens = tuple(token for piece in pieces for token in piece.logprobs)
        assert tokens == result.logprobs
        # A token is told with the piece in which its text ends, and with no later one.
        for piece in pieces[:-1]:
            ids = [token.token_id for token in piece.logprobs]
            assert ids and engine.processor.decode(ids).strip() in piece.text


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "pumice-engine"]


def test_what_does_not_belong_together_is_told_at_once(folders: SimpleNamespace) -> None:
    tiling = TilingSpec("hd", tiny.IMAGE_SIZE, max_tiles=4)
    lmm = tiny.new_lmm(folders.vision, folders.language, tiling=tiling)
    tokenizer = tiny.processor_for(lmm, folders.language).tokenizer
    spec = ImageSpec("pad", tiny.IMAGE_SIZE, tiling=tiling)
    for side in (None, 2):
        other = Processor(tokenizer, spec, "vicuna_v1", "", lmm.image_tokens, view_side=side)
        with pytest.raises(PumiceError, match=f"square of tokens are {side} for the processor"):
            Engine(lmm, other)
