"""The tables of names: every tensor of the published checkpoints has one in ours, and back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig

from pumice.convert.keymap import (
    HF_FRESH,
    HF_LAYOUTS,
    HF_MEMORY,
    HF_MEMORY_OLD,
    HF_PUBLISHED,
    LLAVA,
    KeyMap,
    find_hf_layout,
    is_computed,
)
from pumice.convert.opened import unused_vision_shapes
from pumice.core.errors import PumiceError
from pumice.models.checkpoint import model_shapes
from pumice.models.config import LMMConfig
from pumice.models.pretrained import config_to_dict
from real_files import CHECKPOINTS, needs

needs_real = needs(CHECKPOINTS, "published index files")
Shapes = dict[str, tuple[int, ...]]


def llava_shapes(vocab: int, **sizes: int) -> tuple[Shapes, Shapes]:
    """LLaVA-1.5-7B's tensors, those it uses and those of the vision blocks behind them."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LMMConfig(
        vision=config_to_dict(vision),
        vision_layer=-2,
        vision_select="patch",
        connector="mlp2x_gelu",
        language=config_to_dict(LlamaConfig(vocab_size=vocab, **sizes)),
    )
    return model_shapes(config), unused_vision_shapes(config)


@pytest.fixture(scope="module")
def shapes() -> tuple[Shapes, Shapes]:
    return llava_shapes(32000)


def index(*names: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(CHECKPOINTS.joinpath(*names).read_text())
    return data


@pytest.mark.parametrize("layout", [*HF_LAYOUTS, LLAVA], ids=lambda layout: layout.layout)
def test_both_ways_with_nothing_left(layout: KeyMap, shapes: tuple[Shapes, Shapes]) -> None:
    names = [*shapes[0], *shapes[1]]
    theirs = [layout.theirs(name) for name in names]
    assert len(set(theirs)) == len(names) == 686
    assert [layout.ours(name) for name in theirs] == names
    assert layout.read(theirs) == dict(zip(names, theirs, strict=True))


def test_sizes_are_those_of_the_published_checkpoints(shapes: tuple[Shapes, Shapes]) -> None:
    used, unused = shapes
    plain = {n: s for n, s in used.items() if not n.startswith("vision.")}
    # Half precision, and 32 rotary tables of 64 numbers in single precision.
    assert 2 * sum(map(math.prod, plain.values())) + 32 * 64 * 4 == 13_518_798_848
    rows = 64 * 4096 * 2  # llava-hf's vocabulary is 64 larger, in both tables
    everything = sum(map(math.prod, [*used.values(), *unused.values()])) + rows
    assert 2 * everything == 14_126_854_144
    assert (len(plain) + 32, len(used) + len(unused)) == (327, 686)


def test_13b_has_the_published_number_of_parameters() -> None:
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    used, _ = llava_shapes(32000, num_attention_heads=40, num_key_value_heads=40, **sizes)
    connector = [s for n, s in used.items() if n.startswith("connector.")]
    assert sum(map(math.prod, connector)) == 31_467_520
    language = [s for n, s in used.items() if n.startswith("language.")]
    assert sum(map(math.prod, language)) == 13_015_864_320  # Vicuna-13B


@needs_real
def test_real_index_of_the_transformers_port(shapes: tuple[Shapes, Shapes]) -> None:
    data = index("llava-1.5-7b-hf", "model.safetensors.index.json")
    names = list(data["weight_map"])
    assert len(names) == 686 and find_hf_layout(names) is HF_PUBLISHED
    ours = HF_PUBLISHED.read(names)
    assert set(ours) == set(shapes[0]) | set(shapes[1])
    assert sorted(HF_PUBLISHED.theirs(name) for name in ours) == sorted(names)
    assert data["metadata"]["total_size"] == 14_126_854_144


@needs_real
def test_real_index_of_the_original(shapes: tuple[Shapes, Shapes]) -> None:
    data = index("llava-v1.5-7b", "pytorch_model.bin.index.json")
    names = list(data["weight_map"])
    assert len(names) == 327 and data["metadata"]["total_size"] == 13_518_798_848
    assert all(LLAVA.theirs(LLAVA.ours(name)) == name for name in names)
    computed = [name for name in names if is_computed(name)]
    assert len(computed) == 32 and all(name.endswith("inv_freq") for name in computed)
    plain = {name for name in shapes[0] if not name.startswith("vision.")}
    assert set(LLAVA.read(names)) == plain


def test_leftovers_are_an_error_that_names_them() -> None:
    with pytest.raises(PumiceError, match=r"does not have: speech_tower\.weight \(1 of 2\)"):
        HF_PUBLISHED.read(["speech_tower.weight", "image_newline"])
    with pytest.raises(PumiceError, match=r"'cross_attention\.marker' has no name"):
        LLAVA.theirs("cross_attention.marker")
    with pytest.raises(PumiceError, match=r"begin with .*transformer\.h"):
        find_hf_layout(["transformer.h.0.weight"])


def test_layouts_are_told_apart() -> None:
    parts = ["vision.model.embeddings.x", "connector.0.bias", "language.model.lm_head.weight"]
    for layout in (HF_PUBLISHED, HF_FRESH, HF_MEMORY, HF_MEMORY_OLD):
        assert find_hf_layout(layout.theirs(name) for name in parts) is layout
    newline = {layout.theirs("row_end") for layout in HF_LAYOUTS}
    assert newline == {"image_newline", "model.image_newline"}


def test_what_follows_from_the_config_is_not_read() -> None:
    names = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
        "model.norm.weight",
    ]
    assert LLAVA.read(names) == {"language.model.model.norm.weight": "model.norm.weight"}
    assert not is_computed("model.layers.0.self_attn.q_proj.weight")
