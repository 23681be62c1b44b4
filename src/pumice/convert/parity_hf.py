"""transformers' own LLaVA as the other side of the proof: another implementation, same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pumice.convert.parity import Measured, Probe
from pumice.core.errors import PumiceError
from pumice.models.constants import IMAGE_ID
from pumice.models.pretrained import default_attention, quiet
from pumice.processing.processor import Processor


class TransformersSpeaker:
    """The class that config.json names, loaded from the written folder without a tensor amiss."""

    def __init__(self, folder: Path, processor: Processor, dtype: torch.dtype) -> None:
        from transformers import AutoModelForImageTextToText

        self._processor = processor
        with quiet():
            self.model, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=default_attention(),
                local_files_only=True,
                output_loading_info=True,
            )
        amiss = {what: sorted(map(str, found)) for what, found in info.items() if found}
        if amiss:
            raise PumiceError(
                f"transformers does not load what was written without complaint: {amiss}. This is "
                f"a fault of the conversion; please report it with the source's config.json."
            )
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, probe: Probe, tokens: int) -> Measured:
        """Logits over the prompt, and so many greedy tokens."""
        encoded = probe.encoded
        image_id = self.model.config.image_token_id
        ids = torch.tensor([[image_id if i == IMAGE_ID else i for i in encoded.input_ids]])
        images = self._images(probe) if encoded.num_images else {}
        output = self.model(input_ids=ids, use_cache=True, **images)
        logits, cache = output.logits, output.past_key_values
        chosen = [self._best(logits)]
        for _ in range(tokens - 1):
            output = self.model(
                input_ids=torch.tensor([chosen[-1:]]), past_key_values=cache, use_cache=True
            )
            chosen.append(self._best(output.logits))
        return Measured(probe.name, logits[0], tuple(chosen))

    def _best(self, logits: torch.Tensor) -> int:
        return int(logits[0, -1].argmax())

    def _images(self, probe: Probe) -> dict[str, Any]:
        """What its forward takes for the images; tiles stand in a dimension of their own."""
        encoded = probe.encoded
        pixels = encoded.pixel_values.to(self.model.dtype)
        plans = [self._processor.plan(size) for size in encoded.image_sizes]
        if not plans or plans[0] is None:
            return {"pixel_values": pixels}
        views = [plan.views for plan in plans if plan is not None]
        parts = torch.split(pixels, views)
        padded = torch.zeros(len(parts), max(views), *pixels.shape[1:], dtype=pixels.dtype)
        for place, part in zip(padded, parts, strict=True):
            place[: len(part)] = part
        sizes = torch.tensor([[height, width] for width, height in encoded.image_sizes])
        return {"pixel_values": padded, "image_sizes": sizes}
