"""Every vision backbone with every connector, language model and way to show a picture.

Each combination learns, is saved and opened again, and answers in a batch as alone, with its cache
as without. The language models of a pairing share the vision backbones, so that a family's habits
(own norms, scaled embeddings, sliding windows) meet every connector.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerFast

import tiny
from pumice.core.errors import PumiceError
from pumice.core.types import ImagePart, Message, Request, Sample, Sampling, TextPart
from pumice.infer.answer import Answer
from pumice.infer.engine import Engine
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.config import LMMConfig
from pumice.models.lmm import LMM
from pumice.models.pretrained import config_to_dict
from pumice.models.tiling import TilingSpec
from pumice.processing.collate import collate
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor

VISION = ("clip_vision_model", "siglip_vision_model", "dinov2")
CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp2x_gelu": {},
    "resampler": {"queries": 3, "heads": 2},
    "qformer": {"queries": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0},
    "shuffle2x2+mlp2x_gelu": {},
    "average2x2+linear": {},
    "gated_cross_attention": {
        "queries": 3,
        "depth": 1,
        "heads": 2,
        "head_width": 8,
        "every": 1,
        "cross_heads": 2,
    },  # fmt: skip
}
LANGUAGE = ("llama", "qwen2", "mistral", "phi3", "gemma")
VIEWS = ("pad", "hd")
PICTURES = [Image.effect_noise(size, 90).convert("RGB") for size in ((90, 40), (33, 32), (20, 61))]
QUESTION, ANSWER = "What is in the red circle?", "a dog"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def language_config(family: str, vocab_size: int) -> dict[str, Any]:
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return config_to_dict(config)


def build(
    vision: str, connector: str, family: str, view: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[LMM, Processor]:
    tiling = TilingSpec("hd", tiny.IMAGE_SIZE, max_tiles=4) if view == "hd" else None
    torch.manual_seed(0)
    config = LMMConfig(
        vision=config_to_dict(tiny.vision_config(vision)),
        vision_layer=-2,
        vision_select="patch",
        connector=connector,
        connector_options=CONNECTORS[connector],
        tiling=tiling.to_dict() if tiling else None,
        language=language_config(family, len(tokenizer)),
    )
    lmm = LMM.from_config(config)
    tiny.spread(lmm)
    for name, parameter in lmm.named_parameters():
        if name.endswith("_gate"):  # open enough for pictures to come in
            torch.nn.init.constant_(parameter, 0.7)
    processor = Processor(
        tokenizer,
        ImageSpec("pad", tiny.IMAGE_SIZE, tiling=tiling),
        "vicuna_v1",
        "",
        lmm.image_tokens,
        view_side=lmm.view_side,
        image_mark=lmm.cross_attention is not None,
        instruction="language" if lmm.connector.wants_instruction else None,
    )
    return lmm.eval(), processor


def asked(*pictures: Image.Image, text: str = QUESTION) -> Message:
    return Message("user", (*map(ImagePart, pictures), TextPart(text)))


def samples() -> list[Sample]:
    """One picture, two pictures, none."""
    answer = Message("assistant", (TextPart(ANSWER),))
    first, second, third = PICTURES
    rows = ((first,), (second, third), ())
    return [Sample(str(i), (asked(*row), answer), "") for i, row in enumerate(rows)]


def learn_one_step(lmm: LMM, processor: Processor) -> None:
    """Forward, backward and a step: what is trained gets a gradient and moves, nothing else."""
    lmm.vision.requires_grad_(False)
    for part in ("connector", "language"):
        lmm.part(part).requires_grad_(True)
    batch = collate([processor.encode(sample) for sample in samples()], processor.pad_id)
    trained = {name: p for name, p in lmm.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in lmm.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    loss, supervised = lmm.loss(batch)
    assert supervised == batch.num_supervised > 0
    (loss / supervised).backward()
    dead = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not [name for name in dead if not _may_rest(name)], dead
    assert all(p.grad is None for p in lmm.vision.parameters())
    optimizer.step()
    moved = {name for name, p in lmm.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained.keys()
    assert all(_may_rest(name) for name in trained.keys() - moved)
    again, _ = lmm.loss(batch)
    assert torch.isfinite(again) and not torch.equal(again, loss)


def _may_rest(name: str) -> bool:
    # A key's bias adds the same to every score of a row, which softmax takes away.
    return name.endswith(("k_proj.bias", "key.bias", "in_proj_bias"))


def test_every_pairing_learns_is_saved_and_answers(
    tokenizer: PreTrainedTokenizerFast, pairing: tuple[str, str, str, str], tmp_path: Path
) -> None:
    lmm, processor = build(*pairing, tokenizer)
    learn_one_step(lmm, processor)
    save_checkpoint(tmp_path / "saved", lmm, processor.save, {})
    opened, read = load_lmm(tmp_path / "saved"), Processor.load(tmp_path / "saved")
    assert opened.config == lmm.config
    first, second, third = PICTURES
    short = Sampling(max_new_tokens=5)
    requests = [
        Request((asked(first),), short),
        Request((asked(second, third, text="red or blue?"),), short),
        Request((asked(),), short),
        Request((asked(third, text="a cat?"),), short),
    ]
    batched = Engine(lmm, processor, max_batch=4).generate(requests)
    alone = [Engine(opened, read, max_batch=1).generate([one])[0] for one in requests]
    assert [one.error for one in batched] == [None] * 4
    assert [one.text for one in batched] == [one.text for one in alone]
    assert [one.image_tokens for one in batched] == [one.image_tokens for one in alone]
    assert batched[0].text == uncached(lmm, processor, requests[0])


@torch.inference_mode()
def uncached(lmm: LMM, processor: Processor, request: Request) -> str:
    """The same answer, each token from the whole text again."""
    encoded = processor.encode_prompt(request.messages)
    batch = collate([encoded], processor.pad_id)
    features = lmm.encode_images(batch.pixel_values, batch.image_sizes, batch.instruction)
    answer = Answer(
        processor.decode, end_tokens=processor.end_token_ids, stop=processor.stop_strings,
        max_tokens=request.sampling.max_new_tokens,
    )  # fmt: skip
    ids, over = list(encoded.input_ids), False
    while not over:
        ids.append(int(lmm(torch.tensor([ids]), features=features)[0, -1].argmax()))
        over = answer.push(ids[-1])
    return answer.text


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pairing" in metafunc.fixturenames:
        pairings = list(itertools.product(VISION, CONNECTORS, LANGUAGE, VIEWS))
        metafunc.parametrize("pairing", pairings, ids=["-".join(pairing) for pairing in pairings])


def test_a_class_token_cannot_be_merged(tokenizer: PreTrainedTokenizerFast) -> None:
    lmm, _ = build("clip_vision_model", "linear", "llama", "pad", tokenizer)
    data = lmm.config.to_dict() | {
        "vision_select": "cls_patch", "connector": "shuffle2x2+linear", "connector_options": {},
    }  # fmt: skip
    with pytest.raises(PumiceError, match="class token"):
        LMM.from_config(LMMConfig.from_dict(data))
