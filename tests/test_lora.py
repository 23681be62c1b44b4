"""Adapters: what learns, exact resume, merging, peft's files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from pumice.convert.adapter import checkpoint_tensors, language_tensors
from pumice.core.errors import PumiceError
from pumice.infer.model import load
from pumice.models import lora
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.language import LanguageModel
from pumice.models.live_adapter import keep_adapter
from pumice.models.lora import (
    Adapter,
    LoraSpec,
    add_lora,
    merge_lora,
    read_adapter,
    save_adapter,
)
from pumice.models.quantize import Method, quantize_language
from pumice.recipe.load import load_recipe
from pumice.train import trainer
from pumice.train.adapters import LoraTraining
from pumice.train.metrics import part_hash, tensors_hash
from pumice.train.stages import StageSpec, run_stage
from pumice.world.datasets import make_world
from stage_specs import align_spec, tune_spec

SPEC = LoraSpec(r=4, alpha=8.0)
TRAINING = LoraTraining(r=4, alpha=8.0, dropout=0.05)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones, a world and an aligned model, `runs/align`."""
    root = tmp_path_factory.mktemp("lora")
    make_world(root / "world", images=24, eval_images=4)
    tiny.vision_folder(root / "vision")
    tiny.language_folder(root / "language")
    run_stage(lora_align(root), root / "runs")
    return root


def lora_align(root: Path) -> StageSpec:
    return align_spec(root / "vision", root / "language", root / "world", steps=2)


def lora_tune(root: Path, training: LoraTraining = TRAINING) -> StageSpec:
    rates = {"connector": 1e-3, "language": 1e-2}
    return tune_spec(
        lora_align(root),
        root / "world",
        root / "runs" / "align",
        lora=training,
        train=rates,
        steps=6,
    )


@pytest.fixture
def language(root: Path) -> LanguageModel:
    return LanguageModel.from_folder(root / "language").eval()


def learnt(language: LanguageModel, spec: LoraSpec = SPEC) -> LanguageModel:
    """Adapters that change something, as after training."""
    torch.manual_seed(0)
    add_lora(language, spec)
    for _, parameter in lora.adapter_parameters(language):
        torch.nn.init.normal_(parameter, std=0.1)
    return language.eval()


def embeds() -> torch.Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))


def test_new_adapters_change_nothing_and_merged_ones_give_the_same_answers(
    language: LanguageModel,
) -> None:
    names = [name for name, _ in language.named_parameters()]
    plain, base = language(embeds()), part_hash(language)
    add_lora(language, SPEC)
    assert torch.equal(language(embeds()), plain)
    assert tensors_hash(lora.base_parameters(language)) == base
    merge_lora(language)
    assert part_hash(language) == base

    learnt(language)
    adapted = language(embeds())
    assert (adapted - plain).abs().max() > 0.1
    merge_lora(language)
    assert not lora.has_lora(language)
    assert [name for name, _ in language.named_parameters()] == names
    assert (language(embeds()) - adapted).abs().max() < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_written_adapters_are_peft_s_and_are_read_back(
    root: Path, tmp_path: Path, language: LanguageModel, rslora: bool
) -> None:
    spec = LoraSpec(r=4, alpha=8.0, rslora=rslora, targets=("q_proj", "down_proj"))
    adapted = learnt(language, spec)(embeds())
    save_adapter(tmp_path, language, spec, base="somewhere/base", base_sample="x")
    adapter = read_adapter(tmp_path)
    assert adapter.base == "somewhere/base" and adapter.scaling == (4.0 if rslora else 2.0)
    assert {name.split(".")[-2] for name in adapter.pairs} == {"q_proj", "down_proj"}
    assert sorted(adapter.pairs) == sorted(lora.adapter_weight_names(language))

    theirs = AutoModelForCausalLM.from_pretrained(
        root / "language", dtype=torch.float32, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    logits = theirs(inputs_embeds=embeds(), use_cache=False).logits
    assert (logits - adapted).abs().max() < 1e-5

    merge_lora(language)
    tensors = lora.MergedTensors(language_tensors(root / "language"), adapter)
    own = dict(language.model.named_parameters())
    assert all(torch.equal(tensors[name], own[name]) for name in own)


@torch.inference_mode()
@pytest.mark.parametrize("method", [None, "int8", "int4"])
def test_a_kept_adapter_is_peft_s_own_forward(
    root: Path, tmp_path: Path, language: LanguageModel, method: Method | None
) -> None:
    if method is not None:
        quantize_language(language, method)
    adapted = learnt(language)(embeds())
    save_adapter(tmp_path, language, SPEC, base="base", base_sample="x")
    other = LanguageModel.from_folder(root / "language").eval()
    if method is not None:
        quantize_language(other, method)
    plain = other(embeds())
    keep_adapter(other, read_adapter(tmp_path), torch.float32)
    assert (adapted - plain).abs().max() > 0.1
    assert (other(embeds()) - adapted).abs().max() < 1e-5
    assert lora.has_lora(other)


def test_an_adapter_that_does_not_fit_is_not_kept(language: LanguageModel) -> None:
    table = Adapter(1.0, {"model.embed_tokens.weight": (torch.ones(4, 32), torch.ones(99, 4))})
    with pytest.raises(PumiceError, match="embed_tokens.weight, which is no linear layer"):
        keep_adapter(language, table, torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(PumiceError, match=r"as a \(7, 32\) weight"):
        keep_adapter(language, Adapter(1.0, {name: (torch.ones(4, 32), torch.ones(7, 4))}),
                     torch.float32)  # fmt: skip
    assert not lora.has_lora(language)


def test_merging_is_summed_in_float32_and_rounded_once() -> None:
    weight = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    a = torch.tensor([[1.0], [2.0**-9]], dtype=torch.bfloat16)
    ones = torch.ones(1, 2, dtype=torch.bfloat16)
    # bfloat16 has steps of 2 here: 257.002 becomes 258, and with the change rounded to 1 first 256.
    merged = lora.merged_weight(weight, a, ones, 1.0)
    assert merged.dtype == torch.bfloat16 and merged.item() == 258
    with pytest.raises(PumiceError, match="full precision only, and the base model is int8"):
        lora.merged_weight(weight.to(torch.int8), a, ones, 1.0)


def test_the_base_stays_and_adapters_and_connector_move(root: Path, tmp_path: Path) -> None:
    result = run_stage(lora_tune(root), tmp_path)
    record = json.loads((result.checkpoint / "training.json").read_text())
    parts = record["parts"]
    assert {name: part["moved"] for name, part in parts.items()} == {
        "vision": False, "connector": True, "language": False, "adapters": True,
    }  # fmt: skip
    aligned = load_lmm(root / "runs" / "align")
    assert parts["language"]["before"] == part_hash(aligned.language)
    assert record["lora"]["merged"] and record["lora"]["positions"] > 0
    assert record["lora"]["max_logit_difference"] < 1e-4
    assert record["lora"]["greedy_agreement"] == 1.0

    tuned = load_lmm(result.checkpoint).language.model.state_dict()
    before = aligned.language.model.state_dict()
    assert tuned.keys() == before.keys()
    changed = {name.split(".")[-2] for name in tuned if not torch.equal(tuned[name], before[name])}
    assert changed == set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())


def test_each_group_learns_at_its_own_rate(root: Path, tmp_path: Path) -> None:
    run_stage(lora_tune(root), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["lr"]["language"] == pytest.approx(10 * rows[1]["lr"]["connector"])


@pytest.mark.parametrize(
    "training", [TRAINING, dataclasses.replace(TRAINING, quantize="int8", save="adapter")]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: LoraTraining
) -> None:
    spec = lora_tune(root, training)
    whole = run_stage(spec, tmp_path / "whole").checkpoint
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit, match="stopped after step 3"):
            run_stage(spec, tmp_path / "stopped")
    resumed = run_stage(spec, tmp_path / "stopped")
    assert resumed.resumed_from == 3
    one, two = checkpoint_tensors(whole), checkpoint_tensors(resumed.checkpoint)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    wanted = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(a)["loss"] for a in losses] == [json.loads(b)["loss"] for b in wanted]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original: Callable[..., object] = trainer.Trainer._step

    def stepping(self: trainer.Trainer, number: int, batch: object) -> object:
        row = original(self, number, batch)
        if number + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(trainer.Trainer, "_step", stepping)


def test_an_adapter_checkpoint_is_the_merged_one_and_moves_with_its_run(
    root: Path, tmp_path: Path
) -> None:
    merged = run_stage(lora_tune(root), tmp_path / "merged").checkpoint
    runs = tmp_path / "runs"
    shutil.copytree(root / "runs", runs)
    spec = lora_tune(root, dataclasses.replace(TRAINING, save="adapter"))
    kept = run_stage(dataclasses.replace(spec, init=runs / "align"), runs).checkpoint
    assert not any(n.startswith("language.") for n in load_file(kept / "model.safetensors"))
    config = json.loads((kept / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../align"
    moved = tmp_path / "elsewhere"
    runs.rename(moved)
    one, two = checkpoint_tensors(merged), checkpoint_tensors(moved / "tune")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    # It answers like the merged one, goes on into a further stage, and can be quantised.
    asked = "what is in a?"
    logits = load(merged).logits(asked)
    assert torch.equal(load(moved / "tune").logits(asked), logits)
    quantized = load(moved / "tune", quantize="int8").logits(asked)
    assert torch.equal(quantized, load(merged, quantize="int8").logits(asked))
    again = dataclasses.replace(lora_tune(root), name="again", init=moved / "tune", steps=2)
    run_stage(again, moved)
    kept_apart = load(moved / "tune", adapter="keep")
    assert (kept_apart.logits(asked) - logits).abs().max() < 1e-4
    # Another base, and none.
    other = load_lmm(root / "runs" / "align")
    torch.nn.init.normal_(other.language.model.model.layers[0].self_attn.q_proj.weight)
    save_checkpoint(moved / "align", other, None, {})
    with pytest.raises(PumiceError, match="not the one its adapter was trained on"):
        checkpoint_tensors(moved / "tune")
    shutil.rmtree(moved / "align")
    with pytest.raises(PumiceError, match="names '../align'.*Put the base back"):
        checkpoint_tensors(moved / "tune")


def test_files_that_are_not_plain_lora_are_refused(
    tmp_path: Path, root: Path, language: LanguageModel
) -> None:
    learnt(language)
    save_adapter(tmp_path, language, SPEC, base="b", base_sample="x")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, told in (
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"r": None}, "lacks a usable r"),
        ({"r": 5}, "an A of 5 rows"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(PumiceError, match=told):
            read_adapter(tmp_path)
    path.write_text(json.dumps(config))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, file)
    with pytest.raises(PumiceError, match="holds base_model.model.lm_head.weight"):
        read_adapter(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(PumiceError, match="cannot be read"):
        read_adapter(tmp_path)
    file.unlink()
    with pytest.raises(PumiceError, match="neither adapter_model"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, root: Path, language: LanguageModel
) -> None:
    save_adapter(tmp_path, learnt(language), SPEC, base="vicuna", base_sample="x")
    adapter = read_adapter(tmp_path)
    with pytest.raises(PumiceError, match="does not have: model.layers.0.*vicuna"):
        lora.MergedTensors({"other": torch.zeros(1)}, adapter)
    [name] = [n for n in adapter.pairs if n.endswith("0.self_attn.k_proj.weight")]
    with pytest.raises(PumiceError, match=r"\(16, 32\) weight, and the base model's is \(8, 8\)"):
        adapter.merged(name, torch.zeros(8, 8))


def test_misuse_is_refused(language: LanguageModel, root: Path) -> None:
    with pytest.raises(PumiceError, match="'q_prj' is no linear layer.*Did you mean 'q_proj'"):
        add_lora(language, LoraSpec(r=2, alpha=2, targets=("q_prj",)))
    add_lora(language, SPEC)
    with pytest.raises(PumiceError, match="has adapters already"):
        add_lora(language, SPEC)
    lmm = load_lmm(root / "runs" / "align")
    add_lora(lmm.language, SPEC)
    with pytest.raises(PumiceError, match="has adapters on; merge them"):
        save_checkpoint(root / "nowhere", lmm, None, {})
    spec = dataclasses.replace(lora_tune(root), train={"connector": 1e-3})
    with pytest.raises(PumiceError, match="has lora but trains connector"):
        run_stage(spec, root / "nowhere")
    training = dataclasses.replace(TRAINING, quantize="int4")
    with pytest.raises(PumiceError, match="merged into full precision only"):
        run_stage(lora_tune(root, training), root / "nowhere")


def test_the_recipe_takes_lora_and_names_mistakes() -> None:
    recipe = load_recipe("pocket", ["stages.tune.lora.r=8", "stages.tune.lora.alpha=16"])
    tune = recipe.stages.tune
    assert tune is not None and tune.lora is not None
    assert (tune.lora.r, tune.lora.alpha, tune.lora.dropout) == (8, 16, 0.05)
    for overrides, told in (
        (["stages.tune.lora.rank=8"], "stages.tune.lora.rank is an unknown key"),
        (["stages.tune.lora.quantize=int8"], "set save to adapter"),
        (["stages.align.lora.r=8"], "adapters learn at train.language's rate"),
    ):
        with pytest.raises(PumiceError, match=told):
            load_recipe("pocket", overrides)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_lora_recipes_are_the_paper_s(size: str) -> None:
    recipe = load_recipe(f"llava15-{size}-lora")
    align, tune = recipe.stages.align, recipe.stages.tune
    assert align is not None and tune is not None and tune.lora is not None
    assert recipe.model.language == f"lmsys/vicuna-{size}-v1.5"
    assert (align.train, align.batch_size, align.lora) == ({"connector": 1e-3}, 256, None)
    assert (tune.train, tune.batch_size) == ({"connector": 2e-5, "language": 2e-4}, 128)
    assert (tune.lora.r, tune.lora.alpha, tune.lora.dropout) == (128, 256, 0.05)
    assert tune.lora.targets is None and tune.lora.save == "merged"
    for stage in (align, tune):
        assert (stage.epochs, stage.warmup, stage.schedule) == (1, 0.03, "cosine")
        assert (stage.weight_decay, stage.clip, stage.max_tokens) == (0, None, 2048)
