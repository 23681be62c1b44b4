"""The engine: batched = single, cached = uncached, and errors are results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import tiny
from pumice.core.errors import PumiceError
from pumice.core.types import Request, Result, Sampling, assistant, user
from pumice.infer.engine import Engine
from pumice.infer.sampling import Sampler, choose
from pumice.models.constants import IMAGE_ID
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.models.tiling import TilingSpec
from pumice.processing.processor import Processor
from small_requests import Recorder, mixed

# invariances


@pytest.mark.parametrize("max_batch", [4, 16])
def test_batched_equals_single(
    pictures: Path, lmm: LMM, processor: Processor, monkeypatch: pytest.MonkeyPatch, max_batch: int
) -> None:
    recorder = Recorder(monkeypatch)
    requests = mixed(pictures)
    alone = [Engine(lmm, processor, 1).generate([request])[0] for request in requests]
    single = recorder.take()
    together = Engine(lmm, processor, max_batch).generate(requests)
    sizes = set(recorder.batches)
    batched = recorder.take()
    assert together == alone
    assert len(sizes) > 3  # rows did leave one by one
    for result, one, (tokens, logits) in zip(alone, single, batched, strict=True):
        assert tokens == one[0] and len(tokens) == result.new_tokens
        torch.testing.assert_close(logits, one[1], atol=1e-5, rtol=0)


def test_cached_equals_uncached(
    pictures: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    request = mixed(pictures)[5]
    [result] = engine.generate([request])
    [(tokens, logits)] = recorder.take()
    prompt = engine.processor.encode_prompt(request.messages)
    ids = torch.tensor([prompt.input_ids + tokens[:-1]])
    with torch.no_grad():
        whole = engine.lmm(ids, pixel_values=prompt.pixel_values)[0]
    assert result.new_tokens == len(tokens) > 8 and len(set(tokens)) > 3
    torch.testing.assert_close(logits, whole[-len(tokens) :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_other_families_cached_equals_uncached(
    pictures: Path,
    lmm: LMM,
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    attention: str,
) -> None:
    # Windows of 8 are shorter than the prompts, so padding on the wrong side would show.
    config = AutoConfig.for_model(
        model_type,
        vocab_size=lmm.language.vocab_size,
        hidden_size=32,
        n_embd=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=128,
        n_positions=128,
    )
    if model_type == "gemma3_text":
        config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(3)
    lmm.language = LanguageModel.from_config(config, attention=attention).eval()
    recorder = Recorder(monkeypatch)
    requests = [r for r in mixed(pictures, 12) if not r.messages[0].images]
    requests[1] = Request(requests[1].messages, Sampling(max_new_tokens=11, seed=1))
    requests.sort(key=lambda request: request.sampling.seed)
    Engine(lmm, processor).generate(requests)
    for request, (tokens, logits) in zip(requests, recorder.take(), strict=True):
        ids = processor.encode_prompt(request.messages).input_ids + tokens[:-1]
        with torch.no_grad():
            whole = lmm(torch.tensor([ids]))[0, -len(tokens) :]
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


def test_logits_are_those_of_the_whole_prompt(pictures: Path, engine: Engine) -> None:
    messages = (user("what is", pictures / "0.png"), assistant("a cat"), user("red?"))
    prompt = engine.processor.encode_prompt(messages)
    logits = engine.logits(messages)
    with torch.no_grad():
        expected = engine.lmm(torch.tensor([prompt.input_ids]), pixel_values=prompt.pixel_values)[0]
    assert logits.shape == (len(prompt.input_ids), engine.lmm.language.vocab_size)
    assert prompt.input_ids.count(IMAGE_ID) == tiny.NUM_PATCHES
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_neighbours_do_not_matter_when_sampling(pictures: Path, engine: Engine) -> None:
    def ask(text: str, seed: int, **more: Any) -> Request:
        settings = Sampling(max_new_tokens=12, temperature=1.0, seed=seed, **more)
        return Request((user(text, pictures / "0.png"),), settings)

    mine = ask("what is", 7)
    [alone] = engine.generate([mine])
    others = [ask("the dog", 7), ask("a", 1, top_p=0.5), *mixed(pictures, 18)]
    assert engine.generate([*others[:4], mine, *others[4:]])[4] == alone
    assert engine.generate([mine])[0] == alone
    assert engine.generate([ask("what is", 8)])[0].text != alone.text


def test_an_image_is_encoded_once(
    pictures: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int] = []
    encode = LMM.encode_images
    monkeypatch.setattr(
        LMM, "encode_images", lambda lmm, x, *more: (seen.append(len(x)), encode(lmm, x, *more))[1]
    )
    data = (pictures / "1.png").read_bytes()
    moving = tmp_path / "moving.png"
    moving.write_bytes(data)
    images: list[Any] = [
        pictures / "0.png",
        pictures / "0.png",
        data,
        bytes(bytearray(data)),
        moving,
        tiny.noise(5),
        tiny.noise(5),
    ]
    engine.max_batch = 2
    short = Sampling(max_new_tokens=1)

    def ask() -> list[Result]:
        return engine.generate([Request((user("what", image),), short) for image in images])

    first = ask()
    assert sum(seen) == 3
    assert ask() == first and sum(seen) == 3
    tiny.noise(6).save(moving)  # another picture under the name of a known one
    assert (
        ask()[4]
        == Engine(engine.lmm, engine.processor).generate(
            [Request((user("what", tiny.noise(6)),), short)]
        )[0]
    )
    assert sum(seen) == 5


@pytest.mark.parametrize("tiled", [False, True])
def test_what_is_kept_of_images_is_counted_whole(folders: SimpleNamespace, tiled: bool) -> None:
    tiling = TilingSpec("hd", tiny.IMAGE_SIZE, max_tiles=4) if tiled else None
    lmm = tiny.new_lmm(folders.vision, folders.language, tiling=tiling)
    engine = Engine(lmm, tiny.processor_for(lmm, folders.language, tiling=tiling))
    asked = [
        Request((user("what", tiny.noise(seed)),), Sampling(max_new_tokens=1)) for seed in (0, 1, 2)
    ]
    engine.generate(asked)  # encoded together, and forgotten one by one
    known = engine.memory.features._known.values()
    held = {kept.untyped_storage().data_ptr(): kept.untyped_storage().nbytes() for kept in known}
    assert len(held) == 3 and sum(held.values()) == engine.memory.features.bytes


@pytest.mark.parametrize(("kept", "at_once"), [(2**20, 4), (0, 2)])
def test_images_of_waiting_requests_are_encoded_together(
    lmm: LMM,
    processor: Processor,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: int,
    at_once: int,
) -> None:
    seen: list[int] = []
    encode = LMM.encode_images
    monkeypatch.setattr(
        LMM, "encode_images", lambda lmm, x, *more: (seen.append(len(x)), encode(lmm, x, *more))[1]
    )
    images: list[Any] = [tiny.noise(number) for number in range(6)]
    images.insert(3, pictures / "broken.png")
    requests = [
        Request((user(text, image),), Sampling(max_new_tokens=3), id=f"{text} {place}")
        for place, image in enumerate(images)
        for text in ("what is", "the red cat", "a dog", "of blue")
    ]
    engine = Engine(lmm, processor, 4, feature_bytes=kept)
    results = engine.generate(requests)
    assert seen[0] == at_once and sum(seen) == 6
    failed = {result.id.split()[-1] for result in results if result.error is not None}
    assert failed == {"3"} and sum(result.error is not None for result in results) == 4
    alone = [Engine(lmm, processor, 1).generate([request])[0] for request in requests]
    assert [result.text for result in results] == [result.text for result in alone]


def test_training_mode_is_restored(engine: Engine) -> None:
    engine.lmm.train()
    engine.lmm.vision.eval()
    engine.generate([Request((user("what"),), Sampling(max_new_tokens=2))])
    assert engine.lmm.training and engine.lmm.connector.training and not engine.lmm.vision.training


# errors are results


def test_errors_are_results_and_the_others_go_on(pictures: Path, engine: Engine) -> None:
    good = mixed(pictures)[4]
    [alone] = engine.generate([good])
    bad = {
        "does not exist": Request((user("what", pictures / "nowhere.png"),)),
        "broken.png": Request((user("what", pictures / "broken.png"),), id="b7"),
        "at most 512": Request((user("cat " * 600),)),
        "alternate": Request((user("a"), user("b"))),
        "last turn": Request((user("a"), assistant("b"))),
        "temperature is -1": Request((user("a"),), Sampling(temperature=-1)),
        "top_p is 0": Request((user("a"),), Sampling(top_p=0)),
        "max_new_tokens is 0": Request((user("a"),), Sampling(max_new_tokens=0)),
    }
    heard: list[Result] = []
    results = engine.generate([*bad.values(), good], heard.append)
    assert results[-1] == alone and alone.error is None
    for told, request, result in zip(bad, bad.values(), results, strict=False):
        assert result.error is not None and told in result.error, (told, result.error)
        assert result.text == "" and result.finish_reason is None and result.id == request.id
    assert "'b7'" in (results[1].error or "")
    assert sorted(map(repr, heard)) == sorted(map(repr, results))
    assert all(r.error for r in engine.generate(list(bad.values())))
    assert engine.generate([]) == []


def test_what_is_far_too_long_is_not_even_tokenised(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is being tokenised")

    monkeypatch.setattr(engine.processor, "encode_prompt", encode)
    talk = (*(user("a"), assistant("b")) * 2000, user("c"))
    texts = ("a" * 1_000_000, "\U0001f642" * 200_000, "what " * 50_000)
    asked = [Request((user(text),)) for text in texts]
    for result in engine.generate([*asked, Request(talk)]):
        assert result.error is not None and "Shorten the text" in result.error
    with pytest.raises(AssertionError):
        engine.row(Request((user("what " * 20),)))


def test_a_foreign_processor_is_refused(lmm: LMM, processor: Processor) -> None:
    foreign = Processor(processor.tokenizer, processor.image_spec, "vicuna_v1", "", 5)
    with pytest.raises(PumiceError, match=r"5 for the processor and 16 for the model"):
        Engine(lmm, foreign)


# sampling


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -30.0]])
    for settings, weights in (
        ({"temperature": 1.0}, torch.softmax(logits[0], 0)),
        ({"temperature": 2.0}, torch.softmax(logits[0] / 2, 0)),
        (
            {"temperature": 1.0, "top_k": 2},
            torch.softmax(logits[0] + torch.tensor([0, -99, 0, -99]), 0),
        ),
        (
            {"temperature": 1.0, "top_p": 0.7},
            torch.softmax(logits[0] + torch.tensor([0, -99, 0, -99]), 0),
        ),
        ({"temperature": 1.0, "top_p": 0.6}, torch.tensor([1.0, 0, 0, 0])),
        ({"temperature": 1e-30}, torch.tensor([1.0, 0, 0, 0])),
    ):
        sampler = Sampler(Sampling(**settings))
        drawn = torch.tensor([choose(logits, [sampler])[0] for _ in range(2000)])
        share = torch.bincount(drawn, minlength=4) / 2000
        torch.testing.assert_close(share, weights, atol=0.04, rtol=0)
    assert choose(logits, [Sampler(Sampling())]) == [0]


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.95}])
def test_rounding_moves_no_draw(settings: dict[str, Any]) -> None:
    # Runs of equal logits, which rounding puts into any order; the cuts stand between such runs.
    levels = torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, -1.0, -1.0, -1.0, -9.0])
    logits = levels[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    draw = torch.Generator().manual_seed(1)
    for seed in range(200):
        rounded = logits + 1e-6 * torch.randn(9, generator=draw)
        sampling = Sampling(temperature=1.0, seed=seed, **settings)
        one, other = (choose(row[None], [Sampler(sampling)]) for row in (logits, rounded))
        assert one == other


def test_every_seed_has_draws_of_its_own_and_no_bound_is_too_large() -> None:
    seeds = (-(10**400), -2, -1, 0, 1, 2, 10**400)
    assert len({Sampler(Sampling(temperature=1.0, seed=seed)).draw() for seed in seeds}) == 7
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    free, bounded = (
        choose(logits, [Sampler(Sampling(temperature=1.0, top_k=top_k))]) for top_k in (0, 10**400)
    )
    assert free == bounded


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_largest_logit_is_the_first_of_equals(kind: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [7.0, 0.0, 1.0, 7.0]], dtype=kind)
    assert choose(logits, [Sampler(Sampling())] * 2) == [1, 0]
    assert choose(logits.t().contiguous().t(), [Sampler(Sampling())] * 2) == [1, 0]


def test_a_token_is_drawn_even_where_logits_are_no_numbers() -> None:
    logits = torch.full((1, 5), float("nan"))
    assert choose(logits, [Sampler(Sampling(temperature=1.0))])[0] in range(5)
