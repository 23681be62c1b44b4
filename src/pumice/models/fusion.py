"""Image features into the placeholder positions of the embedded text.

Shapes: B batch, T positions, D model width, I images, Q image tokens of one image.
"""

from __future__ import annotations

import torch

from pumice.core.errors import PumiceError


def fuse(
    text_embeds: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor | None
) -> torch.Tensor:
    """float[B, T, D], bool[B, T], float[I, Q, D] -> float[B, T, D], in reading order.

    Rows without images need nothing in `features`; a batch without any may pass None.
    """
    places = int(is_image.sum())
    given = 0 if features is None else features.shape[0] * features.shape[1]
    if places != given:
        images = 0 if features is None else features.shape[0]
        raise PumiceError(
            f"the text has {places} image placeholders, but {images} images give {given} image "
            f"features; both must be equal. Encode the text with the processor of this model, and "
            f"pass exactly the images it names."
        )
    if features is None or given == 0:
        return text_embeds
    return text_embeds.masked_scatter(is_image.unsqueeze(-1), features.to(text_embeds.dtype))
