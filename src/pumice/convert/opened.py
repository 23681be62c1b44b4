"""What an opened directory is, whatever project wrote it: architecture, tensors, processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pumice.core.errors import PumiceError
from pumice.core.files import read_json
from pumice.models.checkpoint import check_tensors, model_shapes
from pumice.models.config import LMMConfig
from pumice.models.lora import Adapter
from pumice.models.pretrained import config_from_dict, without_init
from pumice.models.tensor_files import RenamedTensors

if TYPE_CHECKING:
    from pumice.processing.processor import Processor

_EMBEDDINGS = "language.model."


@dataclass(frozen=True)
class Options:
    """What a user adds where a directory does not hold everything."""

    base: Path | None = None
    """The language model that a connector or an adapter belongs to."""
    vision: Path | None = None
    """The vision backbone's Hugging Face folder."""
    template: str | None = None
    """The conversation template, where the directory does not name the right one."""
    keep_adapter: bool = False
    """Whether an adapter stays beside its base, in place of being merged as the base is read."""


@dataclass(frozen=True)
class Facts:
    """What is seen of a directory without opening its weights. Its name is not among it."""

    directory: Path
    files: frozenset[str]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, directory: Path | str) -> Facts:
        """The facts of a directory; without config.json its config is empty."""
        directory = Path(directory)
        if not directory.is_dir():
            raise PumiceError(
                f"there is no directory {directory}; give the directory that holds the model."
            )
        path = directory / "config.json"
        config = read_json(path) if path.is_file() else {}
        if not isinstance(config, dict):
            raise PumiceError(f"{path} holds no JSON object; copy the file again.")
        return cls(directory, frozenset(entry.name for entry in directory.iterdir()), config)


@dataclass(frozen=True)
class Opened:
    """A model on disk, under our names; its tensors are read when they are asked for."""

    format: str
    """Which format it is in, in words."""
    directory: Path
    config: LMMConfig
    processor: Processor
    tensors: Mapping[str, torch.Tensor]
    """Exactly those of a model of `config`."""
    spare: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Pieces of the vision backbone behind the used block; targets may want to hold them."""
    tower: str | None = None
    """What original LLaVA calls the vision backbone (`mm_vision_tower`)."""
    tokenizer_model: Path | None = None
    """The SentencePiece model of the tokenizer, which original LLaVA reads."""
    adapter: Adapter | None = None
    """What changes the language model, where it is kept and not merged into `tensors`."""

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type its language model is stored in; the whole model runs in one type."""
        name = next(name for name in self.tensors if name.startswith(_EMBEDDINGS))
        return self.tensors[name].dtype


@dataclass(frozen=True)
class Format:
    """One line of the table of formats."""

    name: str
    """In words, as errors list it."""
    detect: Callable[[Facts], bool]
    read: Callable[[Facts, Options], Opened]


def arranged(opened: Opened) -> Opened:
    """Checked, and with what a model of this config does not use put aside.

    Missing, unknown and misshapen tensors are one error.
    """
    wanted = model_shapes(opened.config)
    names = [name for name in opened.tensors if name not in wanted]
    unused = unused_vision_shapes(opened.config) if names else {}
    tied = opened.config.language.get("tie_word_embeddings")
    # A tied output head may be stored a second time.
    doubled = {"language.model.lm_head.weight"} if tied else set()
    used = [name for name in opened.tensors if name not in unused and name not in doubled]
    tensors = RenamedTensors(opened.tensors, {name: name for name in used})
    check_tensors(opened.config, tensors, opened.directory)
    spare = {name: name for name in names if name in unused}
    return replace(opened, tensors=tensors, spare=RenamedTensors(opened.tensors, spare))


def unused_vision_shapes(config: LMMConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision backbone's tensors that a model of `config` leaves out."""
    if "pair" in config.vision:
        return {}
    from transformers import AutoModel

    from pumice.models.vision_classes import register_vision_classes

    register_vision_classes()
    data = {key: value for key, value in config.vision.items() if key != "input_side"}
    with without_init(True), torch.device("meta"):
        whole = AutoModel.from_config(config_from_dict(data, part="vision backbone"))
    used = model_shapes(config)
    shapes = {f"vision.model.{name}": tuple(t.shape) for name, t in whole.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name not in used}


def stored_tokenizer_model(directory: Path) -> Path | None:
    """The SentencePiece model in a directory."""
    path = directory / "tokenizer.model"
    return path if path.is_file() else None
