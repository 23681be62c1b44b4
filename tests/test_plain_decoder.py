"""The decoder with fewer operations: what transformers computes, or transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.core.types import Request, Sampling, user
from pumice.infer import one_row
from pumice.infer.best_decoder import best_decoder
from pumice.infer.decoder import AnyDecoder, Chunk
from pumice.infer.engine import Engine
from pumice.infer.online import Online
from pumice.infer.plain_decoder import PlainDecoder
from pumice.infer.scheduler import Limits
from pumice.models.live_adapter import keep_adapter
from pumice.models.lmm import LMM
from pumice.models.lora import Adapter
from pumice.models.quantize import METHODS, pack_for_cpu, quantize_language
from pumice.processing.processor import Processor
from small_requests import Recorder, mixed
from tiny import LLAMA_KINDS, with_language


@pytest.mark.parametrize(("family", "more"), LLAMA_KINDS)
def test_it_computes_what_transformers_computes(
    lmm: LMM,
    processor: Processor,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    more: dict[str, Any],
) -> None:
    with_language(lmm, family, **more)
    assert isinstance(best_decoder(lmm), PlainDecoder)
    requests = mixed(pictures)
    recorder = Recorder(monkeypatch)
    fast = Engine(lmm, processor, 4).generate(requests)
    found = recorder.take()
    slow = Engine(lmm, processor, 4)
    slow._decoder = AnyDecoder(lmm)
    slow._weights = tuple((p.data_ptr(), p._version) for p in lmm.parameters())
    assert slow.generate(requests) == fast
    for (tokens, logits), (expected, theirs) in zip(found, recorder.take(), strict=True):
        assert tokens == expected
        torch.testing.assert_close(logits, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("by_torch", [False, True])
@torch.inference_mode()
def test_a_row_alone_is_computed_as_it_is_among_others(
    lmm: LMM, monkeypatch: pytest.MonkeyPatch, family: str, key_heads: int, by_torch: bool
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 if by_torch else 1)
    monkeypatch.setattr(one_row, "_WORTH_TORCH", 0)
    asked = []
    attend = one_row.attention
    monkeypatch.setattr(one_row, "attention", lambda *given: asked.append(1) or attend(*given))
    decoder = best_decoder(with_language(lmm, family, num_key_value_heads=key_heads))
    assert isinstance(decoder, PlainDecoder) and decoder._one is not None
    ids = torch.arange(40, 60)
    caches = decoder.cache(15), decoder.cache(15)
    for cache in caches:
        decoder.read([Chunk(lmm.language.embed(ids[:15]), 0, cache, None, True)])
    pair = decoder.cache()
    pair.join(caches[1], 15)
    pair.join(caches[1], 15)
    for place in range(15, 20):
        token = int(ids[place])
        [alone] = decoder.step([token], [place], caches[0], None)
        for row in decoder.step([token, token], [place, place], pair, None):
            torch.testing.assert_close(alone, row, atol=2e-5, rtol=1e-5)
    assert bool(asked) == by_torch
    mine, theirs = caches[0].pieces(0, 0, 20), pair.pieces(1, 0, 20)
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("worth", [0, 1 << 40])
def test_numpy_takes_torchs_threads_while_an_engine_works(
    lmm: LMM, processor: Processor, monkeypatch: pytest.MonkeyPatch, worth: int
) -> None:
    libraries = one_row._blas().lib_controllers
    if not libraries:
        pytest.skip("numpy is built with a BLAS whose threads threadpoolctl cannot set")
    monkeypatch.setattr(one_row, "_WORTH_THREADS", worth)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    engine = Engine(lmm, processor)
    engine.scheduler(Limits(1))  # the decoder is made and compared by now
    counts = lambda: [library.num_threads for library in libraries]  # noqa: E731
    before, seen = counts(), []
    step = PlainDecoder.step

    def watched(*given: Any) -> torch.Tensor:
        seen.append(counts())
        return step(*given)

    monkeypatch.setattr(PlainDecoder, "step", watched)
    request = Request((user("what"),), Sampling(max_new_tokens=4))
    engine.generate([request])
    list(engine.stream(request))
    with Online(engine) as online:
        online.submit(request).result()
    assert seen == 9 * [len(libraries) * [3 if worth == 0 else 1]]
    assert counts() == before


def test_another_activation_runs_in_torch(lmm: LMM) -> None:
    decoder = best_decoder(with_language(lmm, "llama", hidden_act="gelu"))
    assert isinstance(decoder, PlainDecoder) and decoder._one is None


@pytest.mark.parametrize("method", METHODS)
def test_quantised_layers_are_used_as_they_are(lmm: LMM, processor: Processor, method: Any) -> None:
    requests = [Request((user(text),), Sampling(max_new_tokens=12)) for text in ("what", "a red")]
    quantize_language(lmm.language, method)
    pack_for_cpu(lmm.language)
    fast = Engine(lmm, processor)
    results = fast.generate(requests)
    assert isinstance(fast._decoder, PlainDecoder)
    slow = Engine(lmm, processor)
    slow.scheduler(Limits(1))
    slow._decoder = AnyDecoder(lmm)
    assert slow.generate(requests) == results


@pytest.mark.parametrize("method", [None, "int8"])
def test_a_kept_adapter_is_in_the_copies_where_they_can_hold_it(
    lmm: LMM, processor: Processor, pictures: Path, method: Any
) -> None:
    layers = [name for name, layer in lmm.language.model.named_modules()
              if isinstance(layer, torch.nn.Linear) and "lm_head" not in name]  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    pairs = {
        f"{name}.weight": (
            torch.randn(4, layer.in_features, generator=draw),
            torch.randn(layer.out_features, 4, generator=draw),
        )
        for name in layers[::2]
        if (layer := lmm.language.model.get_submodule(name))
    }
    requests = mixed(pictures)
    without = Engine(lmm, processor, 4).generate(requests)
    if method is not None:
        quantize_language(lmm.language, method)
        pack_for_cpu(lmm.language)
    keep_adapter(lmm.language, Adapter(0.1, pairs), torch.float32)
    kept = [p.clone() for p in lmm.language.parameters()]
    assert isinstance(best_decoder(lmm), PlainDecoder if method is None else AnyDecoder)
    fast = Engine(lmm, processor, 4).generate(requests)
    slow = Engine(lmm, processor, 4)
    slow.scheduler(Limits(1))
    slow._decoder = AnyDecoder(lmm)
    assert slow.generate(requests) == fast != without
    # The base itself is what it was.
    assert all(map(torch.equal, kept, lmm.language.parameters()))


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "the blocks of another family, gpt2"),
        ("gemma", {}, "the blocks of another family, gemma"),
        ("mistral", {"sliding_window": 8}, "sliding windows"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "positions of another kind, dynamic",
        ),
    ],
)
def test_other_models_run_through_transformers(
    lmm: LMM, family: str, more: dict[str, Any], why: str
) -> None:
    with_language(lmm, family, **more)
    assert isinstance(best_decoder(lmm), AnyDecoder)
    with pytest.raises(PumiceError, match=f"cannot be compiled: it has {why}"):
        best_decoder(lmm, compiled=True)
    assert isinstance(best_decoder(lmm.bfloat16()), AnyDecoder)


def test_hooks_are_heard(lmm: LMM) -> None:
    heard: list[object] = []
    block = lmm.language.model.model.layers[1]  # type: ignore[union-attr, index]
    handle = block.register_forward_hook(lambda module, given, out: heard.append(out))
    assert isinstance(best_decoder(lmm), AnyDecoder)
    handle.remove()
    assert isinstance(best_decoder(lmm), PlainDecoder)


def test_a_model_that_is_not_its_family_runs_through_transformers(
    lmm: LMM, caplog: pytest.LogCaptureFixture
) -> None:
    layer = lmm.language.model.model.layers[0]  # type: ignore[union-attr, index]
    forward = layer.forward
    layer.forward = lambda *given, **more: forward(*given, **more) * 1.1
    assert isinstance(best_decoder(lmm), AnyDecoder)
    assert "does not compute what its family does" in caplog.text
