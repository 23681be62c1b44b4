"""Benchmarks whose answers are judged by a language model, in several runs.

The answers lie in predictions.jsonl as for every benchmark; a row also holds the verdicts on it,
with a hash of who gave them on which words. Verdicts of another judge, or on other words, do not
count. Without a judge a rubric compares words, and every score made so says that it is not
comparable.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from pumice.core.errors import DataError, some_of
from pumice.core.llm_types import ChatRequest, Reply
from pumice.core.progress import progress
from pumice.core.types import Prediction
from pumice.eval import rubric
from pumice.eval.benchmark import UNJUDGED, Benchmark, Floats, Item, Row, Sums, mean_of
from pumice.eval.judge import Judge, announce, arrived, while_alive
from pumice.eval.scores import fingerprint
from pumice.eval.verdicts import (
    JUDGED_BY,
    VERDICTS,
    Values,
    Verdict,
    as_plain,
    from_plain,
    read_values,
    verdicts_in,
    write_values,
)

Message = dict[str, Any]
OFFICIAL, OWN = "official", "pumice's own"
"""Where the judge's instruction comes from, beside the hash of one that is neither."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """How the judge is asked; the next attempt follows where the reply cannot be read."""

    temperature: float
    suffix: str = ""


def runs_of(sums: Sums) -> list[str]:
    """The names of the runs; one, whose scores are undefined, where no verdict could be read."""
    return sorted(sums.under("run"), key=int) or ["1"]


class JudgedBenchmark(Benchmark):
    """What LLaVA-Bench and MM-Vet share. `judge` None is the rubric."""

    max_new_tokens = 1024
    paper = True
    choices = {
        "unparsed": ("apart", "official"),
        "instruction": ("found", "official", "own"),
    }
    official_judge: ClassVar[str]
    """The model behind the published scores."""
    usual_runs: ClassVar[int]
    """How often the published scores had each answer judged."""
    judge_tokens: ClassVar[int]
    """The most tokens of a verdict."""
    attempts: ClassVar[tuple[Attempt, ...]]
    official_unread: ClassVar[Values]
    """What the published scorer takes a verdict for that it cannot read."""

    def __init__(self, **chosen: str) -> None:
        """With the rubric; `judged_by` names a judge."""
        super().__init__(**chosen)
        self.judge: Judge | None = None

    @abstractmethod
    def messages(self, item: Item, text: str) -> list[Message]:
        """What a judge is shown of an answer, in OpenAI's form."""

    @abstractmethod
    def instruction(self, item: Item) -> str:
        """Of this, the words that say how to judge."""

    @abstractmethod
    def is_official(self, instruction: str) -> bool:
        """Whether these words are the published ones."""

    @abstractmethod
    def own_instruction(self, item: Item) -> str:
        """The words this house uses where the published ones are not at hand."""

    @abstractmethod
    def read(self, content: str, *, cut: bool) -> Values | None:
        """The numbers in a reply, `cut` at the most tokens; None when its form is another."""

    @abstractmethod
    def by_words(self, item: Item, text: str) -> Values:
        """The rubric's numbers for an answer, in the form of a verdict."""

    @abstractmethod
    def share(self, values: Values) -> float:
        """How good an answer is by these numbers, in 0..1."""

    @abstractmethod
    def run_score(self, sums: Sums, run: str) -> Floats:
        """The headline metric of one run, float[...]; `tally` holds its sums under "run/"."""

    @abstractmethod
    def read_reviews(self, path: Path) -> tuple[str, list[dict[str, Verdict]]]:
        """Published verdicts: the judge's name, if told, and for each run verdicts by item id."""

    def need_official(self, instruction: str | None, file: str) -> None:
        """An error when the published instruction is asked for and this is not it."""
        if self.chosen["instruction"] == OFFICIAL and not self.is_official(instruction or ""):
            raise DataError(
                f"{self.name}: the judge's published instruction is not at hand; it is in {file}. "
                f"Put that file beside the questions, or choose --option {self.name}"
                f".instruction=found (what is there) or own (pumice's)."
            )

    def judged_by(self, judge: Judge | None) -> Self:
        """The same benchmark with this judge; None for the rubric."""
        other = copy.copy(self)
        if judge is not None and judge.runs is None:
            # A local model is asked greedily: more runs would say the same.
            judge = replace(judge, runs=1 if judge.by == "local model" else self.usual_runs)
        other.judge = judge
        return other

    def as_recorded(self, protocol: Mapping[str, Any]) -> Self:
        """With the judge that the protocol names, who is not asked again."""
        found = self.with_options(protocol.get("options", {}))
        told = protocol["judge"]
        if told["by"] == "rubric":
            return found
        return found.judged_by(Judge(told["by"], told["model"], told["runs"]))

    @property
    def row_options(self) -> Mapping[str, str]:
        """None: all choices are the judge's, and no answer depends on them."""
        return {}

    def judging(self, items: Sequence[Item]) -> dict[str, Any]:
        """Who judges, how often, and a hash of all that the judge is shown beside the answers."""
        if self.judge is None:
            return {"by": "rubric", "version": rubric.VERSION, "comparable": self.comparable(items)}
        judge = self.judge
        told: dict[str, Any] = {"by": judge.by, "model": judge.model, "runs": judge.runs}
        if judge.by != "reviews":
            told |= {
                "instruction": self._origin(items),
                "shown": fingerprint([self.messages(item, "") for item in items]),
                "attempts": self._attempts(),
                "max_tokens": self.judge_tokens,
            }
        return {**told, "comparable": self.comparable(items)}

    def comparable(self, items: Sequence[Item]) -> str:
        """What such a score may be compared with: published, same judge, or no other."""
        if self.judge is None or self.judge.by == "local model":
            return "no other"
        official = self.judge.model == self.official_judge and self._origin(items) == OFFICIAL
        return "published" if official and self.judge.by == "endpoint" else "same judge"

    def parse(self, text: str, item: Item) -> str | None:
        """The rubric's numbers; a judge's are in the row's verdicts."""
        return write_values([self.by_words(item, text)])

    def score(self, parsed: str | None, item: Item) -> float:
        """The mean over the runs that could be read, in 0..1."""
        runs = [self.share(values) for values in read_values(parsed) if values is not None]
        return sum(runs) / len(runs) if runs else 0.0

    def prediction(self, item: Item, text: str, extra: Mapping[str, Any]) -> Prediction:
        """As the verdicts in `extra` have it; what they cannot score has no score."""
        if self.judge is None:
            own = {name: value for name, value in extra.items() if name not in verdicts_in(extra)}
            return super().prediction(item, text, own)
        found = Prediction(
            id=item.id, prompt_hash="", text=text, parsed=None, score=None, extra=dict(extra)
        )
        verdicts = from_plain(extra.get(VERDICTS, ()))
        if not verdicts or extra.get(JUDGED_BY) != self.hash_of(item, text):
            found.extra[UNJUDGED] = "the judge was not asked yet"
            return found
        failed = next((verdict.error for verdict in verdicts if verdict.error is not None), None)
        if failed is not None:
            found.extra[UNJUDGED] = failed
            return found
        parsed = write_values([self._counted(verdict) for verdict in verdicts])
        return replace(
            found, parsed=parsed, score=None if parsed is None else self.score(parsed, item)
        )

    def hash_of(self, item: Item, text: str) -> str:
        """Names the judge, all that it is shown of this answer, and how its replies are read."""
        assert self.judge is not None
        judge = self.judge
        shown, reading = self.messages(item, text), self.chosen["unparsed"]
        return fingerprint([judge.by, judge.model, judge.runs, self._attempts(), shown, reading])

    def consult(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Asks the judge about the answers that lack its verdict."""
        if self.judge is None or self.judge.chat is None:
            return
        lacking = [row for row in rows if UNJUDGED in row.prediction.extra]
        verdicts = self._ask(self.judge, lacking) if lacking else {}
        for row in lacking:
            yield self.with_verdicts(row, verdicts[row.item.id])

    def with_verdicts(self, row: Row, verdicts: Sequence[Verdict]) -> Row:
        """The row, scored by these verdicts, one for each run."""
        old = row.prediction
        extra = {name: value for name, value in old.extra.items() if name != UNJUDGED}
        extra |= {JUDGED_BY: self.hash_of(row.item, old.text), VERDICTS: as_plain(verdicts)}
        judged = self.prediction(row.item, old.text, extra)
        return Row(row.item, replace(judged, prompt_hash=old.prompt_hash))

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """The headline metric: the mean over runs, float[...]."""
        return {self.headline: mean_of([self.run_score(sums, run) for run in runs_of(sums)])}

    def tally(self, row: Row) -> dict[str, float]:
        """Per run: how many verdicts, and the sum of each of their numbers."""
        sums: dict[str, float] = {}
        for run, values in enumerate(read_values(row.prediction.parsed), start=1):
            if values is not None:
                sums[f"run/{run}"] = 1.0
                sums |= {f"value{place}/{run}": value for place, value in enumerate(values)}
        return sums

    def base_answers(self, items: Sequence[Item]) -> dict[str, str]:
        """The usual answer by the rubric; none where a judge would have to be asked about it."""
        return super().base_answers(items) if self.judge is None else {}

    def judge_summary(self, rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
        """The judge, its runs one by one with their spread, and how many verdicts were none."""
        items = [row.item for row in rows]
        told: dict[str, Any] = {"name": self._name(), "comparable": self.comparable(items)}
        notes = [self._caution(items)]
        if self.judge is not None:
            given = [v for row in rows for v in from_plain(row.prediction.extra.get(VERDICTS, ()))]
            unread = sum(verdict.values is None and verdict.error is None for verdict in given)
            failed = sum(verdict.error is not None for verdict in given)
            others = Counter(verdict.model for verdict in given if verdict.model)
            runs = [run for run in self._run_scores(rows) if not np.isnan(run)]
            told |= {"runs": self.judge.runs, "verdicts": len(given), "unparsed": unread,
                     "failed": failed, "by_run": [round(run, 2) for run in runs],
                     "spread": round(float(np.std(runs)), 2) if runs else None}  # fmt: skip
            if unread:
                notes.append(f"{unread} of {len(given)} verdicts cannot be read; {self._fate()}")
            if others:
                told["answered_as"] = dict(others.most_common())
                if told["comparable"] == "published":
                    told["comparable"] = "same judge"
                notes.append(
                    f"{self.judge.model} was asked for, and the endpoint says that "
                    f"{others.total()} of {len(given)} verdicts are by {some_of(list(others))}"
                )
        return told, [note for note in notes if note]

    def _ask(self, judge: Judge, rows: Sequence[Row]) -> dict[str, list[Verdict]]:
        """The judge's verdicts on these answers, for each run."""
        assert judge.chat is not None and judge.runs is not None
        found = {row.item.id: [Verdict()] * judge.runs for row in rows}
        waiting = [(row, run) for row in rows for run in range(judge.runs)]
        for place, attempt in enumerate(self.attempts):
            requests = [self._request(judge.model, row, run, attempt) for row, run in waiting]
            if place == 0:
                announce(judge, self.name, requests)
            unread = []
            with progress(len(requests), f"{self.name}, judging") as bar:
                replies = while_alive(judge.chat.ask_all(requests), len(requests))
                for (row, run), reply in zip(waiting, replies, strict=True):
                    verdict = self._verdict(judge, reply)
                    found[row.item.id][run] = verdict
                    if verdict.values is None and verdict.error is None:
                        unread.append((row, run))
                    bar.update(1)
            waiting = unread
            if not waiting:
                break
        return found

    def _attempts(self) -> list[list[Any]]:
        return [[attempt.temperature, attempt.suffix] for attempt in self.attempts]

    def _request(self, model: str, row: Row, run: int, attempt: Attempt) -> ChatRequest:
        messages = self.messages(row.item, row.prediction.text)
        messages[-1]["content"] += attempt.suffix
        return ChatRequest(
            model=model,
            messages=tuple(messages),
            max_tokens=self.judge_tokens,
            temperature=attempt.temperature,
            draw=run,
        )

    def _verdict(self, judge: Judge, reply: Reply) -> Verdict:
        if not arrived(reply):
            assert reply.failure is not None
            return Verdict(error=f"{reply.failure.kind}: {reply.failure.reason}")
        values = self.read(reply.text, cut=reply.finish_reason == "length")
        other = reply.model if reply.model != judge.model else ""
        return Verdict(reply.text, values, model=other)

    def _counted(self, verdict: Verdict) -> Values | None:
        if verdict.values is None and self.chosen["unparsed"] == "official":
            return self.official_unread
        return verdict.values

    def _run_scores(self, rows: Sequence[Row]) -> list[float]:
        totals: dict[str, float] = defaultdict(float)
        for row in rows:
            for key, value in self.tally(row).items():
                totals[key] += value
        sums = Sums(list(totals), np.array(list(totals.values())))
        return [float(self.run_score(sums, run)) for run in runs_of(sums)]

    def _origin(self, items: Sequence[Item]) -> str:
        """Whose words say how to judge: "official", "pumice's own", or the hash of others."""
        words = {self.instruction(item) for item in items}
        if all(map(self.is_official, words)):
            return OFFICIAL
        if words == {self.own_instruction(item) for item in items}:
            return OWN
        return fingerprint(sorted(words))

    def _name(self) -> str:
        if self.judge is None:
            return "rubric"
        runs = "" if self.judge.runs == 1 else f", {self.judge.runs} runs"
        return f"judge {self.judge.model or 'not named'}{runs}"

    def _caution(self, items: Sequence[Item]) -> str:
        """What a reader must know before putting the score beside another one; "" for nothing."""
        comparable = self.comparable(items)
        if self.judge is None:
            return (
                "NOT COMPARABLE: scored by the words of the answers, without a judge. Compare only "
                "with this rubric's scores; --judge URL or --judge DIR asks a judge"
            )
        if comparable == "no other":
            return (
                f"NOT COMPARABLE with published scores: judged by the local model "
                f"{self.judge.model}; compare only with scores by the same judge"
            )
        if comparable == "published":
            return ""
        words = "the verdicts were read from a file"
        if self.judge.by == "endpoint":
            words = f"the judge's instruction is {self._origin(items)}"
        return (
            f"judged by {self.judge.model or 'a judge that is not named'}, {words}; the published "
            f"scores are {self.official_judge}'s: compare only with scores by the same judge"
        )

    def _fate(self) -> str:
        if self.chosen["unparsed"] == "apart":
            return "they are left out of the score"
        told = " ".join(f"{value:g}" for value in self.official_unread)
        return f"they count as {told}, as in the official code"
