"""A file's answers to a benchmark's items, with a check that they speak of the same questions.

Splits and languages of a benchmark share their ids: VizWiz's val and test, MMBench in English and
in Chinese. Answers to the one would be scored as answers to the other, and give a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

from pumice.eval.answer_files import read_answers
from pumice.eval.benchmark import Answer, Benchmark, Item, Matching
from pumice.eval.prediction_files import prompt_hash, question_hash
from pumice.processing.response_formats import FORMATS, OCR_TOKENS

# Official files are corrected: POPE's "imange" is "image" today, and in LLaVA's answers it is not.
_SLIPS = 0.9
# Sentences that questions share; two prompts with nothing else in common ask different things.
_SHARED = frozenset(line for name in FORMATS.names() for line in FORMATS[name].lower().split("\n"))


def match_file(
    benchmark: Benchmark, items: Sequence[Item], answers_file: Path
) -> tuple[Matching, list[str]]:
    """The answers of a file to these items, and the ids of those given to something else.

    A row tells what it answers by "prompt" (LLaVA's) or by hashes and the control's name
    (predictions.jsonl); of one that tells nothing nothing is known.
    """
    matching = benchmark.match(read_answers(answers_file), items, str(answers_file))
    by_id = {item.id: item for item in items}
    other = [
        name
        for name, answer in matching.answers.items()
        if _to_another(benchmark, answer, by_id[name])
    ]
    return matching, other


def flagged(matching: Matching, other: Sequence[str], title: str) -> Matching:
    """The matching, flawed when answers were given to something else."""
    if not other:
        return matching
    return replace(matching, notes=(*matching.notes, told(matching, other, title)), flawed=True)


def told(matching: Matching, other: Sequence[str], title: str) -> str:
    """How many answers were given to something else, and what to do."""
    return (
        f"{len(other)} of {len(matching.answers)} answers were given to another question, prompt "
        f"or image than {title} has under their id (the first: {other[0]}); choose the split, "
        f"language and prompt they were asked with (--option)"
    )


def _to_another(benchmark: Benchmark, answer: Answer, item: Item) -> bool:
    if answer.error is not None:
        return False
    if answer.prompt is not None:
        question = _question_line(item.prompt)
        return question is not None and not _asks(question, answer.prompt)
    if answer.control:
        return True
    if not benchmark.knows_prompt(item):
        return False
    if answer.prompt_hash and (item.image is None or item.image.is_file()):
        return answer.prompt_hash != prompt_hash(item)
    return bool(answer.question_hash) and answer.question_hash != question_hash(item)


def _question_line(prompt: str) -> str | None:
    """The line that asks: the last before the options which is no sentence that questions share.

    Of options and hints many are shared, too: "A. yes", "The picture shows shapes.".
    """
    lines = [_plain(line) for line in prompt.split("\n")]
    # An option may go over several lines, and a hint may hold a list.
    first_option = max((n for n, line in enumerate(lines) if line.startswith("a. ")), default=None)
    asking = lines[:first_option] or lines
    skipped = _plain(OCR_TOKENS)
    return next(
        (line for line in reversed(asking) if line not in _SHARED and not line.startswith(skipped)),
        None,
    )


def _asks(line: str, prompt: str) -> bool:
    """Whether a prompt has this line, or one that differs by slips of the pen."""
    return line in _plain(prompt) or any(
        SequenceMatcher(None, line, _plain(part), autojunk=False).ratio() > _SLIPS
        for part in prompt.split("\n")
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
