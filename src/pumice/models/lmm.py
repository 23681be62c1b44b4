"""The one model class: vision backbone, connector and language model, whatever their families.

A view is one picture that goes through the vision backbone; an image has one, or (tiled) several.
Shapes: N views, I images, P patches and Q tokens of one view, B batch, T positions, D model width,
V vocabulary, K kept positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from pumice.core.errors import PumiceError
from pumice.models.config import LMMConfig
from pumice.models.connectors import Connector, Instruction, build_connector
from pumice.models.constants import IGNORE, IMAGE_ID
from pumice.models.cross_attention import Media, build_cross_attention, by_row, media_for
from pumice.models.fusion import Features, fuse
from pumice.models.language import LanguageModel
from pumice.models.pretrained import config_from_dict, config_to_dict
from pumice.models.tiling import ImagePlan, TilingSpec, merge_views, picture_mask, plan_image
from pumice.models.vision import Select, VisionBackbone
from pumice.models.vision_pair import VisionPair


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
        """float[N, 3, H, W], every view of every image."""

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Width and height of each image."""

    @property
    def instruction(self) -> Instruction | None:
        """What is asked of each image, for connectors that read it."""

    @property
    def documents(self) -> Sequence[int] | None:
        """The lengths of the documents packed into the one row; None for padded rows."""


class LMM(nn.Module):
    """A large multimodal model; every part may be frozen or trained on its own."""

    def __init__(
        self,
        vision: VisionBackbone | VisionPair,
        connector: Connector,
        language: LanguageModel,
        name: str,
        tiling: TilingSpec | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.language = language
        self.connector_name = name
        self.tiling = tiling
        self.cross_attention = build_cross_attention(connector, language)
        self.row_end: nn.Parameter | None = None
        if tiling is not None and self.cross_attention is None:
            # LLaVA-NeXT's image_newline, and its start (llava_arch.py: randn / sqrt(D)).
            width = language.hidden_size
            self.row_end = nn.Parameter(torch.randn(width) / width**0.5)
        # Whether text alone still goes by way of a blank view that adds nothing: processes that
        # train together must all take part in the exchange of every weight and gradient.
        self.always_looks = False

    @classmethod
    def from_backbones(
        cls,
        vision_folder: Path | str | Sequence[Path | str],
        language_folder: Path | str,
        connector: str,
        layer: int,
        select: Select,
        *,
        norm: bool = False,
        options: dict[str, Any] | None = None,
        tiling: TilingSpec | None = None,
        attention: str | None = None,
    ) -> LMM:
        """Pre-trained backbones out of Hugging Face folders, and a new connector between them."""
        vision = VisionBackbone.from_folder(
            vision_folder, layer, select, norm=norm, attention=attention
        )
        language = LanguageModel.from_folder(language_folder, attention=attention)
        built = _connector(connector, vision, language, options)
        return cls(vision, built, language, connector, tiling)

    @classmethod
    def from_config(
        cls, config: LMMConfig, *, attention: str | None = None, init: bool = True
    ) -> LMM:
        """A new model of this architecture; `init=False` leaves the weights to be filled in."""
        vision = VisionBackbone.build(
            config.vision,
            config.vision_layer,
            config.vision_select,
            norm=config.vision_norm,
            attention=attention,
            init=init,
        )
        language = LanguageModel.from_config(
            config_from_dict(config.language, part="language model"), attention=attention, init=init
        )
        connector = _connector(config.connector, vision, language, config.connector_options)
        tiling = TilingSpec.from_dict(config.tiling) if config.tiling is not None else None
        return cls(vision, connector, language, config.connector, tiling)

    @property
    def config(self) -> LMMConfig:
        """The architecture as data."""
        return LMMConfig(
            vision=self.vision.config_data,
            vision_layer=self.vision.layer,
            vision_select=self.vision.select,
            vision_norm=self.vision.norm,
            connector=self.connector_name,
            connector_options=dict(self.connector.options),
            tiling=self.tiling.to_dict() if self.tiling is not None else None,
            language=config_to_dict(self.language.config),
        )

    @property
    def image_tokens(self) -> int:
        """Q, the positions one view of an image takes up in the language model.

        With gated cross-attention the features stay outside, and one position marks an image.
        """
        return 1 if self.cross_attention is not None else self.connector.num_tokens

    @property
    def view_side(self) -> int | None:
        """The side of the square in which the tokens of a view stand; None when they have none."""
        return self.connector.side

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the language model's weights."""
        return self.language.token_embeddings.dtype

    def part(self, name: str) -> nn.Module:
        """One of `vision`, `connector` and `language`, as a stage freezes or trains it.

        The row ends of tiled images and gated cross-attention belong to the connector.
        """
        if name != "connector":
            part: nn.Module = getattr(self, name)
            return part
        more: list[nn.Module] = []
        if self.row_end is not None:
            more.append(nn.ParameterList([self.row_end]))
        if self.cross_attention is not None:
            more.append(self.cross_attention)
        return nn.ModuleList([self.connector, *more]) if more else self.connector

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        instruction: Instruction | None = None,
    ) -> Features:
        """float[N, 3, H, W], every view of I images -> float[I, Q, D], or I times float[Qi, D].

        Tiled images need their sizes, width and height. A frozen vision backbone keeps no graph.
        """
        if self.tiling is None:
            return self._encode_views(pixel_values, None, instruction)
        plans = self._plans(image_sizes, len(pixel_values))
        views = torch.tensor([plan.views for plan in plans], device=pixel_values.device)
        if instruction is not None:
            instruction = Instruction(*(part.repeat_interleave(views, 0) for part in instruction))
        masks = self._picture_masks(plans).to(pixel_values.device)
        encoded = torch.split(self._encode_views(pixel_values, masks, instruction), views.tolist())
        if self.row_end is None:
            return [part.flatten(0, 1) for part in encoded]
        return [
            merge_views(part, plan, self.row_end) for part, plan in zip(encoded, plans, strict=True)
        ]

    def _encode_views(
        self,
        pixel_values: torch.Tensor,
        mask: torch.Tensor | None,
        instruction: Instruction | None,
    ) -> torch.Tensor:
        """float[N, 3, H, W], bool[N, P] -> float[N, Q, D]."""
        weight = next(self.vision.parameters())
        patches = self.vision(pixel_values.to(weight.dtype))
        features: torch.Tensor = self.connector(patches, mask=mask, instruction=instruction)
        return features

    def _picture_masks(self, plans: Sequence[ImagePlan]) -> torch.Tensor:
        """I plans -> bool[N, P]: which features of each view show some of the picture."""
        side = self.vision.image_size // self.vision.patch_size
        masks = torch.cat([picture_mask(plan, side) for plan in plans])
        prefix = self.vision.num_tokens - masks.shape[1]
        return F.pad(masks, (prefix, 0), value=True)

    def _plans(self, sizes: Sequence[tuple[int, int]] | None, views: int) -> list[ImagePlan]:
        assert self.tiling is not None
        if sizes is None:
            raise PumiceError(
                f"{views} views of tiled images are given without the sizes of the images. Pass "
                f"image_sizes, width and height of each image in order."
            )
        plans = [
            plan_image(size, self.tiling, self.view_side, self.connector.num_tokens)
            for size in sizes
        ]
        planned = sum(plan.views for plan in plans)
        if planned != views:
            raise PumiceError(
                f"{len(plans)} images of sizes {list(sizes)[:4]} make {planned} views, and {views} "
                f"are given; both must be equal. Prepare the images with the processor of this "
                f"model."
            )
        return plans

    def embed(self, input_ids: torch.Tensor, features: Features | None) -> torch.Tensor:
        """long[B, T] with IMAGE_ID at placeholders, features -> float[B, T, D]."""
        is_image = input_ids == IMAGE_ID
        text = self.language.embed(input_ids.masked_fill(is_image, 0))
        if self.cross_attention is not None:
            return self.cross_attention.mark(text, is_image)
        return fuse(text, is_image, features)

    def media(
        self,
        input_ids: torch.Tensor,
        features: Features | None,
        position_ids: torch.Tensor | None = None,
        documents: Sequence[int] | None = None,
    ) -> Media | None:
        """What gated layers look at; None without such layers or without images.

        long[B, T] with one IMAGE_ID an image, features of all images in reading order;
        `position_ids`, long[B, T], that restart at 0 begin a new document, and `documents` are
        the lengths of those of a packed row.
        """
        if self.cross_attention is None:
            return None
        return media_for(input_ids, by_row(input_ids, features), position_ids, documents)

    def looking_at(self, media: Media | None) -> AbstractContextManager[None]:
        """While it lasts, the gated layers of the language model see these images."""
        return nullcontext() if self.cross_attention is None else self.cross_attention.using(media)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        features: Features | None = None,
        keep: torch.Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        instruction: Instruction | None = None,
        documents: Sequence[int] | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """long[B, T] and images -> float[B, T, V] or float[K, V], or with `targets` float[].

        Images come as pixels, float[N, 3, H, W] (with sizes when tiled, with instructions when the
        connector reads them), or as features already encoded. `keep`, bool[B, T], selects the
        positions whose logits are wanted. Padding stands on the right. `documents` are the lengths
        of those packed into the one row, each with positions of its own. `targets`, long[K], are
        what the kept positions should say: given them, the result is the summed cross entropy.
        """
        if features is None and pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values, image_sizes, instruction)
        with self.looking_at(self.media(input_ids, features, position_ids, documents)):
            embeds = self.embed(input_ids, features)
            if self.always_looks and features is None:
                embeds = embeds + 0.0 * self.blank_features().sum()
            if targets is not None:
                assert keep is not None
                return self.language.loss(embeds, targets, keep, position_ids, documents)
            logits: torch.Tensor = self.language(
                embeds, position_ids=position_ids, keep=keep, documents=documents
            )
        return logits

    def loss(
        self, batch: TrainingBatch, features: Features | None = None
    ) -> tuple[torch.Tensor, int]:
        """Batch -> (float[] sum of the cross entropy over supervised tokens, their number).

        The sum, so that the caller may normalise over micro-batches and processes. `features`
        replace the encoding of the batch's pixels.
        """
        keep, targets = _supervised(batch)
        self.language.loss_in_pieces(len(targets))  # tries a text, so not while it sees images
        loss: torch.Tensor = self._read(batch, features, keep=keep, targets=targets)
        return loss, len(targets)

    def logits(self, batch: TrainingBatch, features: Features | None = None) -> torch.Tensor:
        """Batch -> float[K, V], at the positions that foretell a supervised token."""
        logits: torch.Tensor = self._read(batch, features, keep=_supervised(batch)[0])
        return logits

    def _read(self, batch: TrainingBatch, features: Features | None, **more: Any) -> Any:
        return self(
            batch.input_ids,
            position_ids=batch.position_ids,
            pixel_values=batch.pixel_values,
            features=features,
            image_sizes=batch.image_sizes,
            instruction=batch.instruction,
            documents=batch.documents,
            **more,
        )

    @torch.no_grad()
    def match_connector_scale(self, pixel_values: torch.Tensor) -> float:
        """float[N, 3, H, W] -> the factor by which the connector's last linear layer was scaled.

        Afterwards its outputs are on average as long as token embeddings, so that a new connector
        starts in the range the language model knows.
        """
        if self.cross_attention is not None:
            return 1.0  # its latents are no tokens, and its gates begin at zero
        linears = [m for m in self.connector.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise PumiceError(
                f"connector {self.connector_name!r} has no linear layer to scale; start it without "
                f"matching the scale."
            )
        asked = self._no_instruction(pixel_values)
        norm = self._encode_views(pixel_values, None, asked).float().norm(dim=-1).mean()
        factor = float(self.language.token_embeddings.float().norm(dim=-1).mean() / norm)
        linears[-1].weight.mul_(factor)
        if linears[-1].bias is not None:
            linears[-1].bias.mul_(factor)
        return factor

    def blank_features(self) -> torch.Tensor:
        """float[1, Q, D] of a view without a picture, with the row end where there is one."""
        side = self.vision.image_size
        blank = torch.zeros(1, 3, side, side, device=self.device)
        features = self._encode_views(blank, None, self._no_instruction(blank))
        return features if self.row_end is None else features + self.row_end

    def _no_instruction(self, pixel_values: torch.Tensor) -> Instruction | None:
        if not self.connector.wants_instruction:
            return None
        nothing = torch.zeros(len(pixel_values), 0, dtype=torch.long, device=pixel_values.device)
        return Instruction(nothing, nothing.bool())


def _supervised(batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """bool[B, T], the positions that foretell a supervised token, and long[K], those tokens."""
    targets = batch.labels[:, 1:]
    supervised = targets != IGNORE
    # Logits at t foretell token t + 1; the last position foretells nothing.
    return F.pad(supervised, (0, 1), value=False), targets[supervised]


def _connector(
    name: str,
    vision: VisionBackbone | VisionPair,
    language: LanguageModel,
    options: dict[str, Any] | None,
) -> Connector:
    return build_connector(
        name,
        vision.hidden_size,
        language.hidden_size,
        vision.num_tokens,
        options,
        vocab_size=language.vocab_size,
    )
