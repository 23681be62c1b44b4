"""What a benchmark is: its items, how an answer is read and scored, and how scores add up.

Every metric is a function of sums over rows (`tally` gives one row's addends, `metrics` turns sums
into numbers). That makes the metric of a bootstrap draw the same code as the metric itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from pumice.core.errors import PumiceError
from pumice.core.registry import check_choice, suggest
from pumice.core.types import Prediction
from pumice.processing.response_formats import with_format

Floats = npt.NDArray[np.float64]
PROMPTS = ("short", "none", "qa")
"""Response formats that questions with a short answer can be asked with; first, the published one.

The others are for models that were trained on them.
"""
BROKEN = "broken"
"""The key in an item's `extra` that says why it has no image, so that it is not asked."""
UNJUDGED = "unjudged"
"""The key in a prediction's `extra` that says why an answer still lacks its judge's verdict."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark. `group` is the bootstrap's unit (the image)."""

    id: str
    image: Path | None
    prompt: str
    truth: Any
    group: str
    category: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """An item together with what was answered to it."""

    item: Item
    prediction: Prediction

    @property
    def fault(self) -> str | None:
        """Why there is no score for this row: no answer, or no verdict on it; None with one."""
        error = self.prediction.error
        return self.prediction.extra.get(UNJUDGED) if error is None else error


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of an answers file, before it is matched to an item."""

    id: str
    text: str
    prompt: str | None = None
    category: str | None = None
    error: str | None = None
    prompt_hash: str | None = None
    """Of a row of predictions.jsonl: what was asked, see `prediction_files.prompt_hash`."""
    question_hash: str | None = None
    """The same without the image, which need not be at hand."""
    control: str | None = None
    """Of a row of predictions.jsonl: the control it was asked with."""


@dataclass(frozen=True, slots=True)
class Matching:
    """Answers by item id, with what a reader must be told.

    `flawed` says the answers do not fit the items one to one, so a score would mislead.
    """

    answers: dict[str, Answer]
    notes: tuple[str, ...] = ()
    flawed: bool = False


class Sums:
    """Named sums over rows; each value is float[...] (one number, or one per bootstrap draw)."""

    def __init__(self, keys: Sequence[str], values: Floats) -> None:
        """keys: K names, values: float[..., K]."""
        self._column = {key: index for index, key in enumerate(keys)}
        self._values = values

    def __getitem__(self, key: str) -> Floats:
        """float[...] of one name; zeros when no row had it."""
        column = self._column.get(key)
        if column is None:
            return np.zeros(self._values.shape[:-1])
        return np.asarray(self._values[..., column])

    def under(self, prefix: str) -> Iterator[str]:
        """The x of every name 'prefix/x', in order of first appearance."""
        for key in self._column:
            if key.startswith(prefix + "/"):
                yield key[len(prefix) + 1 :]


def ratio(part: Floats, whole: Floats) -> Floats:
    """float[...], float[...] -> float[...] share, nan where the whole is zero."""
    filled = np.where(whole == 0, 1.0, whole)
    return np.where(whole == 0, np.nan, part / filled)


def percent(part: Floats, whole: Floats) -> Floats:
    """float[...], float[...] -> float[...] in percent, nan where the whole is zero."""
    return 100.0 * ratio(part, whole)


def mean_of(values: Sequence[Floats]) -> Floats:
    """List of float[...] -> float[...] mean that leaves nan entries out."""
    stack = np.stack(values)
    known = ~np.isnan(stack)
    return ratio(np.where(known, stack, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64))


class Benchmark(ABC):
    """A benchmark: subclass it in its own file and add one line to the table of the shelf."""

    name: str
    title: str
    headline: str
    """The metric a table with one number per benchmark shows."""
    most: float = 100.0
    """What the headline can be at most."""
    max_new_tokens: int = 128
    decimals: int = 4
    missing_is_wrong: bool = False
    """True: the official scorer counts an unanswered item as wrong. False: no score then."""
    missing_fate: str = "count as wrong"
    """What the official scorer does with unanswered items, in words."""
    paper: bool = False
    """True: prompts are those LLaVA-1.5 was asked with (see `as_published`)."""
    whole_groups: bool = False
    """True: the metric asks for all items of a group, so a limited run takes groups as a whole."""
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Where official versions differ: what can be chosen, and the values, the default first.

    `prompt` (see PROMPTS) leaves what is published.
    """

    def __init__(self, **chosen: str) -> None:
        """The benchmark with some of its `choices` made; the others keep their default."""
        for name, value in chosen.items():
            if name not in self.choices:
                raise PumiceError(
                    f"{self.name} has no option {name!r}; it has: "
                    f"{', '.join(self.choices) or 'none'}.{suggest(name, self.choices)}"
                )
            check_choice(f"{self.name}.{name}", value, self.choices[name])
        self.chosen = {name: values[0] for name, values in self.choices.items()} | chosen

    def with_options(self, chosen: Mapping[str, str]) -> Self:
        """The same benchmark with these choices made."""
        return type(self)(**chosen)

    @property
    def judged(self) -> bool:
        """False: only a server holds the truths, so answers are collected and not scored."""
        return True

    @abstractmethod
    def load(self, data_dir: Path) -> list[Item]:
        """All items, from the benchmark's official files below `data_dir`."""

    @abstractmethod
    def parse(self, text: str, item: Item) -> str | None:
        """What the benchmark's rule reads in a raw answer; None when it reads nothing."""

    @abstractmethod
    def score(self, parsed: str | None, item: Item) -> float:
        """The score of one parsed answer in 0..1; unparsed is scored as the official code does."""

    @abstractmethod
    def tally(self, row: Row) -> dict[str, float]:
        """What this row adds to the sums."""

    @abstractmethod
    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Sums of float[...] -> the metrics, each float[...]; shares are in percent."""

    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` gives, whatever the answers are."""
        # One category, and nothing counted in it.
        return tuple(self.metrics(Sums(["n/any"], np.zeros(1))))

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Everything that decides a score apart from the model: prompt, parser, metric."""

    def tally_group(self, rows: Sequence[Row]) -> dict[str, float]:
        """What the rows of one group (or of its part in one slice) add to the sums.

        The sum of the rows' tallies, unless the metric asks for something of a group as a whole.
        """
        sums: dict[str, float] = defaultdict(float)
        for row in rows:
            for key, value in self.tally(row).items():
                sums[key] += value
        return dict(sums)

    def prediction(self, item: Item, text: str, extra: Mapping[str, Any]) -> Prediction:
        """A raw answer, parsed and, where the truth is known, scored; `extra` stays with it."""
        parsed = self.parse(text, item)
        return Prediction(
            id=item.id,
            prompt_hash="",
            text=text,
            parsed=parsed,
            score=self.score(parsed, item) if self.judged else None,
            extra=dict(extra),
        )

    @property
    def row_options(self) -> Mapping[str, str]:
        """The choices that decide what is asked; a judge's are not among them.

        The published prompt goes without saying.
        """
        published = () if self.other_prompt else ("prompt",)
        return {name: value for name, value in self.chosen.items() if name not in published}

    @property
    def other_prompt(self) -> bool:
        """Whether another `prompt` than the published one was chosen."""
        return "prompt" in self.choices and self.chosen["prompt"] != self.choices["prompt"][0]

    @property
    def as_published(self) -> bool:
        """Whether questions are, byte for byte, those LLaVA-1.5 was asked."""
        return self.paper and not self.other_prompt

    def prompt(self, question: str) -> str:
        """The question as it is asked, where `choices` has `prompt`."""
        return with_format(question, self.chosen["prompt"])

    def judging(self, items: Sequence[Item]) -> dict[str, Any]:
        """Who judges the answers to these items and how, for the protocol; {} without a judge."""
        return {}

    def consult(self, rows: Sequence[Row]) -> Iterable[Row]:
        """After all is answered: those of the rows on which a judge has now given its verdicts."""
        return ()

    def judge_summary(self, rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
        """What scores.json says of the judge, and what a reader must be told."""
        return {}, []

    def as_recorded(self, protocol: Mapping[str, Any]) -> Self:
        """The benchmark as a run was scored by it: with the options and the judge it names."""
        return self.with_options(protocol.get("options", {}))

    def prepare(self, items: Sequence[Item]) -> None:  # noqa: B027 - most have nothing to do
        """Before these items are asked: puts on disk what they show and is not there as a file.

        Raises DataError when their prompts cannot be built as the protocol says.
        """

    def knows_prompt(self, item: Item) -> bool:
        """Whether the files at hand are enough to say what is asked."""
        return True

    def category_metrics(self, sums: Sums) -> dict[str, Floats]:
        """The metrics of one slice of the items, each float[...]."""
        return self.metrics(sums)

    def slices(self, item: Item) -> tuple[str, ...]:
        """The names under which `by_category` counts this item."""
        return (item.category,) if item.category else ()

    def truth_text(self, item: Item) -> str:
        """The truth as an answer a model could have given."""
        return str(item.truth)

    def base_answers(self, items: Sequence[Item]) -> dict[str, str]:
        """What the base rate answers to each item: the most frequent truth of its category."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for item in items:
            counts[item.category][self.truth_text(item)] += 1
        # Ties go to the first in the alphabet, so that the base rate never depends on file order.
        best = {
            category: min(count, key=lambda answer: (-count[answer], answer))
            for category, count in counts.items()
        }
        return {item.id: best[item.category] for item in items}

    def match(self, answers: Sequence[Answer], items: Sequence[Item], source: str) -> Matching:
        """Answers of a file to items, by id; the last of several rows with one id counts."""
        known = {item.id for item in items}
        found = {answer.id: answer for answer in answers if answer.id in known}
        strangers = sum(answer.id not in known for answer in answers)
        repeated = len(answers) - strangers - len(found)
        notes = []
        if strangers:
            notes.append(f"{strangers} answers carry an id that {self.title} does not have")
        if repeated:
            notes.append(f"{repeated} ids were answered more than once; the last answer counts")
        return Matching(found, tuple(notes))
