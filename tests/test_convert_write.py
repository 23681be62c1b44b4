"""What is written is read back the same, loads where it is meant to, and is proven before kept."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import hf_folders
import tiny
from pumice.convert import convert as conversion
from pumice.convert import proof
from pumice.convert.convert import convert
from pumice.convert.open import open_model, open_parts
from pumice.convert.parity import Measured, compare, probe_image
from pumice.convert.shards import write_shards
from pumice.convert.write_hf import with_rows
from pumice.core.errors import PumiceError
from pumice.core.shipped import SHIPPED_DIR
from pumice.core.types import user
from pumice.models.checkpoint import save_checkpoint
from pumice.models.constants import IMAGE_ID
from pumice.models.lmm import LMM
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from pumice.processing.sentencepiece_tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers LLaVA (hf) and, from it, a pumice checkpoint (pumice)."""
    root = tmp_path_factory.mktemp("convert")
    hf_folders.llava(root / "hf")
    convert(root / "hf", root / "pumice", "pumice")
    return root


def pumice_checkpoint(root: Path, folder: Path, connector: str = "mlp2x_gelu", **spec: Any) -> Path:
    """A checkpoint with the template vicuna_v1 whose tokenizer fills every row of its tables."""
    language = tiny.language_folder(root / "language", tied=False, positions=1024)
    vision = tiny.vision_folder(root / "vision")
    lmm = LMM.from_backbones(vision, language, connector, -2, "patch")
    spec = {"mode": "pad", "size": tiny.IMAGE_SIZE} | spec
    processor = Processor(
        read_tokenizer(language),
        ImageSpec(**spec),
        "vicuna_v1",
        None,
        lmm.image_tokens,
        view_side=lmm.view_side,
    )
    save_checkpoint(folder, lmm, processor.save, {})
    return folder


def state(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    opened = open_parts(folder, **options)
    return {name: opened.tensors[name].clone() for name in opened.tensors}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("road", [["pumice", "hf"], ["llava", "hf"], ["hf", "llava", "pumice"]])
def test_round_trips_are_bit_identical(root: Path, tmp_path: Path, road: list[str]) -> None:
    here = root / "hf"
    for number, to in enumerate(road):
        here, before = tmp_path / str(number), here
        report = convert(before, here, to, template="vicuna_v1")
        for found in report["parity"].values():
            assert found["ok"] and found["max_logit_difference"] <= 1e-4
    assert_equal(state(root / "hf"), state(here))
    source, result = (open_parts(folder).config.to_dict() for folder in (root / "hf", here))
    for config in (source, result):  # the class that a part would have by itself
        del config["language"]["architectures"], config["vision"]["architectures"]
    assert source == result


def test_unused_blocks_of_the_vision_backbone_travel_along(root: Path, tmp_path: Path) -> None:
    convert(root / "hf", tmp_path / "again", "hf")
    source = load_file(root / "hf" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert len(source) == len(again)
    for name, tensor in source.items():
        published = name.replace("vision_tower.", "vision_tower.vision_model.")
        assert torch.equal(again[published], tensor)
    # A pumice checkpoint does not hold them: they are there, and nothing.
    report = convert(root / "pumice", tmp_path / "from-pumice", "hf")
    made_up = load_file(tmp_path / "from-pumice" / "model.safetensors")
    assert report["made_up_vision_tensors"] == 18
    last = [n for n in made_up if "layers.2" in n or "post_layernorm" in n]
    assert len(last) == 18 and not any(made_up[name].any() for name in last)


def test_a_tied_head_is_written_out_for_the_original_layout(tmp_path: Path) -> None:
    report = convert(SHIPPED_DIR / "pocket", tmp_path / "llava", "llava")
    assert all(found["max_logit_difference"] == 0 for found in report["parity"].values())
    assert any("output head" in note for note in report["notes"])
    written = state(tmp_path / "llava")
    head, table = "language.model.lm_head.weight", "language.model.model.embed_tokens.weight"
    assert torch.equal(written[head], written[table])


def test_transformers_loads_the_result_without_complaint(root: Path, tmp_path: Path) -> None:
    report = convert(pumice_checkpoint(tmp_path, tmp_path / "model"), tmp_path / "hf", "hf")
    model, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    # 417 tokens and an image and a padding token, in full 64s.
    assert report["vocabulary"] == 448 == model.get_input_embeddings().weight.shape[0]
    assert (report["image_token_id"], model.config.image_token_id) == (417, 417)
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 418
    names = load_file(tmp_path / "hf" / "model.safetensors")
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "language_model.model.embed_tokens.weight" in names
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_their_processor_reads_as_ours(root: Path, tmp_path: Path) -> None:
    source = pumice_checkpoint(tmp_path, tmp_path / "model")
    convert(source, tmp_path / "hf", "hf")
    processor = Processor.load(source)
    reader = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat"}]}]
    batch = reader.apply_chat_template(
        [chat[0] | {"content": [{"type": "image", "image": probe_image()}, chat[0]["content"][1]]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    encoded = processor.encode_prompt([user("the cat", probe_image())])
    ids = [417 if index == IMAGE_ID else index for index in encoded.input_ids]
    assert batch["input_ids"][0].tolist() == ids
    assert torch.allclose(batch["pixel_values"], encoded.pixel_values, atol=1e-5)


def test_a_tokenizer_that_marks_the_start_alone_reads_as_ours(tmp_path: Path) -> None:
    """As Vicuna's does (legacy: false), which sets no mark behind a spelled-out <s> or an image."""
    source = pumice_checkpoint(tmp_path, tmp_path / "model")
    path = source / "tokenizer.json"
    data = json.loads(path.read_text())
    data["normalizer"] = None
    mark = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
    path.write_text(json.dumps(data | {"pre_tokenizer": mark | {"split": False}}))
    processor = Processor(
        read_tokenizer(source), ImageSpec("pad", tiny.IMAGE_SIZE), "vicuna_v1", None, 16
    )
    processor.save(source)
    report = convert(source, tmp_path / "hf", "hf")
    assert report["notes"] == []
    reader = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat"}]}]
    text = reader.apply_chat_template(chat, add_generation_prompt=True)
    batch = reader(text=text, images=probe_image(), add_special_tokens=False)
    encoded = processor.encode_prompt([user("the cat", probe_image())])
    ids = [417 if index == IMAGE_ID else index for index in encoded.input_ids]
    assert batch["input_ids"][0] == ids
    again = open_parts(tmp_path / "hf").processor
    assert (again.template.name, again.system) == ("vicuna_v1", None)
    asked = [user("the cat")]
    assert again.encode_prompt(asked).input_ids == processor.encode_prompt(asked).input_ids


def test_new_rows_are_never_the_likeliest(root: Path, tmp_path: Path) -> None:
    source = pumice_checkpoint(tmp_path, tmp_path / "model")
    convert(source, tmp_path / "hf", "hf")
    before, after = state(source), state(tmp_path / "hf")
    for name in before:
        rows = len(before[name])
        assert torch.equal(after[name][:rows], before[name]), name
    head = after["language.model.lm_head.weight"]
    assert torch.allclose(head[417:], head[:417].mean(0).expand(31, -1), atol=1e-6)
    assert with_rows(head, 10) is head


def test_weights_can_change_their_type(root: Path, tmp_path: Path) -> None:
    report = convert(root / "hf", tmp_path / "half", "hf", dtype="bfloat16")
    assert report["parity"]["transformers"]["dtype"] == "bfloat16"
    kept = state(tmp_path / "half")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    before = state(root / "hf")
    assert all(torch.equal(kept[n], before[n].to(torch.bfloat16)) for n in kept)


def test_shards_have_at_most_their_size(root: Path, tmp_path: Path) -> None:
    convert(root / "hf", tmp_path / "hf", "hf", shard_bytes=60_000)
    convert(tmp_path / "hf", tmp_path / "pumice", "pumice", shard_bytes=60_000)
    for folder in (tmp_path / "hf", tmp_path / "pumice"):
        shards = sorted(folder.glob("model-*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(shards) > 3 and {s.name for s in shards} == set(index["weight_map"].values())
        sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
        assert max(sizes) <= 60_000 and sum(sizes) == index["metadata"]["total_size"]
    assert_equal(state(root / "hf"), state(tmp_path / "pumice"))


def test_writer_takes_every_kind_of_tensor(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5, dtype=torch.float16),
        "turned": torch.randn(4, 6).t(),
        "number": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }
    write_shards(tmp_path, tensors, dtype=torch.float32)
    found = load_file(tmp_path / "model.safetensors")
    assert found["half"].dtype == torch.float32 and found["number"].dtype == torch.int64
    assert all(torch.equal(found[n], t.to(found[n].dtype)) for n, t in tensors.items())


@pytest.mark.parametrize(
    ("connector", "to", "told"),
    [
        ("linear", "hf", "cannot express the connector linear"),
        ("resampler", "llava", "cannot express the connector resampler"),
        ("resampler", "gguf", "cannot express the connector resampler"),
    ],
)
def test_a_design_without_a_place_is_refused(
    tmp_path: Path, connector: str, to: str, told: str
) -> None:
    source = pumice_checkpoint(tmp_path, tmp_path / "model", connector)
    with pytest.raises(PumiceError, match=told):
        convert(source, tmp_path / "out", to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["language", "model", "vision"]


def test_a_padding_colour_of_ones_own_is_refused(tmp_path: Path) -> None:
    source = pumice_checkpoint(tmp_path, tmp_path / "model", pad_color=(1, 2, 3))
    for to in ("hf", "llava"):
        with pytest.raises(PumiceError, match=r"padding colour|pad_color"):
            convert(source, tmp_path / "out", to)


@pytest.mark.parametrize("connector", ["linear", "mlp3x_gelu"])
def test_original_layout_has_any_number_of_layers(tmp_path: Path, connector: str) -> None:
    source = pumice_checkpoint(tmp_path, tmp_path / "model", connector)
    report = convert(source, tmp_path / "llava", "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["mm_projector_type"] == connector and config["image_aspect_ratio"] == "pad"
    assert "choose vicuna_v1" in report["notes"][0]
    names = load_file(tmp_path / "llava" / "model.safetensors")
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in names
    assert_equal(state(source), state(tmp_path / "llava"))


def test_resampler_stays_in_pumice(tmp_path: Path) -> None:
    source = pumice_checkpoint(tmp_path, tmp_path / "model", "resampler")
    convert(source, tmp_path / "out", "pumice")
    assert_equal(state(source), state(tmp_path / "out"))


def test_gguf_is_proven_too(root: Path, tmp_path: Path) -> None:
    report = convert(root / "pumice", tmp_path / "gguf", "gguf", dtype="f32")
    assert report["parity"]["opened again"]["max_logit_difference"] <= 1e-4
    assert {p.name for p in (tmp_path / "gguf").iterdir()} == {
        "model-f32.gguf",
        "mmproj-f32.gguf",
        "parity.json",
    }


def spoil(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on the writer writes one tensor wrongly."""
    write = write_shards

    def wrong(directory: Path, tensors: Any, **options: Any) -> int:
        changed = {key: tensors[key].clone() for key in tensors}
        changed[name] = changed[name] * 1.01
        return write(directory, changed, **options)

    monkeypatch.setattr("pumice.convert.write_hf.write_shards", wrong)


def test_a_wrong_result_is_not_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "multi_modal_projector.linear_2.weight")
    with pytest.raises(PumiceError, match="does not answer as the source does"):
        convert(root / "hf", tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


def test_a_result_that_reads_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pumice.convert.write_hf.to_jinja", lambda *_, **__: hf_folders.CHAT)
    source = pumice_checkpoint(tmp_path, tmp_path / "model")
    with pytest.raises(PumiceError, match="the prompt 'text' has other tokens"):
        convert(source, tmp_path / "out", "hf")


def test_report_is_beside_the_result(root: Path) -> None:
    report = json.loads((root / "pumice" / "parity.json").read_text())
    found = report["parity"]["opened again"]
    assert [row["probe"] for row in found["probes"]] == ["text", "image", "two turns"]
    assert found["max_logit_difference"] == 0.0 and found["token_agreement"] == 1.0


def test_nothing_is_overwritten(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(PumiceError, match="exists and is not empty"):
        convert(root / "hf", tmp_path / "out", "pumice")
    with pytest.raises(PumiceError, match="Did you mean 'gguf'"):
        convert(root / "hf", tmp_path / "new", "ggufs")
    with pytest.raises(PumiceError, match="'q8_0' cannot be written as hf"):
        convert(root / "hf", tmp_path / "new", "hf", dtype="q8_0")
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


def test_a_language_model_alone_is_refused(tmp_path: Path) -> None:
    folder = tiny.language_folder(tmp_path / "language")
    with pytest.raises(PumiceError, match="a language model alone"):
        convert(folder, tmp_path / "out", "hf")


def measured(logits: torch.Tensor, tokens: tuple[int, ...] = (1, 2)) -> list[Measured]:
    return [Measured("text", logits, tokens)]


def test_tolerance_follows_the_type() -> None:
    logits = torch.full((4, 8), 10.0)
    near = measured(logits + 0.01)
    assert not compare(measured(logits), near, torch.float32)["ok"]
    assert compare(measured(logits), near, torch.float16)["ok"]
    assert not compare(measured(logits), measured(logits + 2), torch.bfloat16)["ok"]
    other = measured(logits, (1, 3))
    assert not compare(measured(logits), other, torch.float32)["ok"]
    assert compare(measured(logits), other, torch.bfloat16)["token_agreement"] == 0.5
    longer = measured(torch.full((5, 8), 10.0))
    assert not compare(measured(logits), longer, torch.float16)["ok"]


def test_command(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from pumice.cli.app import app

    args = ["convert", str(root / "pumice"), str(tmp_path / "hf"), "--to", "hf"]
    done = CliRunner().invoke(app, [*args, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["parity"]["transformers"]["ok"] and report["from"] == "pumice"
    again = CliRunner().invoke(app, ["convert", *args[1:2], str(tmp_path / "l"), "--to", "llava"])
    assert again.exit_code == 0 and "8/8" in again.stdout and "note:" in again.stdout
    assert open_model(tmp_path / "l", template="vicuna_v1")
    assert conversion.TARGETS == ("pumice", "hf", "llava", "gguf")


def test_no_model_of_the_proof_meets_another(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source, result and transformers' own: each is gone before the next is built."""
    asked: list[weakref.ref[Any]] = []

    def alone(make: Any) -> Any:
        def watched(*args: Any) -> Any:
            assert not any(model() is not None for model in asked)
            made = make(*args)
            asked.append(weakref.ref(getattr(made, "model", made)))
            return made

        return watched

    monkeypatch.setattr(proof, "build", alone(proof.build))
    monkeypatch.setattr(proof, "TransformersSpeaker", alone(proof.TransformersSpeaker))
    convert(root / "hf", tmp_path / "out", "hf")
    assert [model() for model in asked] == [None, None, None]
