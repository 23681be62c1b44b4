"""Image features into the placeholder positions of the embedded text.

Shapes: B batch, T positions, D model width, I images, Q image tokens of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pumice.core.errors import PumiceError

# float[I, Q, D] when all images have as many tokens, else float[Qi, D] for each image.
Features = torch.Tensor | Sequence[torch.Tensor]


def fuse(
    text_embeds: torch.Tensor, is_image: torch.Tensor, features: Features | None
) -> torch.Tensor:
    """float[B, T, D], bool[B, T], features of I images -> float[B, T, D], in reading order.

    Rows without images need nothing in `features`; a batch without any may pass None.
    """
    places = int(is_image.sum())
    flat = flatten_features(features)
    given = 0 if flat is None else flat.shape[0]
    if places != given:
        images = 0 if features is None else len(features)
        raise PumiceError(
            f"the text has {places} image placeholders, but {images} images give {given} image "
            f"features; both must be equal. Encode the text with the processor of this model, and "
            f"pass exactly the images it names."
        )
    if flat is None or given == 0:
        return text_embeds
    return text_embeds.masked_scatter(is_image.unsqueeze(-1), flat.to(text_embeds.dtype))


def flatten_features(features: Features | None) -> torch.Tensor | None:
    """Features of I images -> float[sum of Qi, D], one image after the other; None without any."""
    if features is None or len(features) == 0:
        return None
    if isinstance(features, torch.Tensor):
        return features.flatten(0, 1)
    return torch.cat(list(features))
