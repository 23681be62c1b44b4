"""A Hugging Face folder with a language model alone, opened so that it answers like any model.

There is no vision backbone and no connector; a prompt with an image is refused with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import read_json
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.models.quantize import Method, quantize_language
from pumice.processing.images import ImageSpec
from pumice.processing.own_template import own_template
from pumice.processing.processor import Processor
from pumice.processing.templates import BOS, EOS, Template, Token

if TYPE_CHECKING:
    from pumice.core.types import ImagePart

_NO_IMAGES = (
    "this model is a language model alone and sees no images; ask without one, or give a model "
    "with a vision backbone"
)


class NoVision(nn.Module):
    """The missing vision backbone: its sizes are 1, and it raises when it is given an image."""

    image_size = 1
    num_tokens = 1

    def forward(self, *pixels: torch.Tensor, **named: Any) -> torch.Tensor:
        """Always raises."""
        raise PumiceError(f"{_NO_IMAGES}.")


class NoConnector(nn.Identity):
    """The missing connector, of one token an image."""

    num_tokens = 1
    side = None
    wants_instruction = False
    options: ClassVar[dict[str, Any]] = {}


class TextOnlyProcessor(Processor):
    """A processor whose images are errors of the request that holds them."""

    def load_image(
        self, image: ImagePart, where: str = "", room: object = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Always raises."""
        raise DataError(f"{where or 'the prompt'}: {_NO_IMAGES}.")


def is_language_folder(directory: Path | str) -> bool:
    """Whether this is a Hugging Face folder of a decoder without vision, by its config.json."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    if not isinstance(config, dict) or any(key.endswith("vision_config") for key in config):
        return False
    # LLaVA's own checkpoints are decoders by name, with a vision tower in the config.
    known = config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return known and not any(key.startswith("mm_") for key in config)


def open_language_folder(
    directory: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    quantize: Method | None = None,
) -> tuple[LMM, Processor]:
    """The language model of a Hugging Face folder as a model that takes text alone.

    It uses the tokenizer's own chat template; without one it continues the text it is given.
    """
    directory = Path(directory)
    language = LanguageModel.from_folder(directory)
    lmm = LMM(NoVision(), NoConnector(), language, "none")  # type: ignore[arg-type]
    lmm = lmm.to(dtype=dtype)
    if quantize is not None:
        quantize_language(language, quantize)
    lmm = lmm.to(device=device).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ends = _end_ids(directory)
    template = (
        own_template(tokenizer) if tokenizer.chat_template else _continuation(tokenizer, ends)
    )
    return lmm, TextOnlyProcessor(tokenizer, ImageSpec("resize", 1), template, "", 1)


def _continuation(tokenizer: Any, ends: list[int]) -> Template:
    """BOS and the user's text, nothing else; ends at the first token the folder says texts end at.

    The tokenizer's end token ends an answer in any case.
    """
    end = EOS
    if tokenizer.bos_token_id in ends or tokenizer.eos_token_id is None:
        end = BOS
    elif ends and tokenizer.eos_token_id not in ends:
        end = Token(tokenizer.convert_ids_to_tokens(ends[0]))
    return Template(name="continuation", end=end)


def _end_ids(directory: Path) -> list[int]:
    path = directory / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    return [ends] if isinstance(ends, int) else list(ends or [])
