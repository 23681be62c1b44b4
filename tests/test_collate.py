"""A batch holds each conversation as it is, and padding that nothing is learnt from."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from pumice.core.errors import PumiceError
from pumice.core.types import Sample, assistant, user
from pumice.models.constants import IGNORE
from pumice.processing.collate import collate
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from tokenizers_zoo import tokenizer

PICTURE = PIL.Image.linear_gradient("L").convert("RGB")
TWO_ROUNDS = (user("Q", PICTURE), assistant("A1"), user("Q2"), assistant("A2"))


def processor(kind: str) -> Processor:
    return Processor(tokenizer(kind), ImageSpec(mode="pad", size=12), "vicuna_v1", "", 3)


def test_batch_is_padded_right_with_documents_of_their_own() -> None:
    made = processor("llama_first")  # its padding is its end token
    assert made.pad_id == made.end_token_ids[0]
    rows = [
        made.encode(Sample("a", (user("Q"), assistant("Yes")))),
        made.encode(Sample("b", TWO_ROUNDS)),
    ]
    batch = collate(rows, made.pad_id)
    short, long = (len(row.input_ids) for row in rows)
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (2, long)
    assert batch.input_ids[0].tolist() == rows[0].input_ids + [made.pad_id] * (long - short)
    assert batch.labels[0].tolist() == rows[0].labels + [IGNORE] * (long - short)
    assert batch.position_ids[0].tolist() == [*range(short), *range(long - short)]
    assert batch.position_ids[1].tolist() == [*range(long)]
    assert batch.lengths.tolist() == [short, long] and batch.sample_ids == ["a", "b"]
    assert batch.num_supervised == sum(row.num_supervised for row in rows)
    assert torch.equal(batch.pixel_values, rows[1].pixel_values)
    assert batch.grids.tolist() == [[1, 1]]
    assert batch.to("meta").labels.device.type == "meta"


def test_batch_of_texts_alone_has_no_picture() -> None:
    made = processor("llama")
    batch = collate([made.encode(Sample("a", (user("Q"), assistant("Yes"))))], made.pad_id)
    assert batch.pixel_values.shape == (0, 3, 12, 12) and batch.grids.shape == (0, 2)
    with pytest.raises(PumiceError, match="empty list"):
        collate([], 0)
