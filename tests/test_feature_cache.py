"""Image features on disk: the same bits as computed ones, and never those of something else."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tiny
from pumice.core.errors import PumiceError
from pumice.models.feature_cache import (
    FeatureCache,
    encode_cached,
    in_equal_batches,
    pixel_digest,
)
from pumice.models.lmm import LMM
from pumice.models.vision import VisionBackbone
from pumice.train.stages import StageSpec, run_stage
from pumice.world.datasets import make_world
from stage_specs import align_spec
from tiny import pixels


def backbone(seed: int = 0, layer: int = -2, **options: bool) -> VisionBackbone:
    torch.manual_seed(seed)
    new = VisionBackbone(tiny.vision_config(), layer, "patch", **options)
    return new.requires_grad_(False).eval()


def counted(vision: VisionBackbone) -> list[int]:
    """The batch sizes the model itself sees from now on."""
    sizes: list[int] = []
    vision.model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    return sizes


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*/*.safetensors"))


def test_cached_features_have_the_same_bits(tmp_path: Path) -> None:
    vision = backbone()
    wanted = vision(pixels(5))
    vision.use_cache(FeatureCache(tmp_path))
    sizes = counted(vision)
    assert torch.equal(vision(pixels(5)[:2]), wanted[:2])
    # Three pictures are new, two known, and one comes twice.
    order = [4, 0, 2, 2, 1, 3]
    assert torch.equal(vision(pixels(5)[order]), wanted[order])
    assert torch.equal(vision(pixels(5)), wanted)
    assert sizes == [2, 3]
    again = backbone()
    again.use_cache(FeatureCache(tmp_path))
    assert torch.equal(again(pixels(5)), wanted) and counted(again) == []
    assert len(entries(tmp_path)) == 5
    assert {path.name for path in tmp_path.rglob("*.part")} == set()
    vision.use_cache(None)
    vision(pixels(5))
    assert sizes == [2, 3, 5]


@pytest.mark.parametrize(
    "other",
    [
        lambda: backbone(seed=1),
        lambda: backbone(layer=-1),
        lambda: backbone(norm=True),
        lambda: backbone().to(torch.bfloat16),
    ],
)
def test_another_backbone_has_entries_of_its_own(
    tmp_path: Path, other: Callable[[], VisionBackbone]
) -> None:
    cache = FeatureCache(tmp_path)
    for vision in (backbone(), other()):
        dtype = next(vision.parameters()).dtype
        wanted = vision(pixels(2).to(dtype))
        vision.use_cache(cache)
        for _ in range(2):
            assert torch.equal(vision(pixels(2).to(dtype)), wanted)
    assert (cache.misses, cache.hits) == (4, 4)


def test_mixed_precision_has_entries_of_its_own(tmp_path: Path) -> None:
    vision = backbone()
    plain = vision(pixels(2))
    vision.use_cache(FeatureCache(tmp_path))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(vision(pixels(2)), plain)
    assert torch.equal(vision(pixels(2)), plain)


def test_every_pixel_counts() -> None:
    picture = pixels(1)[0]
    changed = picture.clone()
    changed[2, -1, -1] += 1e-6
    assert pixel_digest(picture) == pixel_digest(picture.clone()) != pixel_digest(changed)


def test_a_damaged_entry_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vision = backbone()
    wanted = vision(pixels(1))
    vision.use_cache(FeatureCache(tmp_path))
    vision(pixels(1))
    [path] = entries(tmp_path)
    sound = path.read_bytes()
    flipped = sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:]
    zeros = sound[:-200] + bytes(200)
    for broken in (sound[: len(sound) // 2], b"", flipped, zeros):
        path.write_bytes(broken)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert torch.equal(vision(pixels(1)), wanted)
        assert "made again" in caplog.text
        assert path.read_bytes() == sound


def test_the_limit_stops_the_writing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vision = backbone()
    wanted = vision(pixels(6))
    probe = FeatureCache(tmp_path / "probe")
    vision.use_cache(probe)
    vision(pixels(1))
    size = entries(tmp_path / "probe")[0].stat().st_size
    limit = 2 * size + size // 2
    for _ in range(2):  # a new process counts what is there
        vision.use_cache(FeatureCache(tmp_path / "small", max_bytes=limit))
        for start in range(0, 6, 2):
            assert torch.equal(vision(pixels(6)[start : start + 2]), wanted[start : start + 2])
        assert len(entries(tmp_path / "small")) == 2
    assert caplog.text.count("not written to any more") == 2


def test_only_fixed_weights_are_cached(tmp_path: Path) -> None:
    vision = backbone()
    vision.use_cache(FeatureCache(tmp_path))
    with pytest.raises(PumiceError, match="being trained or is in training mode"):
        vision.train()(pixels(1))
    with pytest.raises(PumiceError, match="being trained or is in training mode"):
        vision.eval().requires_grad_(True)(pixels(1))
    assert entries(tmp_path) == []


def test_cache_errors_name_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PumiceError, match="cannot be made"):
        FeatureCache(tmp_path / "file" / "cache")
    with pytest.raises(PumiceError, match="can hold nothing"):
        FeatureCache(tmp_path, max_bytes=0)


def test_the_group_says_what_made_it(tmp_path: Path) -> None:
    vision = backbone(norm=True)
    vision.use_cache(FeatureCache(tmp_path))
    vision(pixels(1))
    [about] = tmp_path.glob("*/about.json")
    told = json.loads(about.read_text())
    assert told["norm"] is True and told["layer"] == 3 and told["device"] == "cpu"
    assert told["config"]["model_type"] == "clip_vision_model"
    assert str(tmp_path) not in about.read_text()


@pytest.mark.parametrize("count", [1, 4, 6])
def test_equal_batches_give_the_same_features(count: int) -> None:
    vision = backbone()
    wanted = vision(pixels(count))
    sizes = counted(vision)
    assert torch.equal(in_equal_batches(vision, pixels(count), 4), wanted)
    assert set(sizes) == {4}


def test_no_pictures_are_no_entries(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    assert encode_cached(lambda views: views[:, 0], pixels(0), cache, {}).shape == (0, 32, 32)
    assert list(tmp_path.iterdir()) == []


def train(lmm: LMM, seed: int) -> list[torch.Tensor]:
    """Two epochs whose batches mix the pictures differently; gives the losses."""
    lmm.vision.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in lmm.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for epoch in range(2):
        order = list(range(12))
        random.Random(seed + epoch).shuffle(order)
        for start in range(0, 12, 4):
            chosen = order[start : start + 4]
            ids = tiny.with_images([[1, -1, 5 + n, 9, 7] for n in chosen])
            labels = ids.masked_fill(ids < 5, -100)
            places = torch.arange(ids.shape[1]).expand_as(ids)
            logits = lmm(ids, position_ids=places, pixel_values=pixels(12)[chosen])
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return losses


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Without a cache, filling one, and with a filled one."""
    vision = tiny.vision_folder(tmp_path / "vision")
    language = tiny.language_folder(tmp_path / "language")
    start = tiny.new_lmm(vision, language).train()
    results = []
    for directory in (None, tmp_path / "cache", tmp_path / "cache"):
        lmm = copy.deepcopy(start)
        sizes = counted(lmm.vision)
        lmm.vision.use_cache(FeatureCache(directory) if directory else None)
        results.append((train(lmm, seed=3), lmm.state_dict(), sum(sizes)))
    (losses, weights, encoded), *others = results
    assert encoded == 24 and [result[2] for result in others] == [12, 0]
    assert losses[0] != losses[-1]
    for other_losses, other_weights, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(losses, other_losses, strict=True))
        assert all(torch.equal(tensor, other_weights[n]) for n, tensor in weights.items())


@pytest.fixture
def spec(tmp_path: Path) -> StageSpec:
    make_world(tmp_path / "world", images=8, eval_images=2)
    vision, language = tmp_path / "vision", tmp_path / "language"
    backbones = tiny.vision_folder(vision), tiny.language_folder(language)
    return align_spec(*backbones, tmp_path / "world", batch_size=3)


def test_a_stage_is_the_same_to_the_bit(tmp_path: Path, spec: StageSpec) -> None:
    results = []
    for name in ("none", "cold", "warm"):
        features = None if name == "none" else FeatureCache(tmp_path / "cache")
        checkpoint = run_stage(spec, tmp_path / name, features=features).checkpoint
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(row)["loss"] for row in rows]
        fingerprint = json.loads((checkpoint / "training.json").read_text())["fingerprint"]
        weights = (checkpoint / "model.safetensors").read_bytes()
        results.append((losses, fingerprint, weights))
        used = (features.misses > 0, features.hits > 0) if features else None
        assert used == {"none": None, "cold": (True, True), "warm": (False, True)}[name]
    assert results[0] == results[1] == results[2]


def test_a_trained_vision_backbone_is_not_cached(tmp_path: Path, spec: StageSpec) -> None:
    features = FeatureCache(tmp_path / "cache")
    trained = dataclasses.replace(spec, train={"connector": 1e-2, "vision": 1e-3}, steps=2)
    run_stage(trained, tmp_path / "out", features=features)
    assert features.misses == 0 and entries(tmp_path / "cache") == []


def test_a_limit_without_a_cache_is_an_error(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run("run", "pocket", "--out", "nowhere", "--feature-cache-gb", 3)
    assert code == 2 and "Add --feature-cache DIR" in error
