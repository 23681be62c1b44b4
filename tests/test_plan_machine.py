"""`pumice plan --gpus`: simulated memory is what a step takes, and hours are those of the paper."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from pumice.core.errors import PumiceError
from pumice.core.types import Sample, assistant, user
from pumice.models import published_configs
from pumice.models.costs import Trained
from pumice.models.packed_attention import NAME, attend_to_documents
from pumice.models.recompute import checkpoint_blocks
from pumice.models.simulate import Live, Setting, Work, step_memory
from pumice.processing.collate import collate, collate_packed
from pumice.processing.processor import Processor
from pumice.train.machines import ACCELERATORS, read_machine

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_configs, "hub_configs", lambda name, fetch: None)


def planned(run: Run, *args: object) -> dict[str, Any]:
    code, out, err = run("plan", *args, "--json")
    assert (code, err) == (0, ""), err
    found: dict[str, Any] = json.loads(out)
    return found


def test_what_lives_is_counted() -> None:
    with Live([]) as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        second = first + 1
        assert live.now == live.peak == 8000
        del first
        assert live.now == 8000  # its view is still there
        del view, second
        assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("policy", ["none", "blocks"])
def test_the_simulation_is_the_step(
    packed: bool, policy: str, folders: SimpleNamespace, processor: Processor
) -> None:
    """The same bytes as the loss of real batches of that shape, forward and backward."""
    lmm = tiny.new_lmm(folders.vision, folders.language)
    text = "what is in the cat ? " * 20
    talks = [
        processor.encode(Sample(f"{n}", (user(text, tiny.noise(n)), assistant("a red dog " * 9))))
        for n in range(3)
    ]
    if packed:
        attend_to_documents(lmm.language)
    batch = (collate_packed if packed else collate)(talks, 0)
    lmm.train().vision.requires_grad_(False)
    checkpoint_blocks(lmm, policy)
    inputs = [batch.input_ids, batch.labels, batch.position_ids, batch.pixel_values]
    with Live([*lmm.parameters(), *lmm.buffers(), *inputs]) as live:
        loss, count = lmm.loss(batch)
        activations = live.now
        loss.backward()  # type: ignore[no-untyped-call]
    rows, positions = batch.input_ids.shape
    work = Work(rows, positions, 3, 3 * tiny.NUM_PATCHES, count, batch.documents)
    learns = Trained(vision=False, connector=True, language=True)
    attention = NAME if packed else "eager"
    found = step_memory(lmm.config, work, Setting(learns, False, attention, checkpointing=policy))
    assert found.activations == pytest.approx(activations, rel=0.03)
    assert found.peak == pytest.approx(live.peak, rel=0.03)


def test_more_blocks_are_in_proportion(lmm: Any) -> None:
    from dataclasses import replace

    work = Work(2, 64, 2, 32, 10)
    setting = Setting(Trained(False, True, True), mixed=True)

    def deep(blocks: int) -> Any:
        language = {**lmm.config.language, "num_hidden_layers": blocks}
        return step_memory(replace(lmm.config, language=language), work, setting)

    two, four, seven = deep(2), deep(4), deep(7)
    assert 2 * (seven.peak - four.peak) == pytest.approx(3 * (four.peak - two.peak), rel=0.02)


def test_13b_as_published(run: Run) -> None:
    """About 5.5 h + 20 h on 8 x A100-80G, padded as the reference pads, at half of the peak."""
    found = planned(run, "llava15-13b", "--gpus", "8xA100-80G", "stages.tune.group_by_length=false")
    align, tune = found["stages"]
    assert 5.0 < align["hours"] < 6.5 and 18 < tune["hours"] < 22
    assert (align["steps"], tune["steps"]) == (2181, 5198)
    assert tune["fits"]
    # 13.0e9 float32 weights, gradients and states in eight parts, CLIP whole.
    assert tune["memory"]["optimizer"] == pytest.approx(8 * 13.05e9 / 8, rel=0.01)
    assert tune["memory"]["gradients"] == pytest.approx(4 * 13.05e9 / 8, rel=0.01)
    assert 0.3 < tune["padding"] < 0.4
    # What is needed: 6 FLOPs a weight and position, and attention.
    needed = 6 * 13.0e9 * 128 * tune["positions"]
    assert 1.0 < tune["model_flops"] / needed < 1.1


def test_packing_saves_padding_and_a_small_gpu_is_refused(run: Run) -> None:
    machine = ("--gpus", 1, "--gpu", "rtx4090", "--lengths", "tune=300,250,0.1")
    changes = ("stages.tune.packing={tokens: 2048}", "stages.tune.checkpointing=none")
    code, out, _ = run("plan", "llava15-7b-lora", *machine, *changes, "stages.align=null")
    assert code == 0 and "does not fit; try stages.tune.checkpointing=blocks" in out
    shown = dict(re.split(r"  +", line) for line in out.split("\n\n")[0].splitlines())
    assert shown["padding"] == "0 %" and shown["fits"] == "NO"
    assert shown["the most that fits"] == "-" and shown["at a time on each GPU"] == "2,048 tokens"


def test_own_data_is_measured(run: Run, world: Path) -> None:
    found = planned(run, "pocket", f"data={world}", "world=null", "--gpus", "2xL4")
    align, tune = found["stages"]
    assert align["lengths"]["from"] == tune["lengths"]["from"] == "data"
    assert tune["rows"] == len(json.loads((world / "llava" / "instruct.json").read_text()))
    assert tune["fits"] and tune["steps"] == 860
    assert found["machine"]["title"] == "2 x L4"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpus", "8"), "a number and a name are needed"),
        (("--gpus", "8xA100-80G", "--gpu", "l4"), "a number and a name are needed"),
        (("--gpus", "8xA100-80"), "Did you mean 'a100-80g'"),
        (("--gpus", "3xL4"), "batch_size is 16 for 3 x L4"),
        (("--gpus", "1xL4", "--rows", "tune=many"), "whole number from 1"),
        (("--gpus", "1xL4", "--rows", "ten=5"), "names a stage of the recipe (align, tune)"),
        (("--gpus", "1xL4", "--lengths", "tune=300"), "as in tune=300,250,0.1"),
    ],
)
def test_what_cannot_be_planned(run: Run, options: tuple[str, ...], said: str) -> None:
    code, out, err = run("plan", "pocket", *options)
    assert (code, out) == (2, "") and said in err, err


def test_machines_are_read() -> None:
    assert read_machine("8xA100-80G") == read_machine("8", "a100-80g")
    assert read_machine("4 x H200").title == "4 x H200"
    with pytest.raises(PumiceError, match="unknown"):
        read_machine("1", "abacus")
    # Compute, memory and bandwidth of a newer one of a kind are never below.
    a, h, b = (ACCELERATORS[n] for n in ("a100-80g", "h100-80g", "b200"))
    assert a.flops < h.flops < b.flops and a.bandwidth < h.bandwidth < b.bandwidth
