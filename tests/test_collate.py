"""A batch holds each conversation as it is, and padding that nothing is learnt from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from pumice.core.errors import DataError, PumiceError
from pumice.core.types import Sample, assistant, user
from pumice.models.constants import IGNORE
from pumice.models.tiling import TilingSpec
from pumice.processing.collate import collate
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from pumice.processing.view_room import in_one
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


def test_a_batch_is_its_samples_with_their_views_one_behind_the_other() -> None:
    made = processor("llama")
    grey = PIL.Image.new("RGB", (30, 20), "grey")
    talks = [
        (user("Q"), assistant("A")),
        (user("Q", PICTURE, grey), assistant("A")),
        (user("Q", grey), assistant("A")),
    ]
    samples = [Sample(str(number), talk) for number, talk in enumerate(talks)]
    alone = [made.encode(sample) for sample in samples]
    together = made.encode_batch(samples)
    expected, batch = collate(alone, made.pad_id), collate(together, made.pad_id)
    none = torch.empty(0)
    for one, other in zip(alone, together, strict=True):
        assert replace(one, pixel_values=none) == replace(other, pixel_values=none)
    pixels = batch.pixel_values
    assert pixels.equal(expected.pixel_values) and pixels.is_contiguous()
    assert pixels.data_ptr() == together[1].pixel_values.data_ptr()
    assert pixels[2].data_ptr() == together[2].pixel_values.data_ptr()
    # In another order they are copied.
    turned = in_one([row.pixel_values for row in together[::-1]])
    assert turned.equal(pixels[[2, 0, 1]])
    assert made.encode_batch([]) == []


def test_tiled_images_take_no_room_beforehand() -> None:
    tiling = TilingSpec("hd", 12, max_tiles=4)
    tiled = Processor(
        tokenizer("llama"), ImageSpec("pad", 12, tiling=tiling), "vicuna_v1", "", 4, view_side=2
    )
    wide = PIL.Image.linear_gradient("L").convert("RGB").resize((40, 12))
    sample = Sample("a", (user("Q", wide, PICTURE), assistant("A")))
    [one] = tiled.encode_batch([sample])
    assert one.pixel_values.equal(tiled.encode(sample).pixel_values)
    assert len(one.pixel_values) > 2 and one.grids == tiled.encode(sample).grids


def test_texts_come_before_the_first_image() -> None:
    made = processor("llama")
    gone = Sample("a", (user("Q", Path("gone.png")), assistant("A")))
    long = Sample("b", (user("Q " * 100), assistant("A")))
    with pytest.raises(DataError, match="sample 'b' has"):
        made.encode_batch([gone, long], max_tokens=50)
    with pytest.raises(DataError, match="sample 'a'.*does not exist"):
        made.encode_batch([gone])
