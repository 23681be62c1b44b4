"""The decoder for GPUs: what transformers computes, in steps that could be recorded.

No GPU is needed. A CUDA graph runs the same operations over the same addresses again and reads
nothing else; `Traced` does so on the CPU, by torch's tracer, with every number of Python's fixed at
what it was.
"""

from __future__ import annotations

import inspect
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from pumice.core.errors import PumiceError
from pumice.core.types import Request, Sampling, user
from pumice.infer import slot_decoder, slots
from pumice.infer.best_decoder import best_decoder
from pumice.infer.decoder import AnyDecoder, Chunk, Decoder
from pumice.infer.engine import Engine
from pumice.infer.online import Online
from pumice.infer.scheduler import Limits
from pumice.infer.slot_decoder import SlotDecoder
from pumice.infer.slots import COLUMNS, SlotCache, SlotMemory, rounded_columns, rounded_slots
from pumice.models import compiled
from pumice.models.lmm import LMM
from pumice.models.quantize import pack_for_cpu, quantize_language
from pumice.processing.processor import Processor
from small_requests import Recorder, mixed
from tiny import LLAMA_KINDS, with_language

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")


class Traced:
    """Records steps as torch's tracer sees them, and counts how often each is run."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replays = 0

    def record(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        traced = make_fx(step)()
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replays += 1
            found: torch.Tensor = traced()
            return found.clone()

        return replay


def running(lmm: LMM, processor: Processor, decoder: Decoder, batch: int = 4) -> Engine:
    engine = Engine(lmm, processor, batch)
    engine.scheduler(Limits(1))
    engine._decoder = decoder
    return engine


@pytest.mark.parametrize(
    ("family", "more"),
    [*LLAMA_KINDS, ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu"})],
)
@pytest.mark.parametrize("graphs", [None, Traced])
def test_it_computes_what_transformers_computes(
    lmm: LMM,
    processor: Processor,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    more: dict[str, Any],
    graphs: Any,
) -> None:
    with_language(lmm, family, **more)
    requests = mixed(pictures)
    recorder = Recorder(monkeypatch)
    expected = running(lmm, processor, AnyDecoder(lmm)).generate(requests)
    theirs = recorder.take()
    traced = graphs and graphs()
    fast = running(lmm, processor, SlotDecoder(lmm, graphs=traced))
    assert fast.generate(requests) == expected
    for (tokens, logits), (same, wanted) in zip(recorder.take(), theirs, strict=True):
        assert tokens == same
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-5)
    if traced:
        # The second time there are recordings of all that comes, and other rows in them.
        replays = traced.replays
        assert fast.generate(requests[::-1]) == expected[::-1]
        assert traced.recorded >= 3 and traced.replays - replays > traced.recorded
        # Nobody has written into the weights, which the model still computes with.
        again = running(lmm, processor, AnyDecoder(lmm))
        assert again.generate(requests) == expected


def test_chunks_prefixes_and_rows_that_leave_make_no_difference(
    lmm: LMM, processor: Processor, pictures: Path
) -> None:
    requests = 2 * mixed(pictures) + mixed(pictures, 9)
    expected = [running(lmm, processor, AnyDecoder(lmm), 1).generate([r])[0] for r in requests]
    traced = Traced()
    for chunk in (1, 5, 2048):
        engine = running(lmm, processor, SlotDecoder(lmm, graphs=traced), 5)
        with Online(engine, prefill_chunk=chunk) as online:
            handles = [online.submit(request) for request in requests]
            handles[3].cancel()
            found = [handle.result() for handle in handles]
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            if place != 3:
                assert (one.text, one.new_tokens) == (other.text, other.new_tokens)
    assert traced.replays > 50


@pytest.mark.parametrize("quantised", [False, True])
def test_half_precision_is_as_near_to_float32_as_transformers_is(
    lmm: LMM, processor: Processor, pictures: Path, quantised: bool
) -> None:
    """Packed for the CPU int8 layers have a kernel of their own, and keep transformers' code."""
    with_language(lmm, "qwen3")
    ids = torch.arange(30, 70)
    exact = steps(AnyDecoder(lmm), lmm, ids)
    if quantised:
        quantize_language(lmm.language, "int8")
        exact = steps(AnyDecoder(lmm), lmm, ids)
        torch.testing.assert_close(steps(SlotDecoder(lmm), lmm, ids), exact, atol=2e-3, rtol=0)
    lmm.bfloat16()
    decoder = best_decoder(lmm)
    assert isinstance(decoder, SlotDecoder)
    apart = [float((steps(d, lmm, ids) - exact).abs().max()) for d in (decoder, AnyDecoder(lmm))]
    assert 0 < apart[0] < 1.5 * apart[1]
    if quantised:
        pack_for_cpu(lmm.language)
        assert isinstance(best_decoder(lmm), AnyDecoder)
        with pytest.raises(PumiceError, match="it has int8 weights in the CPU's order"):
            best_decoder(lmm, compiled=True)


@torch.inference_mode()
def steps(decoder: Decoder, lmm: LMM, ids: torch.Tensor) -> torch.Tensor:
    """float[n, V]: a prompt of half the ids is read in two chunks, and a token at a time said."""
    half = len(ids) // 2
    [cache] = decoder.caches([half])
    embeds = lmm.language.embed(ids)
    decoder.read([Chunk(embeds[:7], 0, cache, None, False)])
    found = decoder.read([Chunk(embeds[7:half], 7, cache, None, True)])
    batch = decoder.cache()
    batch.join(cache, half)
    for place in range(half, len(ids)):
        found += list(decoder.step([int(ids[place])], [place], batch, None))
    return torch.stack(found).float()


def test_the_weights_are_held_once(lmm: LMM, processor: Processor, pictures: Path) -> None:
    lmm.bfloat16()
    kept = {name: tensor.clone() for name, tensor in lmm.state_dict().items()}
    with torch.inference_mode():
        decoder = best_decoder(lmm)
    assert isinstance(decoder, SlotDecoder)
    attention = lmm.language.model.model.layers[0].self_attn  # type: ignore[union-attr, index]
    whole = decoder._blocks[0].qkv.weight
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert layer.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert not layer.weight.is_inference()  # it can be trained as before
    assert all(torch.equal(tensor, kept[name]) for name, tensor in lmm.state_dict().items())
    # Another decoder of the same model has them where they are.
    again = SlotDecoder(lmm)
    assert again._blocks[0].qkv.weight.data_ptr() == whole.data_ptr()
    with torch.no_grad():
        attention.q_proj.weight.fill_(1.0)
    assert (whole[0] == 1).all()


def test_the_decoder_is_made_once(
    lmm: LMM, processor: Processor, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lmm.bfloat16()
    made: list[object] = []
    init = SlotDecoder.__init__
    monkeypatch.setattr(
        SlotDecoder, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1]
    )
    engine = Engine(lmm, processor)
    request = Request((user("the red cat in a blue circle"),), Sampling(max_new_tokens=4))
    [first] = engine.generate([request])
    [again] = engine.generate([request])
    assert len(made) == 1
    assert again.cached_tokens > first.cached_tokens == 0  # nor is what is known forgotten


def test_all_it_computes_with_is_where_the_weights_are(lmm: LMM) -> None:
    """torch's device without numbers stands in for a GPU: what is on the CPU does not mix."""
    lmm.to("meta", torch.bfloat16)
    decoder = SlotDecoder(lmm)
    with torch.inference_mode():
        caches = decoder.caches([9, 7])
        embeds = lmm.language.embed(torch.arange(16, device=lmm.device))
        chunks = [
            Chunk(embeds[:9], 0, caches[0], None, True),
            Chunk(embeds[9:12], 0, caches[1], None, False),
        ]
        found = decoder.read(chunks)
        found += decoder.read([Chunk(embeds[12:], 3, caches[1], None, True)])
        batch = decoder.cache()
        batch.join(caches[0], 9, 1)
        batch.join(caches[1], 7)
        found += list(decoder.step([1, 2], [9, 7], batch, None))
        batch.leave(0, 8)
        found += list(decoder.step([2], [8], batch, None))
    assert {logits.device.type for logits in found} == {"meta"} and len(found) == 5


# memory


def test_memory_is_used_again_but_never_by_two(lmm: LMM) -> None:
    decoder = SlotDecoder(lmm)
    one = decoder.cache()
    other = decoder.cache()
    assert one.memory is not other.memory
    memory = one.memory
    del one
    assert decoder.cache().memory is memory


def test_a_row_of_no_numbers_reaches_nobody(lmm: LMM) -> None:
    decoder = SlotDecoder(lmm)
    ids = torch.arange(30, 50)

    @torch.inference_mode()
    def row(length: int, broken: bool = False) -> Any:
        [cache] = decoder.caches([length])
        embeds = lmm.language.embed(ids[:length])
        decoder.read([Chunk(embeds * float("nan") if broken else embeds, 0, cache, None, True)])
        return cache

    @torch.inference_mode()
    def step(batch: SlotCache, lengths: list[int]) -> torch.Tensor:
        return decoder.step([7] * len(lengths), lengths, batch, None)

    alone = decoder.cache()
    alone.join(row(4), 4)
    expected = step(alone, [4])[0]
    batch = decoder.cache()
    batch.join(row(15, broken=True), 15)
    batch.join(row(4), 4)
    torch.testing.assert_close(step(batch, [15, 4])[1], expected, atol=1e-6, rtol=1e-5)
    batch.leave(0, 5)  # the other moves into its slot
    batch.join(row(4), 4)
    found = step(batch, [5, 4])
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[1], expected, atol=1e-6, rtol=1e-5)
    batch.leave(1, 6)
    batch.join(row(15, broken=True), 15)
    batch.leave(1, 6)  # nobody moves
    batch.join(row(4), 4)
    torch.testing.assert_close(step(batch, [6, 4])[1], expected, atol=1e-6, rtol=1e-5)


def test_what_grows_keeps_its_rows_and_drops_its_recordings() -> None:
    memory = SlotMemory(2, torch.zeros(3, 0, 4))
    memory.hold(1, 10)
    assert memory.data[0].shape == (2, 1, 3, 2 * COLUMNS, 4)
    memory.data[0].fill_(5.0)
    memory.recorded[1, COLUMNS] = lambda: torch.zeros(0)
    memory.seen.add((1, COLUMNS))
    before = memory.data
    memory.hold(1, 2 * COLUMNS - 1)  # there is room
    assert memory.data is before and memory.recorded
    memory.hold(5, 2 * COLUMNS)
    assert memory.data[0].shape == (2, 8, 3, 4 * COLUMNS, 4)
    assert not memory.recorded and not memory.seen
    assert (memory.data[0][:, :1, :, : 2 * COLUMNS] == 5).all()
    assert memory.data[0].sum() == before[0].sum() and memory.inputs.shape == (2, 8)
    memory.hold(1, 30 * COLUMNS)  # one long row alone needs no slots for eight
    assert memory.data[0].shape == (2, 1, 3, 31 * COLUMNS, 4)
    assert (memory.data[0][:, :, :, : 2 * COLUMNS] == 5).all()
    memory.hold(16, 2 * COLUMNS)  # nor sixteen short ones its columns
    assert memory.data[0].shape == (2, 16, 3, 5 * COLUMNS, 4)
    assert [rounded_slots(n) for n in (0, 1, 2, 3, 5, 16, 17, 33)] == [0, 1, 2, 4, 8, 16, 32, 48]
    assert [rounded_columns(n) for n in (1, 128, 129)] == [128, 128, 256]


def test_what_grows_is_never_there_twice_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SlotMemory(2, torch.zeros(3, 0, 4))
    memory.hold(1, 10)
    assert memory.inputs[1].data_ptr() % 16 == 0  # or what is compiled copies it in every block
    old, alive = [weakref.ref(part) for part in memory.data], []
    moved = slots._moved

    def seen(part: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        alive.append(sum(one() is not None for one in old))
        if shape[3] > 10 * COLUMNS:
            raise torch.OutOfMemoryError("no more of it")
        return moved(part, shape)

    monkeypatch.setattr(slots, "_moved", seen)
    memory.hold(1, 2 * COLUMNS)
    assert alive == [2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        memory.hold(1, 20 * COLUMNS)
    memory.hold(2, 10)  # it goes on, of nothing
    assert memory.data[0].shape == memory.data[1].shape == (2, 2, 3, 2 * COLUMNS, 4)


def test_the_latest_used_recordings_are_kept(lmm: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_decoder, "_MOST_RECORDED", 2)
    decoder = SlotDecoder(lmm, graphs=Traced())
    memory = SlotMemory(len(decoder._blocks), decoder._like)
    memory.hold(8, 10)
    with torch.inference_mode():
        for slots in (1, 1, 2, 2, 1, 4, 4):
            decoder._run(memory, slots, COLUMNS)
    assert list(memory.recorded) == [(1, COLUMNS), (4, COLUMNS)]


# recordings that fail


class Failing:
    def record(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")


class Wrong:
    def record(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        logits = step()
        return lambda: logits + logits.abs().max() / 10


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a user is told; torch's tracer logs for itself."""
    return [one.getMessage() for one in caplog.records if one.name.startswith("pumice")]


@pytest.mark.parametrize(
    ("graphs", "reason"),
    [(Failing, r"recording one failed \(operation not permitted"), (Wrong, "0.1 from what it")],
)
def test_without_a_right_recording_steps_run_as_they_are(
    lmm: LMM,
    processor: Processor,
    pictures: Path,
    caplog: pytest.LogCaptureFixture,
    graphs: Any,
    reason: str,
) -> None:
    requests = mixed(pictures)
    expected = running(lmm, processor, AnyDecoder(lmm)).generate(requests)
    decoder = SlotDecoder(lmm, graphs=graphs())
    assert running(lmm, processor, decoder).generate(requests) == expected
    [warning] = told(caplog)
    assert "decode steps are run kernel by kernel" in warning
    assert re.search(reason, warning)


def test_cuda_graphs_are_asked_for_as_this_torch_takes_them() -> None:
    """What can be said of them without a GPU: names and arguments."""
    assert callable(torch.cuda.graph_pool_handle) and callable(torch.cuda.CUDAGraph.replay)
    taken = inspect.signature(torch.cuda.graph.__init__).parameters
    assert ["self", "cuda_graph", "pool", "stream", "capture_error_mode"] == list(taken)[:5]


# compiled


@pytest.fixture
def _compiler() -> None:
    if not compiled.has_compiler("cpu"):
        pytest.skip("torch.compile needs a C++ compiler (Debian: apt install g++)")


@pytest.mark.usefixtures("_compiler")
def test_compiled_it_says_the_same(
    lmm: LMM, processor: Processor, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [*mixed(pictures), *mixed(pictures, 150)[:2]]  # the longest is past 128 columns
    expected = Engine(lmm, processor, 9).generate(requests)
    engine = Engine(lmm, processor, 9, compiled=True)
    engine.prepare()
    decoder = engine._decoder
    assert isinstance(decoder, SlotDecoder)
    ready = counters["stats"]["unique_graphs"]
    assert engine.generate(requests) == expected and not told(caplog)
    assert decoder._memory.data[0].shape[3] > 2 * COLUMNS  # it has grown
    # Nobody's question waits for a compiler.
    assert counters["stats"]["unique_graphs"] == ready > 0


@pytest.mark.usefixtures("_compiler")
def test_a_compiled_step_copies_no_keys(lmm: LMM) -> None:
    """One key of a row is written; whoever writes all of them again halves the speed and more."""
    decoder = SlotDecoder(lmm)
    shape, slots_, columns = decoder._shape, 3, 640
    memory = SlotMemory(1, decoder._like)
    memory.hold(slots_, columns)
    known = [part[0, :slots_, :, :columns] for part in memory.data]
    places = torch.arange(slots_)
    hidden, mask = torch.ones(slots_, decoder._table.shape[1]), torch.zeros(slots_, 1, 1, columns)
    turns, at = decoder._turns_for(columns)[:, places], shape.written_at(places)
    given: list[Any] = [decoder._blocks[0], hidden, turns, at, *known, mask]
    with torch.inference_mode():
        step = torch.compile(shape.step, dynamic=False)
        _, [code] = run_and_get_code(step, *given)
    made = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", code)
    sizes = [math.prod(int(side) for side in one.split(",") if side.strip()) for one in made]
    assert sizes and max(sizes) < known[0].numel()


def test_a_decoder_that_is_not_its_family_is_not_used(
    lmm: LMM, caplog: pytest.LogCaptureFixture
) -> None:
    layer = lmm.bfloat16().language.model.model.layers[0]  # type: ignore[union-attr, index]
    forward = layer.forward
    layer.forward = lambda *given, **more: forward(*given, **more) * 1.5
    assert isinstance(best_decoder(lmm), AnyDecoder)
    assert "does not compute what its family does" in caplog.text
