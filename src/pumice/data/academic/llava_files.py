"""Files that are LLaVA's already: their rows are checked and their images named as in a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from pumice.core.errors import DataError
from pumice.data.academic.base import Row, Rules, Tally, Task, image_name, take
from pumice.data.row_layouts import SLOT

_SPEAKERS = ("human", "gpt")


class LlavaRules(Rules):
    """The rules of LLaVA-Instruct."""

    image: str = Field(
        "coco/train2017/{image}", description="How a row names its image, below --images."
    )


def llava_rows(task: Task[LlavaRules]) -> Iterator[Row]:
    """The rows of the files, in order."""
    for file, entries in task.official.lists("llava_instruct_150k.json"):
        for number, entry in enumerate(entries):
            task.tally.read += 1
            row = checked_row(entry, task.rules.image, f"{file}, row {number + 1}", task.tally)
            if row is not None:
                yield row


def checked_row(entry: Any, image: str, where: str, tally: Tally) -> Row | None:
    """The row with its image renamed and rounds without an answer left out; None if none is left.

    A turn out of order, or an image without its place, is an error that names the row.
    """
    name = take(entry, "id", (str, int), where)
    turns = take(entry, "conversations", list, where)
    for number, turn in enumerate(turns):
        if take(turn, "from", str, f"{where}, turn {number + 1}") != _SPEAKERS[number % 2]:
            raise DataError(
                f"{where}, turn {number + 1}: 'from' is {turn['from']!r}; turns of human and gpt "
                f"must alternate, human first. Correct or remove the row."
            )
        take(turn, "value", str, f"{where}, turn {number + 1}")
    if len(turns) % 2:
        raise DataError(f"{where}: the last question has no answer. Correct or remove the row.")
    row: Row = {"id": str(name)}
    if "image" in entry:
        row["image"] = image_name(image, image=take(entry, "image", str, where))
    row["conversations"] = _answered(turns, tally)
    slots = sum(turn["value"].count(SLOT) for turn in row["conversations"])
    if row["conversations"] and slots != int("image" in entry):
        raise DataError(
            f"{where}: {slots} {SLOT} and {int('image' in entry)} images; as many of both are "
            f"needed. Correct or remove the row."
        )
    if not row["conversations"]:
        tally.dropped["row without any answer"] += 1
        return None
    return row


def _answered(turns: list[Any], tally: Tally) -> list[dict[str, str]]:
    rounds = [turns[place : place + 2] for place in range(0, len(turns), 2)]
    kept = [pair for pair in rounds if pair[1]["value"].strip()]
    tally.changed["round without answer was left out"] += len(rounds) - len(kept)
    turns = [{"from": turn["from"], "value": turn["value"]} for pair in kept for turn in pair]
    if turns and not rounds[0][1]["value"].strip() and SLOT in rounds[0][0]["value"]:
        # The picture was shown in the round that is gone.
        turns[0]["value"] = f"{SLOT}\n{turns[0]['value']}"
    return turns
