"""ShareGPT: dialogues with a chat model, cleaned as for Vicuna, cut where they are long."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from pumice.core.errors import PumiceError
from pumice.core.files import HALF_CHARACTER
from pumice.core.types import Message, Sample, TextPart
from pumice.data.academic.base import Row, Rules, Tally, Task, llava_row, take
from pumice.data.academic.html_text import as_markdown, is_html
from pumice.data.row_layouts import SLOT
from pumice.data.scripts import read_scripts, script_share

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "chatgpt": "gpt", "bing": "gpt",
             "bard": "gpt", "system": "system"}  # fmt: skip
# Nine times the same digit: a model that got stuck.
_STUCK = re.compile(r"(\d)\1{8}")
# Two lists that both begin with 1 and never come to 2: numbering lost on the way from the page.
_LOST_NUMBERS = re.compile(r"\n1\. [^2]*\n1\. ")

Rounds = list[tuple[str, str]]
Count = Callable[[Rounds], int]


class ShareGptRules(Rules):
    """The rules of ShareGPT."""

    tokenizer: str | None = Field(
        None, description="A folder with the tokenizer that counts; LLaVA-1.5: Vicuna-1.5's."
    )
    max_tokens: int | None = Field(
        2048, ge=16, description="Tokens of a dialogue at most; null: any number."
    )
    template: str = Field("vicuna_v1", description="The template whose own text counts too.")
    cut: Literal["round", "token"] = Field(
        "round",
        description="Where a long dialogue ends: after the last whole round that fits, or inside "
        "an answer. LLaVA-1.5 cuts inside, but a row cannot say that an answer stops short.",
    )
    html: bool = Field(True, description="Web pages become Markdown.")
    stuck: bool = Field(True, description="Drop dialogues with a digit nine times in a row.")
    lost_numbers: bool = Field(True, description="Drop dialogues whose lists lost their numbers.")
    keep_scripts: str | None = Field(
        None,
        description="Keep dialogues in these scripts alone, as latin or latin,greek.",
    )
    skip_scripts: str | None = Field(
        None, description="Drop dialogues in these scripts, as hangul; Vicuna may skip a language."
    )
    script_share: float = Field(
        0.5, gt=0, le=1, description="In a script is a dialogue with so many of its letters in it."
    )

    @field_validator("keep_scripts", "skip_scripts")
    @classmethod
    def _known(cls, names: str | None) -> str | None:
        if names is not None:
            read_scripts(names)
        return names


def sharegpt_rows(task: Task[ShareGptRules]) -> Iterator[Row]:
    """One row a dialogue, without image."""
    count = _counter(task.rules)
    for file, entries in task.official.lists("sg_90k_part1.json"):
        for number, entry in enumerate(entries):
            where = f"{file}, dialogue {number + 1}"
            task.tally.read += 1
            rounds = _cleaned(entry, where, task.rules, task.tally)
            if rounds and count is not None:
                rounds = _shortened(rounds, count, task.rules, task.tally)
            if rounds:
                yield llava_row(str(take(entry, "id", (str, int), where)), None, rounds)


def _cleaned(entry: Any, where: str, rules: ShareGptRules, tally: Tally) -> Rounds:
    """The rounds of a dialogue; none if it was dropped, which is counted."""
    turns = []
    for number, turn in enumerate(take(entry, "conversations", list, where), start=1):
        place = f"{where}, turn {number}"
        speaker = take(turn, "from", str, place)
        if speaker.lower() not in _SPEAKERS:
            tally.dropped["dialogue with an unknown speaker"] += 1
            return []
        text = take(turn, "value", str, place)
        if rules.html and is_html(text):
            tally.changed["web page became Markdown"] += 1
            text = as_markdown(text)
        turns.append((_SPEAKERS[speaker.lower()], text.strip()))
    first = next((i for i, (speaker, _) in enumerate(turns) if speaker == "human"), len(turns))
    tally.changed["turns before the first question were left out"] += 0 < first < len(turns)
    turns = turns[first:]
    if turns and turns[-1][0] == "human":
        tally.changed["last question had no answer and was left out"] += len(turns) > 1
        turns = turns[:-1]
    reason = _unfit(turns, rules)
    if reason:
        tally.dropped[reason] += 1
        return []
    texts = [text for _, text in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _unfit(turns: list[tuple[str, str]], rules: ShareGptRules) -> str | None:
    """Why a dialogue is dropped; None if it is not."""
    if len(turns) < 2:
        return "dialogue without a round"
    if [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        return "dialogue whose turns do not alternate"
    if not all(text for _, text in turns):
        return "dialogue with an empty turn"
    whole = "\n".join(text for _, text in turns)
    if SLOT in whole:
        return f"dialogue that writes {SLOT}, the place of an image"
    if HALF_CHARACTER.search(whole):
        return "dialogue with half a character (a lone surrogate)"
    if rules.stuck and _STUCK.search(whole):
        return "dialogue with a digit nine times in a row"
    if rules.lost_numbers and _LOST_NUMBERS.search(whole):
        return "dialogue whose lists lost their numbers"
    return _unfit_script(whole, rules)


def _unfit_script(whole: str, rules: ShareGptRules) -> str | None:
    def within(scripts: str) -> bool:
        return script_share(whole, read_scripts(scripts)) >= rules.script_share

    if rules.keep_scripts is not None and not within(rules.keep_scripts):
        return "dialogue in another script than the kept ones"
    if rules.skip_scripts is not None and within(rules.skip_scripts):
        return "dialogue in a skipped script"
    return None


def _shortened(rounds: Rounds, count: Count, rules: ShareGptRules, tally: Tally) -> Rounds:
    limit = rules.max_tokens or 0
    if count(rounds) <= limit:
        return rounds
    whole = bisect_right(range(len(rounds)), limit, key=lambda n: count(rounds[: n + 1]))
    if whole and rules.cut == "round":
        tally.changed["dialogue cut after the last round that fits"] += 1
        return rounds[:whole]
    asked, answer = rounds[whole]
    ends = [match.end() for match in re.finditer(r"\S+", answer)]
    fitting = bisect_right(ends, limit, key=lambda n: count([*rounds[:whole], (asked, answer[:n])]))
    if fitting:
        tally.changed["dialogue cut inside an answer"] += 1
        return [*rounds[:whole], (asked, answer[: ends[fitting - 1]])]
    if whole:
        tally.changed["dialogue cut after the last round that fits"] += 1
    else:
        tally.dropped["dialogue whose first question alone is too long"] += 1
    return rounds[:whole]


def _counter(rules: ShareGptRules) -> Count | None:
    """Counts as training does: the template's text and the end tokens included."""
    if rules.max_tokens is None:
        return None
    if rules.tokenizer is None:
        raise PumiceError(
            f"max_tokens is {rules.max_tokens}, and nothing says how tokens are counted. Name the "
            f"language model's folder with tokenizer=DIR, or allow any length with max_tokens=null."
        )
    from pumice.processing.images import ImageSpec
    from pumice.processing.processor import Processor
    from pumice.processing.sentencepiece_tokenizer import read_tokenizer

    spec = ImageSpec(mode="pad", size=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    tokenizer = read_tokenizer(Path(rules.tokenizer))
    processor = Processor(tokenizer, spec, rules.template, None, 1)

    def count(rounds: Rounds) -> int:
        messages = tuple(
            message
            for asked, answer in rounds
            for message in (
                Message("user", (TextPart(asked),)),
                Message("assistant", (TextPart(answer),)),
            )
        )
        return len(processor.encode(Sample("dialogue", messages), pixels=False).input_ids)

    return count
