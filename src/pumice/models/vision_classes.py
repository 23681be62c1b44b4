"""Vision halves that transformers has, but not for `AutoModel`: InstructBLIP's and IDEFICS'."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def register_vision_classes() -> None:
    """Make `AutoModel` know the configs of these halves; a second call does nothing."""
    from transformers import AutoModel
    from transformers.models.idefics.configuration_idefics import IdeficsVisionConfig
    from transformers.models.idefics.modeling_idefics import IdeficsPreTrainedModel
    from transformers.models.idefics.vision import IdeficsVisionTransformer
    from transformers.models.instructblip import InstructBlipVisionConfig, InstructBlipVisionModel

    class InstructBlipVision(InstructBlipVisionModel):  # type: ignore[misc]
        """As a half of a whole InstructBLIP, whose tensors are named `vision_model.*`."""

        config_class = InstructBlipVisionConfig
        base_model_prefix = "vision_model"

    class IdeficsVision(IdeficsPreTrainedModel):  # type: ignore[misc]
        """The plain module of IDEFICS with what `from_config` and `from_pretrained` need."""

        config_class = IdeficsVisionConfig
        base_model_prefix = "model.vision_model"
        main_input_name = "pixel_values"
        forward = IdeficsVisionTransformer.forward

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for name, child in IdeficsVisionTransformer(config).named_children():
                self.add_module(name, child)
            self.post_init()

    # Without exist_ok a config class of transformers' own is silently passed over.
    AutoModel.register(InstructBlipVisionConfig, InstructBlipVision, exist_ok=True)
    AutoModel.register(IdeficsVisionConfig, IdeficsVision, exist_ok=True)
