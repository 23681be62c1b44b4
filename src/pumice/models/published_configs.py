"""The shapes of the backbones that the shipped recipes name, so that a plan needs no download.

Only for arithmetic: what a run builds is read from the backbones themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pumice.core.hub import hub_configs, is_hub_name
from pumice.core.shipped import resolve_backbone

_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_VICUNA_13B = _VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": _CLIP_LARGE | {"image_size": 224},
    "openai/clip-vit-large-patch14-336": _CLIP_LARGE | {"image_size": 336},
    # EVA ViT-g, whose shape transformers has as the defaults of this type; the vision half alone.
    "Salesforce/instructblip-vicuna-7b": {"model_type": "instructblip_vision_model"},
    "lmsys/vicuna-7b-v1.3": _VICUNA_7B | {"max_position_embeddings": 2048},
    "lmsys/vicuna-7b-v1.5": _VICUNA_7B,
    "lmsys/vicuna-13b-v1.5": _VICUNA_13B,
}


def config_folder(name: str, scratch: Path) -> Path:
    """A folder with the config.json of a backbone, given as a recipe names it.

    What is on this machine comes first, then `PUBLISHED`, written below `scratch`, then the Hub.
    """
    if not is_hub_name(name) or Path(name).expanduser().exists():
        return resolve_backbone(name)
    here = hub_configs(name, fetch=False)
    if here is not None:
        return here
    if name in PUBLISHED:
        folder = scratch / name.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
        return folder
    fetched = hub_configs(name, fetch=True)
    assert fetched is not None
    return fetched
