"""`pumice.load` and `Model`: what a program that imports pumice meets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pumice
import tiny
from pumice.core.errors import PumiceError
from pumice.core.types import user
from pumice.infer.model import Model
from pumice.infer.placement import default_placement, placement
from pumice.models.checkpoint import save_checkpoint
from pumice.models.lmm import LMM
from pumice.processing.processor import Processor


def test_saved_model_answers_alike(
    pictures: Path, lmm: LMM, processor: Processor, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "gpt-7b-lora", lmm, processor.save, {})
    model = pumice.load(tmp_path / "gpt-7b-lora", device="cpu")
    ours = Model(lmm, processor)
    image = str(pictures / "0.png")
    answer = model.ask("what?", images=[image], max_new_tokens=9)
    assert answer == ours.ask("what?", images=[image], max_new_tokens=9)
    assert answer.image_tokens == tiny.NUM_PATCHES and answer.new_tokens == 9
    assert "".join(model.stream("what?", [image], max_new_tokens=9)) == answer.text

    chat = [{"role": "user", "content": "what?"}]
    logits = model.logits(chat, images=[image])
    assert torch.equal(logits, model.logits([user("what?", Path(image))]))
    assert torch.equal(logits, model.logits("what?", images=[tiny.noise(0)]))
    assert not torch.equal(logits, model.logits("what?", images=[tiny.noise(1)]))


def test_ask_raises_what_cannot_be_answered(lmm: LMM, processor: Processor, pictures: Path) -> None:
    model = Model(lmm, processor)
    with pytest.raises(PumiceError, match="does not exist"):
        model.ask("what?", images=["nowhere.png"])
    with pytest.raises(PumiceError, match="'temprature' is unknown.*Did you mean 'temperature'"):
        model.ask("what?", temprature=1)
    with pytest.raises(PumiceError, match="a list of images is needed"):
        model.ask("what?", images="0.png")
    with pytest.raises(PumiceError, match="hold images themselves"):
        model.logits([user("what?", pictures / "0.png")], images=[pictures / "0.png"])
    with pytest.raises(PumiceError, match="dtype 'float31' is unknown"):
        pumice.load(pictures, dtype="float31")


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("foo", "device 'foo' is unknown; allowed: cpu, cuda, cuda:N"),
        ("cuad", "Did you mean 'cuda'"),
        ("cuda:x", "device 'cuda:x' is unknown"),
        ("", "device '' is unknown"),
        ("meta", "device 'meta' is unknown"),
        ("cuda", "finds no GPU; allowed on this machine: cpu"),
        ("cuda:3", "device 'cuda:3' is not here"),
        (torch.device("cuda:0"), "device 'cuda:0' is not here"),
    ],
)
def test_a_device_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, pictures: Path, device: str | torch.device, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PumiceError, match=told) as caught:
        pumice.load(pictures, device=device)
    assert "Leave the device out" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float31", "bf16", torch.int8, 16])
def test_a_dtype_that_is_not_known(pictures: Path, dtype: Any) -> None:
    with pytest.raises(PumiceError, match=r"is unknown; known: float32, bfloat16, float16\..*out"):
        pumice.load(pictures, dtype=dtype)


def test_the_defaults_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_placement() == placement() == (torch.device("cpu"), torch.float32)
    assert placement("cpu", "bfloat16")[1] == placement(dtype=torch.bfloat16)[1] == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_placement() == placement() == (torch.device("cuda"), torch.bfloat16)
    assert placement("cuda:1") == (torch.device("cuda:1"), torch.bfloat16)
    assert placement("cpu") == (torch.device("cpu"), torch.float32)
    with pytest.raises(PumiceError, match="finds 2 GPUs; .*: cpu, cuda:0, cuda:1"):
        placement("cuda:2")


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
