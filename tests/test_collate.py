"""A batch holds each conversation as it is, and padding that nothing is learnt from."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from pumice.core.errors import PumiceError
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


def test_views_are_made_where_the_batch_has_them() -> None:
    made = processor("llama")
    grey = PIL.Image.new("RGB", (30, 20), "grey")
    talks = [
        (user("Q"), assistant("A")),
        (user("Q", PICTURE, grey), assistant("A")),
        (user("Q", grey), assistant("A")),
    ]
    samples = [Sample(str(number), talk) for number, talk in enumerate(talks)]
    expected = collate([made.encode(sample) for sample in samples], made.pad_id).pixel_values

    def filled(images: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        room = made.room(images)
        rows = [made.encode(sample, room=room) for sample in samples]
        return collate(rows, made.pad_id).pixel_values, [row.pixel_values for row in rows]

    together, views = filled(3)
    assert together.equal(expected) and together.is_contiguous()
    assert together.data_ptr() == views[1].data_ptr()
    assert together[2].data_ptr() == views[2].data_ptr()
    # With less room than views, or in another order, they are copied.
    short, _ = filled(2)
    assert short.equal(expected)
    assert in_one(views[::-1]).equal(expected[[2, 0, 1]])


def test_tiled_images_have_no_room_of_their_own() -> None:
    tiled = ImageSpec(mode="pad", size=12, tiling=TilingSpec("hd", 12, max_tiles=4))
    assert Processor(tokenizer("llama"), tiled, "vicuna_v1", "", 3, view_side=2).room(3) is None
