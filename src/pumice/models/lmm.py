"""The one model class: vision backbone, connector and language model.

Shapes: N images or tiles, Q image tokens of one image, B batch, T positions, D model width,
V vocabulary, K kept positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from pumice.core.errors import PumiceError
from pumice.models.config import LMMConfig
from pumice.models.connectors import build_connector
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.fusion import fuse
from pumice.models.language import LanguageModel
from pumice.models.pretrained import config_from_dict, config_to_dict
from pumice.models.vision import Select, VisionBackbone


class TrainingBatch(Protocol):
    """What `LMM.loss` reads of a batch (`processing.collate.Batch` is one)."""

    @property
    def input_ids(self) -> torch.Tensor:
        """long[B, T]."""

    @property
    def labels(self) -> torch.Tensor:
        """long[B, T]."""

    @property
    def position_ids(self) -> torch.Tensor:
        """long[B, T]."""

    @property
    def pixel_values(self) -> torch.Tensor:
        """float[N, 3, H, W]."""


class LMM(nn.Module):
    """A large multimodal model; every part may be frozen or trained on its own."""

    def __init__(
        self, vision: VisionBackbone, connector: nn.Module, language: LanguageModel, name: str
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.language = language
        self.connector_name = name

    @classmethod
    def from_backbones(
        cls,
        vision_folder: Path | str,
        language_folder: Path | str,
        connector: str,
        layer: int,
        select: Select,
        *,
        attention: str | None = None,
    ) -> LMM:
        """Pre-trained backbones out of Hugging Face folders, and a new connector between them."""
        vision = VisionBackbone.from_folder(vision_folder, layer, select, attention=attention)
        language = LanguageModel.from_folder(language_folder, attention=attention)
        return cls(vision, _connector(connector, vision, language), language, connector)

    @classmethod
    def from_config(
        cls, config: LMMConfig, *, attention: str | None = None, init: bool = True
    ) -> LMM:
        """A new model of this architecture; `init=False` leaves the weights to be filled in."""
        vision = VisionBackbone(
            config_from_dict(config.vision, part="vision backbone"),
            config.vision_layer,
            config.vision_select,
            attention=attention,
            init=init,
        )
        language = LanguageModel.from_config(
            config_from_dict(config.language, part="language model"), attention=attention, init=init
        )
        return cls(
            vision, _connector(config.connector, vision, language), language, config.connector
        )

    @property
    def config(self) -> LMMConfig:
        """The architecture as data."""
        return LMMConfig(
            vision=config_to_dict(self.vision.config),
            vision_layer=self.vision.layer,
            vision_select=self.vision.select,
            connector=self.connector_name,
            language=config_to_dict(self.language.config),
        )

    @property
    def image_tokens(self) -> int:
        """Q, the positions one image takes up in the language model."""
        tokens = self.connector.num_tokens
        assert isinstance(tokens, int)
        return tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language.token_embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the language model's weights."""
        return self.language.token_embeddings.dtype

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[N, 3, H, W] -> float[N, Q, D]; a frozen vision backbone keeps no graph."""
        weight = next(self.vision.parameters())
        features: torch.Tensor = self.connector(self.vision(pixel_values.to(weight.dtype)))
        return features

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        """long[B, T] with IMAGE_ID at placeholders, float[I, Q, D] -> float[B, T, D]."""
        is_image = input_ids == IMAGE_ID
        return fuse(self.language.embed(input_ids.masked_fill(is_image, 0)), is_image, features)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """long[B, T] (+ float[N, 3, H, W] or float[I, Q, D]) -> float[B, T, V] or float[K, V].

        Images come as pixels or as features already encoded. `keep`, bool[B, T], selects the
        positions whose logits are wanted. Padding stands on the right.
        """
        if features is None and pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values)
        logits: torch.Tensor = self.language(
            self.embed(input_ids, features), position_ids=position_ids, keep=keep
        )
        return logits

    def loss(
        self, batch: TrainingBatch, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """Batch -> (float[] sum of the cross entropy over supervised tokens, their number).

        The sum, so that the caller may normalise over micro-batches and processes. `features`,
        float[I, Q, D], replaces the encoding of the batch's pixels.
        """
        targets = batch.labels[:, 1:]
        supervised = targets != IGNORE
        # Logits at t foretell token t + 1; the last position foretells nothing.
        keep = F.pad(supervised, (0, 1), value=False)
        logits = self(
            batch.input_ids,
            position_ids=batch.position_ids,
            pixel_values=batch.pixel_values,
            features=features,
            keep=keep,
        )
        wanted = targets[supervised]
        return F.cross_entropy(logits.float(), wanted, reduction="sum"), len(wanted)

    @torch.no_grad()
    def match_connector_scale(self, pixel_values: torch.Tensor) -> float:
        """float[N, 3, H, W] -> the factor by which the connector's last linear layer was scaled.

        Afterwards its outputs are on average as long as token embeddings, so that a new connector
        starts in the range the language model knows.
        """
        linears = [m for m in self.connector.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise PumiceError(
                f"connector {self.connector_name!r} has no linear layer to scale; start it without "
                f"matching the scale."
            )
        norm = self.encode_images(pixel_values).float().norm(dim=-1).mean()
        factor = float(self.language.token_embeddings.float().norm(dim=-1).mean() / norm)
        linears[-1].weight.mul_(factor)
        if linears[-1].bias is not None:
            linears[-1].bias.mul_(factor)
        return factor


def _connector(name: str, vision: VisionBackbone, language: LanguageModel) -> nn.Module:
    return build_connector(name, vision.hidden_size, language.hidden_size, vision.num_tokens)
