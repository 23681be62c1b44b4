"""pumice's own checkpoint directories, opened and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pumice.convert.adapter import checkpoint_tensors
from pumice.convert.opened import Facts, Opened, Options, arranged, stored_tokenizer_model
from pumice.convert.shards import write_shards
from pumice.core.files import write_json
from pumice.models.checkpoint import FORMAT, read_lmm_config, write_lmm_config
from pumice.models.lora import CONFIG as ADAPTER_CONFIG
from pumice.models.lora import read_adapter
from pumice.processing.own_template import find_template
from pumice.processing.processor import Processor


def detect(facts: Facts) -> bool:
    """Whether this is a checkpoint that pumice wrote."""
    return facts.config.get("format") == FORMAT


def read(facts: Facts, options: Options) -> Opened:
    """The model of a pumice checkpoint; an adapter is merged as its base is read, or kept."""
    directory = facts.directory
    adapter = None
    if options.keep_adapter and ADAPTER_CONFIG in facts.files:
        adapter = read_adapter(directory)
    config = read_lmm_config(directory)
    processor = Processor.load(directory)
    if options.template is not None:
        template = find_template(options.template, processor.tokenizer)
        processor = processor.with_template(template)
    return arranged(
        Opened(
            "pumice",
            directory,
            config,
            processor,
            checkpoint_tensors(directory, options.base, merge=adapter is None),
            tokenizer_model=stored_tokenizer_model(directory),
            adapter=adapter,
        )
    )


def write_pumice(
    opened: Opened, dst: Path, dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, Any]:
    """Writes `opened` as a pumice checkpoint into the empty directory `dst`; says what of it."""
    write_lmm_config(dst, opened.config)
    write_shards(dst, opened.tensors, dtype=dtype, shard_bytes=shard_bytes)
    write_json(dst / "training.json", {"converted_from": opened.format})
    opened.processor.save(dst)
    return {}
