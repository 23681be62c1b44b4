"""Broken weight files: one clear error each, and never a model that is half there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_folders
from pumice.convert.open import open_model
from pumice.core.errors import PumiceError
from pumice.models.tensor_files import TensorFiles


class Code:
    """What a pickle runs when it is read without care."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(Code.trap),)

    trap: Path


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers LLaVA in shards."""
    folder = tmp_path_factory.mktemp("hf")
    model = hf_folders.llava(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def copy(hf: Path, tmp_path: Path) -> Path:
    return shutil.copytree(hf, tmp_path / "copy")


@pytest.fixture
def pickled(hf: Path, tmp_path: Path) -> Path:
    """The same in one file of PyTorch's."""
    folder = tmp_path / "pickled"
    shutil.copytree(hf, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    files = TensorFiles.of_folder(hf)
    torch.save({name: files[name].clone() for name in files}, folder / "pytorch_model.bin")
    return folder


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_truncated_shard(copy: Path) -> None:
    path = shard(copy)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PumiceError, match=rf"{path.name} cannot be read"):
        open_model(copy)


def test_half_written_file(copy: Path) -> None:
    path = shard(copy)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(PumiceError, match=rf"{path.name} cannot be read"):
        open_model(copy)
    path.write_bytes(b"")
    with pytest.raises(PumiceError, match=rf"{path.name} cannot be read"):
        open_model(copy)


def test_index_names_a_missing_file(copy: Path) -> None:
    path = shard(copy)
    path.unlink()
    with pytest.raises(PumiceError, match=rf"files that are not there: {path.name}"):
        open_model(copy)


def test_shard_of_another_model(copy: Path) -> None:
    path = shard(copy)
    state = load_file(path)
    first = sorted(state)[0]
    state["stranger"] = state.pop(first)
    save_file(state, path)
    with pytest.raises(PumiceError) as caught:
        open_model(copy)
    assert f"lacks {first}" in str(caught.value) and "beyond it stranger" in str(caught.value)


def test_index_may_not_leave_the_directory(copy: Path) -> None:
    path = copy / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"model-00001', '"../model-00001'))
    with pytest.raises(PumiceError, match="files beside the index are allowed only"):
        open_model(copy)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda s: s.pop("language_model.model.norm.weight"), "missing: language.model.model.norm"),
        (lambda s: s.update({"language_model.model.x": torch.ones(1)}), "unexpected: language.mod"),
        (lambda s: s.update({"speech.x": torch.ones(1)}), "in no layout"),
        (
            lambda s: s.update({"language_model.model.norm.weight": torch.ones(31)}),
            r"norm.weight is \(31,\), expected \(32,\)",
        ),
    ],
)
def test_keys_and_shapes(pickled: Path, edit: Callable[[Any], None], told: str) -> None:
    open_model(pickled)
    change(pickled, edit)
    with pytest.raises(PumiceError, match=told):
        open_model(pickled)


def test_pickle_with_code_is_never_run(pickled: Path, tmp_path: Path) -> None:
    Code.trap = tmp_path / "trap"
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    for new in (True, False):
        torch.save(
            state | {"x": Code()},
            pickled / "pytorch_model.bin",
            _use_new_zipfile_serialization=new,
        )
        with pytest.raises(PumiceError, match="holds code: it asks for posix.mkdir"):
            open_model(pickled)
    assert not Code.trap.exists()


@pytest.mark.parametrize("new", [True, False])
def test_truncated_pickle(pickled: Path, new: bool) -> None:
    path = pickled / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=new)
    open_model(pickled)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 200, 60, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(PumiceError, match=r"pytorch_model\.bin cannot be read"):
            open_model(pickled)


def test_not_a_table_of_tensors(pickled: Path) -> None:
    torch.save({"epoch": 3}, pickled / "pytorch_model.bin")
    with pytest.raises(PumiceError, match="holds int; a table of tensors"):
        open_model(pickled)


def test_old_pickles_in_parts_are_held_one_at_a_time(tmp_path: Path) -> None:
    for number in (1, 2):
        state = {f"{part}{number}": torch.full((3,), float(number)) for part in "ab"}
        path = tmp_path / f"pytorch_model-{number}.bin"
        torch.save(state, path, _use_new_zipfile_serialization=False)
    weight_map = {f"{p}{n}": f"pytorch_model-{n}.bin" for n in (1, 2) for p in "ab"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(str({"weight_map": weight_map}).replace("'", '"'))
    files = TensorFiles.of_folder(tmp_path)
    assert [float(files[name][0]) for name in files] == [1.0, 1.0, 2.0, 2.0]
    loaded = {id(file) for file in files._places.values() if file._tensors is not None}
    assert len(loaded) == 1
    assert float(files["a1"][0]) == 1.0
