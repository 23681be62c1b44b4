"""LLaVA-Bench (In-the-Wild): open questions about 24 images, answers judged beside GPT-4's.

Official files: questions.jsonl, context.jsonl, answers_gpt4.jsonl, images/001.jpg; and rule.json of
LLaVA's code, which tells the judge what to do. Published reviews are JSONL rows with "question_id",
"content" and "tuple", a file for each run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pumice.core.errors import DataError
from pumice.core.files import read_json, read_jsonl, sha256_bytes
from pumice.eval.benchmark import Floats, Item, Sums, mean_of, percent, ratio
from pumice.eval.judged_benchmark import Attempt, JudgedBenchmark, Message, runs_of
from pumice.eval.locate import (
    ImageFinder,
    find_file,
    find_file_if_any,
    in_folders,
    require,
    texts_in,
)
from pumice.eval.rubric import overlap
from pumice.eval.verdicts import Values, Verdict

FOLDERS = ("llava_wild", "llava-bench-in-the-wild", "llava_bench_in_the_wild")
CATEGORIES = ("conv", "detail", "complex")
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
ROLE = "Assistant"
OWN_RULE = (
    "Two assistants answered a question about an image that you do not see; the sentences under "
    "[Context] say what it shows. Rate how helpful, relevant, accurate and detailed each answer "
    "is, from 1 (worst) to 10 (best). Which answer stands first must not matter. Write both scores "
    "on the first line, that of Assistant 1 first, with one space between them and nothing else. "
    "Explain them on the lines below."
)
# SHA-256 of the rule of all three categories in LLaVA's rule.json.
_OFFICIAL_RULE = "2ce22b562d6008864970ea863ac8a4d385ea6f2e64ab1313a23f825202a9529d"
_MOST = 10.0


class LlavaWild(JudgedBenchmark):
    """The judge's mean score of the answers, in percent of its mean score of GPT-4's answers."""

    name = "llava_wild"
    title = "LLaVA-Bench"
    headline = "relative"
    official_judge = "gpt-4-0314"
    usual_runs = 3
    judge_tokens = 1024
    attempts = (Attempt(0.2),)
    official_unread = (-1.0, -1.0)

    def load(self, data_dir: Path) -> list[Item]:
        """One item per question; `truth` is GPT-4's answer."""
        file = _find(data_dir, "questions.jsonl", "question.jsonl")
        contexts = _contexts(_find(data_dir, "context.jsonl"))
        references = _references(_find(data_dir, "answers_gpt4.jsonl"))
        rules = self._rules(data_dir)
        find_image = ImageFinder(file.parent, self.name)
        items = []
        for number, row in read_jsonl(file):
            where = f"{file}, line {number}"
            names = ("question_id", "image", "category", "text")
            require(row, names, where, texts=names[1:], ids=names[:1])
            name, category = str(row["question_id"]), row["category"]
            if category not in CATEGORIES:
                raise DataError(
                    f"{where}: the category is {category!r}; LLaVA-Bench has "
                    f"{', '.join(CATEGORIES)}. Take the official file."
                )
            for kind, known, key in (
                ("context.jsonl holds no caption of", contexts, row["image"]),
                ("answers_gpt4.jsonl holds no answer to", references, name),
            ):
                if key not in known:
                    raise DataError(f"{where}: {kind} {key!r}. Take all files of one release.")
            items.append(
                Item(
                    id=name,
                    image=find_image(row["image"]),
                    prompt=row["text"],
                    truth=references[name],
                    group=row["image"],
                    category=category,
                    extra={"context": contexts[row["image"]], **rules[category]},
                )
            )
        return items

    def messages(self, item: Item, text: str) -> list[Message]:
        """What the judge is shown: context, question, both answers, the rule."""
        role = item.extra["role"]
        shown = (
            f"[Context]\n{item.extra['context']}\n\n[Question]\n{item.prompt}\n\n"
            f"[{role} 1]\n{item.truth}\n\n[End of {role} 1]\n\n"
            f"[{role} 2]\n{text}\n\n[End of {role} 2]\n\n"
            f"[System]\n{item.extra['rule']}\n\n"
        )
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": shown}]

    def instruction(self, item: Item) -> str:
        """The rule of the item's category."""
        return str(item.extra["rule"])

    def is_official(self, instruction: str) -> bool:
        """Whether this is the rule in LLaVA's code."""
        return sha256_bytes(instruction.encode()) == _OFFICIAL_RULE

    def own_instruction(self, item: Item) -> str:
        """The rule of this house, the same for all categories."""
        return OWN_RULE

    def read(self, content: str, *, cut: bool) -> Values | None:
        """The scores of reference and answer: the first line holds exactly two numbers.

        Split at single spaces, as LLaVA's code does. Beyond that code, numbers outside 0 to 10 and
        a first line that was cut are no scores.
        """
        line, ended, _ = content.partition("\n")
        words = line.replace(",", " ").split(" ")
        try:
            values = tuple(map(float, words))
        except ValueError:
            return None
        if self.chosen["unparsed"] == "official":
            return values if len(values) == 2 else None
        return values if self._sound(values) and (ended or not cut) else None

    def _sound(self, values: Values) -> bool:
        official = self.chosen["unparsed"] == "official"
        return len(values) == 2 and (official or all(0 <= value <= _MOST for value in values))

    def by_words(self, item: Item, text: str) -> Values:
        """Full marks for the reference, and for the answer by the words they share."""
        return _MOST, round(_MOST * overlap(text, item.truth), 1)

    def share(self, values: Values) -> float:
        """The answer's score as a part of ten."""
        return min(max(values[1] / _MOST, 0.0), 1.0)

    def run_score(self, sums: Sums, run: str) -> Floats:
        """The ratio of the means in percent, rounded where LLaVA's code rounds, float[...]."""
        reference, model = (_mean(sums, place, run) for place in (0, 1))
        return np.round(percent(np.round(model, 3), np.round(reference, 3)), 1)

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """The relative score, and the mean scores of both sides times ten; each float[...]."""
        means = {
            side: _MOST * mean_of([_mean(sums, place, run) for run in runs_of(sums)])
            for place, side in ((1, "model"), (0, "reference"))
        }
        return super().metrics(sums) | means

    def read_reviews(self, path: Path) -> tuple[str, list[dict[str, Verdict]]]:
        """One run: the reviews that LLaVA's code wrote; (-1, -1) is a review it could not read."""
        found: dict[str, Verdict] = {}
        for number, row in read_jsonl(path):
            require(row, ("question_id", "content", "tuple"), f"{path}, line {number}")
            content, values = str(row["content"]), tuple(map(float, row["tuple"]))
            unread = values == self.official_unread or not self._sound(values)
            found[str(row["question_id"])] = Verdict(content, None if unread else values)
        return "", [found]

    def protocol(self) -> dict[str, Any]:
        """Prompt, judge's form and metric as in LLaVA-1.5."""
        return {
            "prompt": "{text}",
            "parser": "two numbers on the first line of a review",
            "metric": "mean score in percent of the reference's, mean over runs",
        }

    def _rules(self, data_dir: Path) -> Mapping[str, dict[str, str]]:
        """For each category who answers and the rule."""
        own = {category: {"role": ROLE, "rule": OWN_RULE} for category in CATEGORIES}
        if self.chosen["instruction"] == "own":
            return own
        file = find_file_if_any(data_dir, self.name, in_folders(FOLDERS, "rule.json"))
        if file is None:
            self.need_official(None, "rule.json of LLaVA's code (llava/eval/table)")
            return own
        content = read_json(file)
        names = [f"llava_bench_{category}" for category in CATEGORIES]
        require(content, names, str(file))
        for name in names:
            words = ("role", "prompt")
            require(content[name], words, f"{file}, {name}", texts=words)
        rules = {
            category: {"role": content[name]["role"], "rule": content[name]["prompt"]}
            for category, name in zip(CATEGORIES, names, strict=True)
        }
        for rule in rules.values():
            self.need_official(rule["rule"], f"rule.json of LLaVA's code, given {file}")
        return rules


def _find(data_dir: Path, *names: str) -> Path:
    return find_file(data_dir, LlavaWild.name, in_folders(FOLDERS, *names))


def _contexts(file: Path) -> dict[str, str]:
    """What the judge is told about each image."""
    found = {}
    for number, row in read_jsonl(file):
        where, caption = f"{file}, line {number}", row.get("caption")
        require(row, ("image", "caption"), where, texts=("image",))
        lines = caption if isinstance(caption, list) else [caption]
        found[row["image"]] = "\n".join(texts_in(lines, "its captions", where))
    return found


def _references(file: Path) -> dict[str, str]:
    found = {}
    for number, row in read_jsonl(file):
        names = ("question_id", "text")
        require(row, names, f"{file}, line {number}", texts=("text",), ids=("question_id",))
        found[str(row["question_id"])] = row["text"]
    return found


def _mean(sums: Sums, place: int, run: str) -> Floats:
    return ratio(sums[f"value{place}/{run}"], sums[f"run/{run}"])
