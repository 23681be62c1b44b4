"""The engine: batched = single, cached = uncached, streamed = whole, and errors are results."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

import pumice
import tiny
from pumice.core.errors import DataError, PumiceError
from pumice.core.types import Message, Request, Result, Sampling, TextPart, assistant, user
from pumice.infer import decoding
from pumice.infer.answer import Answer
from pumice.infer.engine import Engine
from pumice.infer.model import Model
from pumice.infer.requests import chat_messages, read_request
from pumice.infer.sampling import Sampler, choose
from pumice.models.checkpoint import save_checkpoint
from pumice.models.constants import IMAGE_ID
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("infer")
    tiny.vision_folder(root / "vision")
    tiny.language_folder(root / "language", tied=False)
    for number in range(3):
        picture(number).save(root / f"{number}.png")
    (root / "broken.png").write_bytes(b"not a picture")
    return root


@pytest.fixture
def lmm(root: Path) -> LMM:
    torch.manual_seed(0)
    return LMM.from_backbones(root / "vision", root / "language", "mlp2x_gelu", -2, "patch").eval()


@pytest.fixture
def processor(root: Path, lmm: LMM) -> Processor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "language")
    return Processor(
        tokenizer, ImageSpec("pad", tiny.IMAGE_SIZE), "vicuna_v1", "", lmm.image_tokens
    )


@pytest.fixture
def engine(lmm: LMM, processor: Processor) -> Engine:
    return Engine(lmm, processor)


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> PIL.Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


def mixed(root: Path, n: int = 24) -> list[Request]:
    """Prompts of many lengths, with none, one and two images."""
    out = []
    for i, text in enumerate(["what is", "the red cat in a blue circle " * 3, "Answer?"]):
        for images in ([], [root / "0.png"], [root / "1.png", root / "2.png"]):
            new = max(n - 2 * len(out), 3)
            out.append(Request((user(text, *images),), Sampling(max_new_tokens=new), id=f"{i}"))
    return out


class Recorder:
    """Stands in for `choose` and keeps what every row saw, by its settings' object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.batches: list[int] = []
        self.known: list[Sampler] = []
        monkeypatch.setattr(decoding, "choose", self)

    def __call__(self, logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
        tokens = choose(logits, samplers)
        self.batches.append(len(samplers))
        self.known += samplers
        for row, token, sampler in zip(logits, tokens, samplers, strict=True):
            self.logits.setdefault(id(sampler), []).append(row.clone())
            self.tokens.setdefault(id(sampler), []).append(token)
        return tokens

    def take(self) -> list[tuple[list[int], torch.Tensor]]:
        """(tokens, float[n, V]) of each row in the order the rows came, and forgets them."""
        out = [(self.tokens[k], torch.stack(self.logits[k])) for k in self.tokens]
        self.logits, self.tokens, self.batches, self.known = {}, {}, [], []
        return out


# invariances


@pytest.mark.parametrize("max_batch", [4, 16])
def test_batched_equals_single(
    root: Path, lmm: LMM, processor: Processor, monkeypatch: pytest.MonkeyPatch, max_batch: int
) -> None:
    recorder = Recorder(monkeypatch)
    requests = mixed(root)
    alone = [Engine(lmm, processor, 1).generate([request])[0] for request in requests]
    single = recorder.take()
    together = Engine(lmm, processor, max_batch).generate(requests)
    sizes = set(recorder.batches)
    batched = recorder.take()
    assert together == alone
    assert len(sizes) > 3  # rows did leave one by one
    order = sorted(range(len(requests)), key=lambda i: alone[i].prompt_tokens)
    for i, (tokens, logits) in zip(order, batched, strict=True):
        assert tokens == single[i][0] and len(tokens) == alone[i].new_tokens
        torch.testing.assert_close(logits, single[i][1], atol=1e-5, rtol=0)


def test_cached_equals_uncached(
    root: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    request = mixed(root)[5]
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
    root: Path,
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
    requests = [r for r in mixed(root, 12) if not r.messages[0].images]
    requests[1] = Request(requests[1].messages, Sampling(max_new_tokens=11))
    Engine(lmm, processor).generate(requests)
    order = sorted(requests, key=lambda r: len(processor.encode_prompt(r.messages).input_ids))
    for request, (tokens, logits) in zip(order, recorder.take(), strict=True):
        ids = processor.encode_prompt(request.messages).input_ids + tokens[:-1]
        with torch.no_grad():
            whole = lmm(torch.tensor([ids]))[0, -len(tokens) :]
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


def test_logits_are_those_of_the_whole_prompt(root: Path, engine: Engine) -> None:
    messages = (user("what is", root / "0.png"), assistant("a cat"), user("red?"))
    prompt = engine.processor.encode_prompt(messages)
    logits = engine.logits(messages)
    with torch.no_grad():
        expected = engine.lmm(torch.tensor([prompt.input_ids]), pixel_values=prompt.pixel_values)[0]
    assert logits.shape == (len(prompt.input_ids), engine.lmm.language.vocab_size)
    assert prompt.input_ids.count(IMAGE_ID) == tiny.NUM_PATCHES
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_neighbours_do_not_matter_when_sampling(root: Path, engine: Engine) -> None:
    def ask(text: str, seed: int, **more: Any) -> Request:
        settings = Sampling(max_new_tokens=12, temperature=1.0, seed=seed, **more)
        return Request((user(text, root / "0.png"),), settings)

    mine = ask("what is", 7)
    [alone] = engine.generate([mine])
    others = [ask("the dog", 7), ask("a", 1, top_p=0.5), *mixed(root, 18)]
    assert engine.generate([*others[:4], mine, *others[4:]])[4] == alone
    assert engine.generate([mine])[0] == alone
    assert engine.generate([ask("what is", 8)])[0].text != alone.text


def test_an_image_is_encoded_once(
    root: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = LMM.encode_images
    monkeypatch.setattr(
        LMM, "encode_images", lambda self, x: (seen.append(len(x)), encode(self, x))[1]
    )
    data = (root / "1.png").read_bytes()
    opened = picture(5)
    images: list[Any] = [
        root / "0.png",
        root / "0.png",
        data,
        bytes(bytearray(data)),
        opened,
        opened,
    ]
    engine.max_batch = 2
    short = Sampling(max_new_tokens=1)
    engine.generate([Request((user("what", image),), short) for image in images])
    assert sum(seen) == 3


def test_training_mode_is_restored(engine: Engine) -> None:
    engine.lmm.train()
    engine.lmm.vision.eval()
    engine.generate([Request((user("what"),), Sampling(max_new_tokens=2))])
    assert engine.lmm.training and engine.lmm.connector.training and not engine.lmm.vision.training


# errors are results


def test_errors_are_results_and_the_others_go_on(root: Path, engine: Engine) -> None:
    good = mixed(root)[4]
    [alone] = engine.generate([good])
    bad = {
        "does not exist": Request((user("what", root / "nowhere.png"),)),
        "broken.png": Request((user("what", root / "broken.png"),), id="b7"),
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


def test_a_foreign_processor_is_refused(lmm: LMM, processor: Processor) -> None:
    foreign = Processor(processor.tokenizer, processor.image_spec, "vicuna_v1", "", 5)
    with pytest.raises(PumiceError, match=r"5 for the processor and 16 for the model"):
        Engine(lmm, foreign)


# how answers end


def greedy(engine: Engine, text: str, **more: Any) -> Result:
    [result] = engine.generate([Request((user(text),), Sampling(**more))])
    return result


def test_length_and_context_limit(engine: Engine) -> None:
    result = greedy(engine, "cat", max_new_tokens=5)
    assert (result.finish_reason, result.new_tokens) == ("length", 5)
    full = greedy(engine, "cat " * 480, max_new_tokens=100)
    assert full.prompt_tokens + full.new_tokens == engine.lmm.language.max_positions
    assert full.finish_reason == "length"


def test_end_token_stops_and_leaves_no_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    free = greedy(engine, "cat", max_new_tokens=12)
    [(tokens, _)] = recorder.take()
    place = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(Processor, "end_token_ids", property(lambda self: (tokens[place],)))
    ended = greedy(engine, "cat", max_new_tokens=12)
    assert free.finish_reason == "length"
    assert (ended.finish_reason, ended.new_tokens) == ("stop", place + 1)
    assert ended.text == engine.processor.decode(tokens[:place]).strip()


def answer_of(decode: Callable[[Sequence[int]], str], ids: Sequence[int], **more: Any) -> list[str]:
    """What had settled after each token, and the final text at the end."""
    options = {"end_tokens": (2,), "stop": (), "max_tokens": 999, **more}
    answer = Answer(decode, **options)
    seen = []
    for token in ids:
        over = answer.push(token)
        seen.append(answer.settled)
        if over:
            break
    return [*seen, answer.text]


TEXTS = ["naïve 猫 😀é", " a cat\n\nis 고양이  ", "ééé😀😀", "a"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_streams_whole_characters(processor: Processor, text: str, ended: bool) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    ways: list[tuple[Callable[[Sequence[int]], str], list[int]]] = [
        (processor.decode, ids),
        (
            lambda ids: bytes(i - 3 for i in ids).decode(errors="replace"),
            [b + 3 for b in text.encode()],
        ),
    ]
    for decode, tokens in ways:
        *seen, final = answer_of(decode, [*tokens, 2] if ended else tokens)
        assert final == text.strip()
        for early, late in zip(seen, [*seen[1:], final], strict=True):
            assert late.startswith(early) and "\N{REPLACEMENT CHARACTER}" not in early


def test_a_character_cut_off_by_the_limit_leaves_no_mark(processor: Processor) -> None:
    ids = processor.tokenizer.encode("é猫", add_special_tokens=False)
    for length in range(1, len(ids)):
        *_, final = answer_of(processor.decode, ids, max_tokens=length)
        assert final in ("", "é"), (length, final)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("cat",), "a red"), (("zzz", "red c"), "a"), (("é",), "a red cat in"), (("zzz",), None)],
)
def test_stop_strings_cut_and_never_leak(
    processor: Processor, stop: tuple[str, ...], expected: str | None
) -> None:
    text = "a red cat in é circle"
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    *seen, final = answer_of(processor.decode, [*ids, 2], stop=stop)
    assert final == (text if expected is None else expected)
    assert all(final.startswith(piece) for piece in seen)


def test_broken_bytes_stream_as_they_end(processor: Processor) -> None:
    # Decoders with byte fallback call a whole run broken for one wrong byte in it.
    run = [3 + byte for byte in b"8\xe9\xc3\xa98"]
    for ids in (run, [*run, 300, *run], [300, *run[:2]], [*run[:1], *run[1:2] * 6]):
        *seen, final = answer_of(processor.decode, [*ids, 2])
        assert all(final.startswith(piece) for piece in seen)
        assert ("8" in final) == (3 + ord("8") in ids)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(3, 400, (20,), generator=generator).tolist()
        *seen, final = answer_of(processor.decode, ids, max_tokens=20, stop=("zzz",))
        assert all(final.startswith(piece) for piece in seen)


def test_stream_equals_generate(root: Path, engine: Engine) -> None:
    for request in mixed(root)[3:6]:
        [whole] = engine.generate([request])
        pieces, stream = [], engine.stream(request)
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                assert end.value == whole
                break
        assert "".join(pieces) == whole.text and all(pieces)
    with pytest.raises(PumiceError, match="does not exist"):
        next(engine.stream(Request((user("what", root / "nowhere.png"),))))


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


# other people's requests


def data_uri(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_chat_messages(root: Path) -> None:
    uri = data_uri(picture(0))
    image = {"type": "image_url", "image_url": {"url": uri}}
    text = {"type": "text", "text": "what?"}
    raw = base64.b64decode(uri.partition(",")[2])
    first = chat_messages([{"role": "user", "content": [image, text]}], images_dir=None)
    last = chat_messages([{"role": "user", "content": [text, image]}], images_dir=None)
    assert first == last == (user("what?", raw),)
    between = chat_messages([{"role": "user", "content": [text, image, text]}], images_dir=None)
    assert [type(p).__name__ for p in between[0].content] == ["TextPart", "ImagePart", "TextPart"]
    file = {"type": "image_url", "image_url": "sub/0.png"}
    named = chat_messages([{"role": "user", "content": [file, text]}], images_dir=root)
    assert named == (user("what?", root / "sub/0.png"),)
    talk = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    assert [m.role for m in chat_messages(talk, images_dir=None)] == ["system", "user", "assistant"]
    assert chat_messages(talk, images_dir=None)[0] == Message("system", (TextPart("x"),))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (5, "content is 5"),
        ([{"type": "audio"}], "type 'audio'; allowed: text, image_url"),
        ([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}], "web address"),
        ([{"type": "image_url", "image_url": {"url": "y.png"}}], "only data URIs"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}], "base64"),
        ([{"type": "text"}], "text is None"),
    ],
)
def test_chat_message_errors(content: Any, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        chat_messages([{"role": "user", "content": content}], images_dir=None, where="row 3")
    assert str(caught.value).startswith("row 3: ")


def test_request_rows(root: Path) -> None:
    row = {"question_id": 12, "image": "0.png", "text": "what?", "max_tokens": 5, "stop": "."}
    request = read_request(row, images_dir=root, sampling=Sampling(temperature=0.5))
    assert request == Request(
        (user("what?", root / "0.png"),),
        Sampling(max_new_tokens=5, temperature=0.5, stop=(".",)),
        id="12",
    )
    chat = {"id": "a", "messages": [{"role": "user", "content": "hi"}]}
    assert read_request(chat, images_dir=None) == Request((user("hi"),), id="a")
    for bad, told in (
        ({}, "the fields none"),
        ({"text": "x", "top_k": 1.5}, "top_k is 1.5; a whole number"),
        ({"text": "x", "image": 3}, "image is 3"),
        ({"messages": "hi"}, "a list of at least one"),
    ):
        with pytest.raises(DataError, match=told):
            read_request(bad, images_dir=root)


# the front door


def test_saved_model_answers_alike(
    root: Path, lmm: LMM, processor: Processor, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "gpt-7b-lora", lmm, processor.save, {})
    model = pumice.load(tmp_path / "gpt-7b-lora", device="cpu")
    ours = Model(lmm, processor)
    image = str(root / "0.png")
    answer = model.ask("what?", images=[image], max_new_tokens=9)
    assert answer == ours.ask("what?", images=[image], max_new_tokens=9)
    assert answer.image_tokens == tiny.NUM_PATCHES and answer.new_tokens == 9
    assert "".join(model.stream("what?", [image], max_new_tokens=9)) == answer.text

    chat = [{"role": "user", "content": "what?"}]
    logits = model.logits(chat, images=[image])
    assert torch.equal(logits, model.logits([user("what?", Path(image))]))
    assert torch.equal(logits, model.logits("what?", images=[picture(0)]))
    assert not torch.equal(logits, model.logits("what?", images=[picture(1)]))


def test_ask_raises_what_cannot_be_answered(lmm: LMM, processor: Processor, root: Path) -> None:
    model = Model(lmm, processor)
    with pytest.raises(PumiceError, match="does not exist"):
        model.ask("what?", images=["nowhere.png"])
    with pytest.raises(PumiceError, match="'temprature' is unknown.*Did you mean 'temperature'"):
        model.ask("what?", temprature=1)
    with pytest.raises(PumiceError, match="a list of images is needed"):
        model.ask("what?", images="0.png")
    with pytest.raises(PumiceError, match="hold images themselves"):
        model.logits([user("what?", root / "0.png")], images=[root / "0.png"])
    with pytest.raises(PumiceError, match="dtype 'float31' is unknown"):
        pumice.load(root, dtype="float31")


def test_import_is_light() -> None:
    code = (
        "import sys, json, pumice; pumice.user('x'); pumice.Sampling();"
        "print(json.dumps([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    assert set(pumice.__all__) <= set(dir(pumice))
    assert callable(pumice.load)
    with pytest.raises(AttributeError):
        pumice.nothing  # noqa: B018
