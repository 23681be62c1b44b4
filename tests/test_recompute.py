"""Activation checkpointing and compilation: the same mathematics, less memory, clear refusals."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from pumice.core.errors import PumiceError
from pumice.core.types import Sample, assistant, user
from pumice.models import compiled
from pumice.models.compiled import compile_blocks
from pumice.models.lmm import LMM
from pumice.models.lora import LoraSpec, add_lora
from pumice.models.packed_attention import Documents, attend_to_documents, document_attention
from pumice.models.recompute import block_lists, checkpoint_blocks
from pumice.processing.collate import Batch, collate, collate_packed
from pumice.processing.encoded import Encoded
from pumice.processing.processor import Processor
from pumice.train.stages import run_stage
from pumice.world.datasets import make_world
from stage_specs import align_spec

MakeBatch = Callable[[list[Encoded], int], Batch]


@pytest.fixture
def talks(processor: Processor) -> list[Encoded]:
    return [
        processor.encode(
            Sample(f"{n}", (user("what is in the cat ?", *images), assistant("a" * n)))
        )
        for n, images in ((1, [tiny.noise(1)]), (9, []), (4, [tiny.noise(2)]))
    ]


def gradients(lmm: LMM, batch: Batch) -> dict[str, torch.Tensor]:
    lmm.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss, count = lmm.loss(batch)
    (loss / count).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in lmm.named_parameters() if p.grad is not None}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(two)
    for name, value in one.items():
        difference = float((value - two[name]).abs().max())
        assert difference <= 1e-6 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("policy", ["blocks", "every_2"])
@pytest.mark.parametrize("make", [collate, collate_packed])
def test_gradients_are_those_without_it(
    policy: str, make: MakeBatch, folders: SimpleNamespace, lmm: LMM, talks: list[Encoded]
) -> None:
    """Also with dropout, of the vision backbone, and while a part is frozen and in eval mode."""
    add_lora(lmm.language, LoraSpec(r=2, alpha=4.0, dropout=0.3))
    lmm.train()
    batch = make(talks, 0)
    if make is collate_packed:
        attend_to_documents(lmm.language)
    plain = gradients(lmm, batch)
    assert any(name.startswith("vision.") for name in plain)
    calls = count_calls(lmm)
    computed = checkpoint_blocks(lmm, policy)
    sizes = [len(blocks) for blocks in block_lists(lmm)]
    assert computed == sum(sizes if policy == "blocks" else [-(-size // 2) for size in sizes])
    assert_equal(plain, gradients(lmm, batch))
    assert sum(calls.values()) == sum(sizes) + computed
    lmm.vision.requires_grad_(False)
    lmm.language.requires_grad_(False).eval()
    assert set(gradients(lmm, batch)) <= {n for n, _ in lmm.named_parameters() if "connector" in n}


def count_calls(lmm: LMM) -> dict[int, int]:
    """How often each block's own forward runs."""
    calls: dict[int, int] = {}

    def counted(own: Any, key: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[key] = calls.get(key, 0) + 1
            return own(*args, **kwargs)

        return forward

    for blocks in block_lists(lmm):
        for block in blocks:
            block.forward = counted(block.forward, id(block))
    return calls


def test_nothing_is_computed_twice_without_gradients(lmm: LMM, talks: list[Encoded]) -> None:
    checkpoint_blocks(lmm, "blocks")
    calls = count_calls(lmm)
    with torch.no_grad():
        lmm.loss(collate(talks, 0))
    assert set(calls.values()) == {1}


def test_an_unknown_policy_is_refused(lmm: LMM) -> None:
    for policy in ("all", "every_0", "every_-1", "every_"):
        with pytest.raises(PumiceError, match="allowed: none, blocks"):
            checkpoint_blocks(lmm, policy)


def test_a_run_with_it_is_the_run_without(folders: SimpleNamespace, tmp_path: Path) -> None:
    """The same weights, and it may be set or not between two halves of a run."""
    make_world(tmp_path / "world", images=8, eval_images=4)
    spec = align_spec(folders.vision, folders.language, tmp_path / "world", steps=2)
    plain = run_stage(spec, tmp_path / "plain")
    spared = run_stage(dataclasses.replace(spec, checkpointing="blocks"), tmp_path / "spared")
    one, two = (r.checkpoint / "model.safetensors" for r in (plain, spared))
    assert one.read_bytes() == two.read_bytes()
    again = run_stage(dataclasses.replace(spec, checkpointing="every_3"), tmp_path / "plain")
    assert again == plain


def test_without_a_compiler_it_is_refused(lmm: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(PumiceError, match=r"C\+\+ compiler .* compile: false"):
        compile_blocks(lmm, "cpu")


def test_compiled_blocks_compute_the_same(lmm: LMM, talks: list[Encoded]) -> None:
    """Traced, with attention outside, and nothing is traced anew for other documents.

    Without the code that a compiler makes of it, which takes minutes.
    """
    attend_to_documents(lmm.language)
    rows = [collate_packed(talks, 0), collate_packed(talks[1:], 0), collate_packed(talks[:1], 0)]
    plain = [gradients(lmm, row) for row in rows]
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    original = torch.compile

    def compile_plainly(function: Any, **options: Any) -> Any:
        return original(function, backend=backend, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_plainly)
        compile_blocks(lmm, "cpu")
    checkpoint_blocks(lmm, "every_2")
    made = []
    for row, wanted in zip(rows, plain, strict=True):
        assert_equal(wanted, gradients(lmm, row))
        made.append(len(graphs))
    assert made[0] >= 2 and made[1] == made[2], made


def test_documents_are_lengths() -> None:
    heads = torch.randn(3, 1, 2, 5, 4)
    module = torch.nn.Identity()
    packed, _ = document_attention(module, *heads, None, documents=Documents((2, 3)))
    first, _ = document_attention(module, *heads[:, :, :, :2], None)
    assert torch.allclose(packed[:, :2], first)
