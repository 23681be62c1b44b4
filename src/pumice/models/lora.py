"""Low-rank adapters (LoRA) on a language model's linear layers: put on, read, written, merged.

The training half is peft's (extra `lora`); merging is arithmetic on tensors and needs no peft.
Shapes: O outputs, I inputs, R rank of the adapter.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pumice.core.errors import PumiceError
from pumice.core.files import read_json, sha256_bytes, write_json
from pumice.core.registry import suggest
from pumice.models.language import LanguageModel
from pumice.models.quantize import quantized_as
from pumice.models.tensor_files import shape_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
# What peft puts before the names of the model that it wraps.
_PREFIX = "base_model.model."
_NAME = "default"
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# Variants of peft's files whose weights are not W + scaling * B @ A with one scaling for all.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    # Other beginnings (pissa, olora, corda, loftq) change the base model's weights too.
    "init_lora_weights": (None, False, "gaussian", "orthogonal", "eva", True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Which adapters learn in place of the language model's own weights."""

    r: int
    """The rank."""
    alpha: float
    """The change is scaled by alpha / r (alpha / sqrt(r) with `rslora`)."""
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    """Last names of the layers that get one; None for every linear layer but the output head."""
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor of B @ A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Changes to named weights of a language model: weight name -> (A float[R, I], B float[O, R]).

    Names are those of the Hugging Face model: `model.layers.0.self_attn.q_proj.weight`.
    """

    scaling: float
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    base: str | None = None
    """The model it was learnt on, as its file names it."""

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """float[O, I] -> float[O, I], W + scaling * B @ A; summed in float32, given in W's type."""
        if name not in self.pairs:
            return weight
        a, b = self.pairs[name]
        if tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise PumiceError(
                f"the adapter changes {name} as a ({b.shape[0]}, {a.shape[1]}) weight, and the "
                f"base model's is {tuple(weight.shape)}. Give the base model that the adapter was "
                f"trained on{f' ({self.base})' if self.base else ''}."
            )
        return merged_weight(weight, a, b, self.scaling)

    def check_base(self, names: Iterable[str]) -> None:
        """Every changed weight is one of `names`; an error says which are not."""
        strange = sorted(set(self.pairs) - set(names))
        if strange:
            raise PumiceError(
                f"the adapter changes weights that the base model does not have: "
                f"{', '.join(strange[:4])} ({len(strange)} of {len(self.pairs)}). Give the base "
                f"model that it was trained on{f' ({self.base})' if self.base else ''}."
            )


class MergedTensors(Mapping[str, torch.Tensor]):
    """A model's tensors with an adapter merged into each as it is read; nothing is kept."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], adapter: Adapter, prefix: str = ""
    ) -> None:
        """`prefix` stands before the language model's names in `tensors`."""
        adapter.check_base(name.removeprefix(prefix) for name in tensors)
        self._tensors, self._adapter, self._prefix = tensors, adapter, prefix

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor where it is known without reading it."""
        return shape_of(self._tensors, name)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if not name.startswith(self._prefix):
            return tensor
        return self._adapter.merged(name.removeprefix(self._prefix), tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@torch.no_grad()
def merged_weight(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """float[O, I], float[R, I], float[O, R] -> float[O, I]; W + scaling * B @ A in float32.

    The sum is rounded once, to W's type.
    """
    if not weight.is_floating_point():
        raise _not_full_precision(str(weight.dtype).removeprefix("torch."))
    change = (b.float() @ a.float()).mul_(scaling)
    return change.add_(weight.to(change.device, torch.float32)).to(weight.dtype)


def add_lora(language: LanguageModel, spec: LoraSpec) -> None:
    """Puts new adapters on the language model, which may be quantised; only they want gradients.

    A is random and B zero, so the model's answers stay what they were.
    """
    if has_lora(language):
        raise PumiceError(
            "the language model has adapters already; merge them before new ones are put on."
        )
    targets = _targets(language, spec)
    peft = _peft()
    config = peft.LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_rslora=spec.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    language.requires_grad_(False)
    with warnings.catch_warnings():
        # peft warns of tied embeddings, which no adapter here touches.
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, language.model, adapter_name=_NAME)
    for name, parameter in language.named_parameters():
        parameter.requires_grad_(_is_adapter(name))


def linear_layers(language: LanguageModel) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that may get an adapter, by their names: every linear one but the output head."""
    head = language.model.get_output_embeddings()  # type: ignore[operator]
    for name, module in language.model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def has_lora(module: nn.Module) -> bool:
    """Whether adapters are on."""
    return any(_is_adapter(name) for name, _ in module.named_parameters())


def adapter_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' own parameters, by their names in the module."""
    return ((name, p) for name, p in module.named_parameters() if _is_adapter(name))


def adapter_weight_names(language: LanguageModel) -> list[str]:
    """The weights that adapters change, by their names in the Hugging Face model."""
    end = f".lora_A.{_NAME}.weight"
    names = (name.removeprefix("model.") for name, _ in adapter_parameters(language))
    return [f"{name.removesuffix(end)}.weight" for name in names if name.endswith(end)]


def base_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything but the adapters, by the names without them; quantised weights are among it."""
    stored = module.state_dict(keep_vars=True)
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    aliases -= {name for name, _ in module.named_parameters()}
    for name, tensor in stored.items():
        if name not in aliases and not _is_adapter(name):
            yield name.replace(".base_layer.", "."), tensor


@torch.no_grad()
def merge_lora(language: LanguageModel) -> None:
    """Adds the adapters to the weights and takes them off; the sum is made in float32.

    A quantised language model is refused: its weights could not hold the change.
    """
    method = quantized_as(language)
    if method is not None:
        raise _not_full_precision(method)
    for name, layer in list(language.model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        base = layer.base_layer
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        base.weight.copy_(merged_weight(base.weight, a, b, layer.scaling[_NAME]))
        parent, _, leaf = name.rpartition(".")
        setattr(language.model.get_submodule(parent), leaf, base)
    if hasattr(language.model, "peft_config"):
        del language.model.peft_config


def save_adapter(
    directory: Path, language: LanguageModel, spec: LoraSpec, *, base: str, base_sample: str
) -> None:
    """Writes the adapters as peft does: adapter_config.json and adapter_model.safetensors.

    `base` names the model they belong to; `base_sample` is `weights_sample` of its weights.
    """
    settings: Any = language.model.peft_config
    config = json.loads(json.dumps(settings[_NAME].to_dict(), default=_plain))
    write_json(
        directory / CONFIG, config | {"base_model_name_or_path": base, "inference_mode": True}
    )
    tensors = {
        _PREFIX + name.removeprefix("model.").replace(f".{_NAME}.", "."): p.detach().cpu()
        for name, p in adapter_parameters(language)
    }
    metadata = {"format": "pt", "base_sample": base_sample}
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / WEIGHTS, metadata)


def read_adapter(directory: Path) -> Adapter:
    """The adapter of a directory that peft, LLaVA or pumice wrote; one it cannot be is an error."""
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise PumiceError(
            f"{directory / CONFIG} describes an adapter of peft_type {kind!r}; LORA is allowed. "
            f"Merge it with the tool that made it, and give the merged model."
        )
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise PumiceError(
                f"{directory / CONFIG} has {key} = {config[key]!r}, which is not plain LoRA; "
                f"allowed: {plain[-1]!r}. Merge it with peft, and give the merged model."
            )
    try:
        spec = LoraSpec(
            r=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PumiceError(
            f"{directory / CONFIG} lacks a usable r and lora_alpha ({error}); take the file that "
            f"the adapter was saved with."
        ) from error
    base = config.get("base_model_name_or_path")
    return Adapter(spec.scaling, _pairs(directory, spec.r), base)


def weights_sample(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> str:
    """A short hash over the first numbers of the named tensors: training changes all of them."""
    parts = []
    for name in sorted(names):
        head = tensors[name].flatten()[:64].float().cpu()
        parts.append(name.encode() + head.contiguous().view(torch.uint8).numpy().tobytes())
    return sha256_bytes(b"".join(parts))[:16]


def _pairs(directory: Path, r: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    path = directory / WEIGHTS
    try:
        if path.is_file():
            tensors = load_file(path)
        else:
            path = directory / PICKLED
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PumiceError(
            f"{directory} has {CONFIG} but neither {WEIGHTS} nor {PICKLED}; copy it again in full."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise PumiceError(
            f"{path} cannot be read: {error}. A whole adapter file is needed; copy it again."
        ) from error
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise PumiceError(
                f"{path} holds {key}; only lora_A and lora_B weights of linear layers are "
                f"allowed. Merge it with peft, and give the merged model."
            )
        halves.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    for name, pair in halves.items():
        shapes = {half: tuple(tensor.shape) for half, tensor in sorted(pair.items())}
        whole = len(pair) == 2 and shapes["A"][0] == r == shapes["B"][1]
        if not whole:
            raise PumiceError(
                f"{path} holds {shapes} for {name}; an A of {r} rows and a B of {r} columns are "
                f"needed. Copy the adapter's files again, all of one adapter."
            )
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _targets(language: LanguageModel, spec: LoraSpec) -> list[str]:
    """Last names of the layers that get an adapter."""
    leaves = sorted({name.rpartition(".")[2] for name, _ in linear_layers(language)})
    if not leaves:
        raise PumiceError(
            f"the language model ({language.config.model_type}) has no linear layers for adapters; "
            f"a decoder built of nn.Linear is needed. Train it whole, without lora."
        )
    for target in spec.targets or ():
        if target not in leaves:
            raise PumiceError(
                f"lora target {target!r} is no linear layer of this language model "
                f"({language.config.model_type}); it has {', '.join(leaves)}."
                f"{suggest(target, leaves)}"
            )
    wanted = set(spec.targets or leaves)
    return sorted(leaf for leaf in leaves if leaf in wanted)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise PumiceError(
            f"LoRA needs the package peft, and it cannot be imported ({error}). Install it with: "
            f"pip install 'pumice[lora]'."
        ) from error
    return peft


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _not_full_precision(found: str) -> PumiceError:
    return PumiceError(
        f"an adapter can be merged into full precision only, and the base model is {found}: "
        f"rounding would lose the change. Load the base model without quantisation."
    )
