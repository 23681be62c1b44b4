"""Answers out of a list: always one of it, the likeliest token by token, whatever else runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from conftest import Run
from pumice.core.errors import DataError
from pumice.core.types import Message, Request, Sample, Sampling, assistant, user
from pumice.infer.choices import Guide
from pumice.infer.engine import Engine
from pumice.infer.online import Online
from pumice.infer.requests import read_request
from pumice.models.constants import IGNORE
from pumice.processing.processor import Processor
from pumice.processing.templates import TEMPLATES
from small_requests import mixed

LISTS = (
    ("red", "blue"),
    ("A", "B", "C", "D"),
    ("cat", "cat in a circle", "catdog", "a dog", "Grün", "猫"),
    ("the red square", "the red circle", "the blue circle", "###"),
)


def asked(pictures: Path, **settings: float) -> list[Request]:
    """Every list of choices about no image and two images."""
    return [
        Request((user("what is", *images),), Sampling(choices=choices, seed=place, **settings))  # type: ignore[arg-type]
        for place, choices in enumerate(LISTS)
        for images in ((), (pictures / "0.png", pictures / "1.png"))
    ]


def best(engine: Engine, request: Request) -> str:
    """The walk by the whole forward pass at every token, and by lists instead of a tree."""
    processor = engine.processor
    prompt = processor.encode_prompt(request.messages)
    ends = processor.end_token_ids
    sequences = {
        tuple(_learnt(processor, request.messages, choice))[:-1]: choice
        for choice in request.sampling.choices
    }
    said: tuple[int, ...] = ()
    while True:
        left = [ids for ids in sequences if ids[: len(said)] == said]
        if left == [said]:
            return sequences[said]
        allowed = [ids[len(said)] for ids in left if len(ids) > len(said)]
        allowed += ends if said in left else ()
        with torch.no_grad():
            whole = engine.lmm(
                torch.tensor([prompt.input_ids + list(said)]), pixel_values=prompt.pixel_values
            )[0, -1]
        token = max(allowed, key=lambda token: float(whole[token]))
        if token in ends:
            return sequences[said]
        said = (*said, token)


def _learnt(processor: Processor, messages: Sequence[Message], answer: str) -> list[int]:
    """The ids of an answer as training has them, the end token last."""
    encoded = processor.encode(Sample("", (*messages, assistant(answer))))
    return [label for label in encoded.labels if label != IGNORE]


def test_the_answer_is_the_likeliest_walk_alone_and_in_a_batch(
    engine: Engine, pictures: Path
) -> None:
    requests = asked(pictures)
    expected = [best(engine, request) for request in requests]
    assert len(set(expected)) > 4
    alone = [Engine(engine.lmm, engine.processor, 1).generate([one])[0] for one in requests]
    assert [result.text for result in alone] == expected
    assert all(result.finish_reason == "stop" for result in alone)
    free = mixed(pictures)
    undisturbed = engine.generate(free)
    together = engine.generate([*free, *requests])
    assert together[: len(free)] == undisturbed and together[len(free) :] == alone


def test_drawn_answers_are_of_the_list_too(engine: Engine, pictures: Path) -> None:
    requests = asked(pictures, temperature=2.0, top_p=0.95)
    for result, request in zip(engine.generate(requests), requests, strict=True):
        assert result.text in request.sampling.choices
    settings = [
        Sampling(choices=("cat", "dog"), temperature=5.0, seed=seed, top_logprobs=1)
        for seed in range(12)
    ]
    results = engine.generate([Request((user("what"),), one) for one in settings])
    assert {result.text for result in results} == {"cat", "dog"}
    # Log probabilities stay those of the model, which never heard of the list.
    for result in results:
        [first, *_] = result.logprobs or ()
        assert first.logprob < first.top[0][2] + 1e-9


def test_where_one_choice_begins_another_the_end_is_chosen_among() -> None:
    guide = Guide([[5], [5, 6, 7], [5, 8], [9]], ends=(2, 3))
    assert sorted(guide.allowed) == [5, 9]
    assert not guide.take(5)
    assert sorted(guide.allowed) == [2, 3, 6, 8]
    assert not guide.take(6)
    assert guide.allowed == [7] and guide.take(7)
    assert Guide([[5], [9]], ends=(2,)).take(9)


@pytest.mark.parametrize("template", TEMPLATES.names())
def test_choices_are_read_as_answers_are_learnt(processor: Processor, template: str) -> None:
    for token in TEMPLATES[template].tokens():
        if token.name not in ("bos", "eos"):
            processor.tokenizer.add_special_tokens({"additional_special_tokens": [token.name]})
    other = Processor(
        processor.tokenizer, processor.image_spec, template, None, processor.image_tokens
    )
    picture = b"never opened"
    messages = (user("what is", picture),)
    closing = other.closing_token_ids
    for text in ("a red circle", "B", "Grün 3.5"):
        learnt = other.encode(Sample("", (*messages, assistant(text))), pixels=False).labels
        ids = [label for label in learnt if label != IGNORE]
        [mine] = other.answer_ids(messages, [text])
        assert ids[: len(mine)] == mine and ids[len(mine)] in closing


def test_what_cannot_be_chosen_is_said(engine: Engine) -> None:
    def error(**settings: object) -> str:
        [result] = engine.generate([Request((user("what"),), Sampling(**settings))])  # type: ignore[arg-type]
        assert result.error is not None
        return result.error

    assert "the choice ' red' is empty or has blanks" in error(choices=(" red", "blue"))
    assert "the choice ''" in error(choices=("",))
    assert "none beside choices" in error(choices=("red",), stop=("e",))
    assert "may have at most 1" in error(choices=("the red square",), max_new_tokens=1)
    # As many tokens as there are letters: no room for an end is asked for.
    [letter] = engine.generate(
        [Request((user("what"),), Sampling(choices=("a", "the"), max_new_tokens=1))]
    )
    assert letter.text in ("a", "the") and letter.new_tokens == 1


def test_the_answers_of_one_request_share_what_their_choices_are_read_as(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_for(("cat", "cat in a circle", "a dog"))
    expected = engine.generate(asked)
    read, seen = Processor.answer_ids, []

    def counted(self: Processor, *args: object) -> list[list[int]]:
        seen.append(args)
        return read(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Processor, "answer_ids", counted)
    with Online(engine) as online:
        handles = online.submit_together(asked)
        assert [handle.result() for handle in handles] == expected and len(seen) == 1
        assert len({result.text for result in expected}) > 1
        # Another list is another request's.
        other = [*asked_for(("red", "blue"))[:1], *asked[:1]]
        for handle, one in zip(online.submit_together(other), other, strict=True):
            assert handle.result().text in one.sampling.choices
    assert len(seen) == 3


def asked_for(choices: tuple[str, ...]) -> list[Request]:
    """The same question with eight seeds."""
    settings = [Sampling(choices=choices, temperature=5.0, seed=seed) for seed in range(8)]
    return [Request((user("what"),), one) for one in settings]


def test_requests_in_files_and_on_the_command_line(root: Path, run: Run) -> None:
    row = {"text": "what?", "guided_choice": ["red", "blue"]}
    assert read_request(row, images_dir=None).sampling.choices == ("red", "blue")
    with pytest.raises(DataError, match="choices is 5; a string or a list"):
        read_request({"text": "what?", "choices": 5}, images_dir=None)
    args = ("ask", root / "model", "What is this?", "--image", root / "0.png", "--json")
    code, out, _ = run(*args, "--choice", "a cat", "--choice", "a dog")
    assert code == 0 and json.loads(out)["text"] in ("a cat", "a dog")
    code, out, err = run(*args, "--choice", "")
    assert (code, out) == (2, "") and "is empty or has blanks" in err


def test_what_stops_free_answers_may_stand_in_a_choice(
    engine: Engine, processor: Processor
) -> None:
    other = processor.with_template("llava_v0", "")
    sampling = Sampling(choices=("a ### b",))
    [result] = Engine(engine.lmm, other).generate([Request((user("what"),), sampling)])
    assert result.text == "a ### b" and result.finish_reason == "stop"
