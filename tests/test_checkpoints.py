"""Checkpoints: saved = loaded, and what does not fit is told in one message."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from pumice.core.errors import PumiceError
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.config import LMMConfig
from pumice.models.lmm import LMM
from tiny import pixels, with_images


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu"])
def test_saved_equals_loaded(tmp_path: Path, tied: bool, connector: str) -> None:
    vision = tiny.vision_folder(tmp_path / "v", "siglip_vision_model")
    language = tiny.language_folder(tmp_path / "l", tied=tied)
    lmm = LMM.from_backbones(vision, language, connector, -1, "patch").eval()
    place = tmp_path / "bert-base-lora-7b-qwen"
    save_checkpoint(place, lmm, lambda d: (d / "extra.txt").write_text("x"), {"steps": 3})  # type: ignore[arg-type,return-value]
    save_checkpoint(place, lmm, None, {"steps": 4})
    assert sorted(p.name for p in place.iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.json",
    ]
    assert len({path.stat().st_mode for path in place.iterdir()}) == 1
    assert json.loads((place / "training.json").read_text()) == {"steps": 4}
    assert sorted(os.listdir(tmp_path)) == ["bert-base-lora-7b-qwen", "l", "v"]
    assert str(tmp_path) not in (place / "config.json").read_text()
    stored = load_file(place / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"vision", "connector", "language"}
    assert any("lm_head" in name for name in stored) != tied

    loaded = load_lmm(place)
    assert not loaded.training and loaded.config == lmm.config
    for (name, a), (other, b) in zip(
        lmm.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    ids = with_images([[1, 270, -1, 290]])
    with torch.no_grad():
        assert torch.equal(lmm(ids, pixel_values=pixels(1)), loaded(ids, pixel_values=pixels(1)))


def test_half_precision_on_disk_and_in_memory(tmp_path: Path, lmm: LMM) -> None:
    save_checkpoint(tmp_path / "m", lmm, None, {}, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert load_lmm(tmp_path / "m").dtype == torch.float32
    half = load_lmm(tmp_path / "m", dtype=torch.bfloat16)
    ids = with_images([[1, 270, -1, 290]])
    with torch.no_grad():
        assert half(ids, pixel_values=pixels(1)).dtype == torch.bfloat16


def test_misfits_are_told_in_one_message(tmp_path: Path, lmm: LMM) -> None:
    save_checkpoint(tmp_path / "m", lmm, None, {})
    path = tmp_path / "m" / "model.safetensors"
    state = load_file(path)
    del state["connector.0.bias"]
    state["language.extra"] = torch.zeros(2)
    state["connector.2.weight"] = torch.zeros(3, 4)
    save_file(state, path)
    with pytest.raises(PumiceError) as caught:
        load_lmm(tmp_path / "m")
    for told in (
        "missing: connector.0.bias",
        "unexpected: language.extra",
        "connector.2.weight is (3, 4), expected (32, 32)",
    ):
        assert told in str(caught.value)


def test_other_directories_are_refused(tmp_path: Path, folders: SimpleNamespace, lmm: LMM) -> None:
    with pytest.raises(PumiceError, match="no such directory"):
        load_lmm(tmp_path / "nowhere")
    with pytest.raises(PumiceError, match="has no config.json"):
        load_lmm(tmp_path)
    with pytest.raises(PumiceError, match="Hugging Face config of model_type 'llama'"):
        load_lmm(folders.language)
    save_checkpoint(tmp_path / "m", lmm, None, {})
    (tmp_path / "m" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(PumiceError, match="cannot be read"):
        load_lmm(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(PumiceError, match="has no model.safetensors"):
        load_lmm(tmp_path / "m")


def test_config_is_strict(lmm: LMM) -> None:
    data = lmm.config.to_dict()
    assert LMMConfig.from_dict(json.loads(json.dumps(data))) == lmm.config
    with pytest.raises(PumiceError, match="unknown field 'conector'.*Did you mean 'connector'"):
        LMMConfig.from_dict({**data, "conector": "linear"})
    with pytest.raises(PumiceError, match="lacks vision_layer"):
        LMMConfig.from_dict({k: v for k, v in data.items() if k != "vision_layer"})
    with pytest.raises(PumiceError, match="vision_layer is 'x'; a int is needed"):
        LMMConfig.from_dict({**data, "vision_layer": "x"})


def test_failed_save_leaves_the_old_checkpoint(tmp_path: Path, lmm: LMM) -> None:
    def fails(folder: Path) -> None:
        raise RuntimeError("disk full")

    save_checkpoint(tmp_path / "m", lmm, None, {"steps": 1})
    with pytest.raises(RuntimeError, match="disk full"):
        save_checkpoint(tmp_path / "m", lmm, fails, {"steps": 2})
    assert json.loads((tmp_path / "m" / "training.json").read_text()) == {"steps": 1}
    assert os.listdir(tmp_path) == ["m"]
