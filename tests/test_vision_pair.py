"""Fused pairs: two backbones see one picture, each as it was trained to, on one grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

import tiny
from pumice.core.errors import PumiceError
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.feature_cache import FeatureCache
from pumice.models.lmm import LMM
from pumice.models.vision import VisionBackbone, read_image_stats
from pumice.models.vision_pair import VisionPair

STATS = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])


def folder(root: Path, name: str, model_type: str, number: int, **preprocessing: object) -> Path:
    path = tiny.vision_folder(root / name, model_type, seed=number)
    stats = {"image_mean": STATS[number][0], "image_std": STATS[number][1], **preprocessing}
    (path / "preprocessor_config.json").write_text(json.dumps(stats))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    # The second is made for pictures of 64 pixels (64 patches), the first has 16 patches.
    return (
        folder(root, "first", "clip_vision_model", 0),
        folder(root, "second", "dinov2_with_registers", 1, crop_size=64),
    )


def pair_of(folders: tuple[Path, ...], layer: int = -2) -> VisionPair:
    pair = VisionBackbone.from_folder(folders, layer, "patch")
    assert isinstance(pair, VisionPair)
    return pair.eval()


def normalised(raw: torch.Tensor, number: int) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATS[number])
    return (raw - mean) / std


def test_each_backbone_sees_the_picture_in_its_own_way(folders: tuple[Path, Path]) -> None:
    pair = pair_of(folders)
    one, other = (
        VisionBackbone.from_folder(path, -2, "patch", image_size=32).eval() for path in folders
    )
    raw = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = pair(normalised(raw, 0))
        wanted = torch.cat([one(normalised(raw, 0)), other(normalised(raw, 1))], dim=-1)
    assert features.shape == (2, 16, 64)
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=0)
    assert (pair.hidden_size, pair.num_tokens, pair.image_size) == (64, 16, 32)
    assert read_image_stats(folders)[1:] == tuple(tuple(values) for values in STATS[0])


def test_the_second_reads_its_own_side_where_the_grids_agree(tmp_path: Path) -> None:
    path = tiny.vision_folder(tmp_path / "second", "dinov2", seed=1)
    config = json.loads((path / "config.json").read_text())
    larger = VisionBackbone(
        AutoConfig.for_model(**config | {"image_size": 48, "patch_size": 12}), -1, "patch"
    )
    larger.model.save_pretrained(path)
    pair = pair_of((tiny.vision_folder(tmp_path / "first"), path), -1)
    assert pair.second.image_size == 48
    raw = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        enlarged = F.interpolate(raw, (48, 48), mode="bilinear", antialias=True)
        torch.testing.assert_close(pair(raw)[..., 32:], pair.second(enlarged), atol=1e-4, rtol=0)


def test_pairs_are_rebuilt_from_their_data(folders: tuple[Path, Path]) -> None:
    pair = pair_of(folders)
    prefixes = {".".join(name.split(".")[:2]) for name in pair.state_dict()}
    assert prefixes == {"first.model", "second.model"}
    data = json.loads(json.dumps(pair.config_data))
    again = VisionBackbone.build(data, -2, "patch", init=False).eval()
    again.load_state_dict(pair.state_dict())
    with torch.no_grad():
        assert torch.equal(again(tiny.pixels(2)), pair(tiny.pixels(2)))
    assert again.config_data == data
    assert str(folders[0].parent) not in json.dumps(data)


def test_one_of_a_pair_may_learn(folders: tuple[Path, Path]) -> None:
    pair = pair_of(folders)
    pair.first.requires_grad_(False)
    pair(tiny.pixels(1)).sum().backward()
    assert all(p.grad is None for p in pair.first.parameters())
    assert any(p.grad is not None for p in pair.second.parameters())


def test_pairs_take_cached_features(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pair = pair_of(folders)
    wanted = pair(tiny.pixels(3)).detach()
    cache = FeatureCache(tmp_path)
    pair.requires_grad_(False).use_cache(cache)
    assert torch.equal(pair(tiny.pixels(3)), wanted) and cache.misses == 6
    assert torch.equal(pair(tiny.pixels(3)), wanted) and cache.hits == 6


def test_pair_errors_name_the_way_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PumiceError, match="3 vision backbones are given"):
        pair_of((*folders, folders[0]))
    with pytest.raises(PumiceError, match="only patch is allowed"):
        VisionBackbone.from_folder(folders, -2, "cls_patch")
    one = VisionBackbone(tiny.vision_config(), -1, "patch")
    other = VisionBackbone(tiny.vision_config(), -1, "patch", image_size=48)
    stats = ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(PumiceError, match="gives 16 and 36 patches"):
        VisionPair(one, other, (stats, stats))
    fixed = tiny.vision_folder(tmp_path, "aimv2_vision_model")
    wide = folder(tmp_path, "wide", "dinov2", 0, crop_size=48)
    with pytest.raises(PumiceError, match=r"\(16 patches\) cannot read pictures of 48 \(36 patch"):
        pair_of((wide, fixed))
    with pytest.raises(PumiceError, match="config of a pair .* cannot be read: .*image_stats"):
        VisionBackbone.build({"pair": [one.config_data, other.config_data]}, -1, "patch")


def test_a_model_with_a_pair_is_saved_and_loaded(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    language = tiny.language_folder(tmp_path / "language")
    lmm = LMM.from_backbones(folders, language, "mlp2x_gelu", -2, "patch").eval()
    save_checkpoint(tmp_path / "model", lmm, None, {})
    again = load_lmm(tmp_path / "model")
    ids = tiny.with_images([[1, -1, 9]])
    with torch.no_grad():
        assert torch.equal(
            again(ids, pixel_values=tiny.pixels(1)), lmm(ids, pixel_values=tiny.pixels(1))
        )
    assert any(name.startswith("vision.second.model.") for name in again.state_dict())
