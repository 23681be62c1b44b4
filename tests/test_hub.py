"""Backbones by their names on the Hugging Face Hub: the cache first, then one download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from pumice.core.errors import PumiceError
from pumice.core.hub import hub_folder, is_hub_name
from pumice.core.shipped import resolve_backbone

NAME = "openai/clip-vit-large-patch14-336"


class FakeHub:
    """Stands for the Hub's client: what is cached, what a repository holds, what was asked for."""

    def __init__(self, cached: Path | None, files: list[str] | None, fresh: Path | None) -> None:
        self.cached, self.files, self.fresh = cached, files, fresh
        self.asked: list[Any] = []

    def snapshot_download(self, name: str, **settings: Any) -> str:
        self.asked.append((name, settings))
        if settings.get("local_files_only"):
            if self.cached is None:
                raise LocalEntryNotFoundError("nothing cached")
            return str(self.cached)
        return str(self.fresh)

    def list_repo_files(self, name: str) -> list[str]:
        if self.files is None:
            raise OfflineModeIsEnabled("offline mode is enabled.")
        return self.files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(cached: Path | None, files: list[str] | None, fresh: Path | None = None) -> FakeHub:
        fake = FakeHub(cached, files, fresh)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
        return fake

    return install


def repository(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_text("{}")
    return path


def test_what_is_cached_whole_is_used_as_it_is(hub: Any, tmp_path: Path) -> None:
    fake = hub(repository(tmp_path, "config.json", "model.safetensors"), None)
    assert resolve_backbone(NAME) == tmp_path
    assert fake.asked == [(NAME, {"local_files_only": True})]


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], "*.safetensors"),
        (["pytorch_model-00001-of-00002.bin", "unet/x.safetensors"], "pytorch_model*.bin"),
    ],
)
def test_one_kind_of_weights_is_fetched(
    hub: Any, tmp_path: Path, files: list[str], weights: str
) -> None:
    fake = hub(None, files, tmp_path)
    assert hub_folder(NAME) == tmp_path
    patterns = fake.asked[-1][1]["allow_patterns"]
    assert patterns[-1] == weights and "*.json" in patterns and "*.model" in patterns


def test_half_a_download_is_fetched_again(hub: Any, tmp_path: Path) -> None:
    half = repository(tmp_path / "half", "config.json", "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    hub(half, ["model-1.safetensors"], tmp_path / "whole")
    assert hub_folder(NAME) == tmp_path / "whole"


def test_offline_says_what_to_do(hub: Any) -> None:
    hub(None, None)
    with pytest.raises(PumiceError) as caught:
        resolve_backbone(NAME)
    message = str(caught.value)
    assert NAME in message and "offline mode is enabled" in message
    assert f"hf download {NAME} --local-dir DIR" in message


def test_a_directory_of_that_name_is_taken(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = hub(None, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "vision").mkdir()
    assert resolve_backbone("my/vision") == Path("my/vision")
    assert fake.asked == []


def test_which_texts_look_like_names() -> None:
    assert all(map(is_hub_name, (NAME, "lmsys/vicuna-7b-v1.5", "a/b")))
    assert not any(map(is_hub_name, ("pocket", "/a/b", "./a", "../a/b", "a/b/c", "~/a", "a/", "")))
