"""The same model as transformers' own LlavaForConditionalGeneration, trained and asked its own way.

What a user would take instead of pumice: its processor, its padded batches with an attention mask,
its loss over full logits, its `generate`. The weights are the very same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pumice.models.constants import IMAGE_ID
from pumice.models.lmm import LMM
from pumice.processing.collate import Batch
from pumice.processing.processor import Processor

# A byte that no text of the world holds: the vocabulary, and so the softmax, stays as it is.
IMAGE_TOKEN = "<0x00>"
PROMPT = "<s>USER: {image}\n{question} ASSISTANT:"


def build_model(
    lmm: LMM, image_id: int, attention: str = "sdpa", dtype: torch.dtype = torch.float32
) -> Any:
    """A LlavaForConditionalGeneration with the weights of `lmm`; `image_id` marks an image."""
    vision, language = lmm.config.vision, lmm.config.language
    tied = bool(language.get("tie_word_embeddings"))
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=image_id,
        vision_feature_layer=lmm.config.vision_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=lmm.image_tokens,
        tie_word_embeddings=tied,
    )
    model = stored_as(LlavaForConditionalGeneration(config), dtype)
    model.set_attn_implementation(attention)
    _fill(model.model.vision_tower, lmm.vision.model.state_dict())
    connector = lmm.connector.state_dict()
    for name, number in (("linear_1", 0), ("linear_2", 2)):
        part = {key: connector[f"{number}.{key}"] for key in ("weight", "bias")}
        getattr(model.model.multi_modal_projector, name).load_state_dict(part)
    model.model.language_model.load_state_dict(lmm.language.model.model.state_dict())
    model.lm_head.load_state_dict(lmm.language.model.lm_head.state_dict())
    model.tie_weights()
    return model


def stored_as(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The model with its weights in this type, as loading gives it.

    What turns positions into angles stays in float32, which `model.to(dtype)` would round as well.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def build_processor(processor: Processor, checkpoint: Path, patch_size: int) -> LlavaProcessor:
    """A LlavaProcessor that prepares text and pictures as `processor` does."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    mark = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([mark], special_tokens=True)
    spec = processor.image_spec
    images = LlavaImageProcessorPil(
        do_pad=spec.mode == "pad",
        size={"shortest_edge": spec.size},
        crop_size={"height": spec.size, "width": spec.size},
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    )


class TrainingStep:
    """Its own padded step: attention mask, full logits, AdamW; frozen vision backbone.

    `learns`: which parameters learn beside the connector's: all, only adapters, or none.
    """

    def __init__(
        self,
        model: Any,
        rate: float,
        clip: float,
        autocast: bool,
        learns: Literal["all", "adapters", "none"] = "all",
    ) -> None:
        self.model, self.clip, self.autocast = model, clip, autocast
        self.device = model.device.type
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns == "all" or (learns == "adapters" and ".lora_" in name))
        model.model.multi_modal_projector.requires_grad_(True)
        model.model.vision_tower.requires_grad_(False).eval()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0, fused=True)

    def __call__(self, batch: dict[str, torch.Tensor]) -> float:
        """One optimizer step; gives the loss."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def training_inputs(batch: Batch, image_id: int) -> dict[str, torch.Tensor]:
    """The same conversations as transformers takes them: image token ids and an attention mask."""
    if bool((batch.input_ids == image_id).any()):
        raise AssertionError(f"{IMAGE_TOKEN} stands in a text, so it cannot mark images")
    columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    images = {"pixel_values": batch.pixel_values} if len(batch.pixel_values) else {}
    return {
        "input_ids": batch.input_ids.masked_fill(batch.input_ids == IMAGE_ID, image_id),
        "attention_mask": (columns < batch.lengths.unsqueeze(1)).long(),
        "labels": batch.labels,
        **images,
    }


class Answering:
    """Questions about pictures, from files to text, in left-padded batches of `rows`."""

    def __init__(
        self, model: Any, processor: LlavaProcessor, end_ids: Sequence[int], new_tokens: int
    ) -> None:
        self.model, self.processor = model.eval(), processor
        processor.tokenizer.padding_side = "left"
        self.options = {
            "do_sample": False,
            "max_new_tokens": new_tokens,
            "eos_token_id": list(end_ids),
            "pad_token_id": processor.tokenizer.pad_token_id,
        }

    def inputs(self, asked: Sequence[tuple[str, Path]]) -> Any:
        """What `generate` takes: ids, mask and pixels of all questions in one batch."""
        return self.processor(
            images=[Image.open(path).convert("RGB") for _, path in asked],
            text=[PROMPT.format(image=IMAGE_TOKEN, question=question) for question, _ in asked],
            padding=True,
            return_tensors="pt",
        )

    def decode(self, inputs: Any) -> list[str]:
        """The answers to one batch that is already prepared."""
        out = self.model.generate(**inputs, **self.options)[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(out, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def __call__(self, asked: Sequence[tuple[str, Path]], rows: int) -> list[str]:
        """The answers in the order of the questions."""
        answers: list[str] = []
        for first in range(0, len(asked), rows):
            answers += self.decode(self.inputs(asked[first : first + rows]))
        return answers


def _fill(tower: Any, state: dict[str, torch.Tensor]) -> None:
    # pumice drops what lies behind the layer it needs; transformers keeps it, and its weights
    # alter no feature.
    tower_state = tower.state_dict()
    unknown = set(state) - set(tower_state)
    if unknown:
        raise AssertionError(f"weights without a place: {', '.join(sorted(unknown))}")
    tower.load_state_dict({**tower_state, **state})
