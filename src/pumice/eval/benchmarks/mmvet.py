"""MM-Vet: open questions that need several capabilities at once, answers graded by GPT-4.

Official files: mm-vet.json, images/v1_0.png; and mm-vet_evaluator.py or .ipynb of its code, which
holds the table of examples that the judge continues. Published grades are one JSON object: by id
{"model": [...], "content": [...], "score": [...]}, an entry for each run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json, sha256_bytes
from pumice.eval.benchmark import Answer, Floats, Item, Matching, Sums, percent
from pumice.eval.judged_benchmark import Attempt, JudgedBenchmark, Message
from pumice.eval.locate import (
    ImageFinder,
    find_file,
    find_file_if_any,
    in_folders,
    require,
    texts_in,
)
from pumice.eval.rubric import AND, OR, keyword_share, plain_truth
from pumice.eval.verdicts import Values, Verdict

FOLDERS = ("mmvet", "mm-vet", "mm_vet")
EVALUATORS = ("mm-vet_evaluator.py", "mm-vet_evaluator.ipynb")
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
SUFFIX = "\nPredict the correctness of the answer (digit): "
OWN_TABLE = """\
Every row of this table holds a question about an image, its ground truth, what a model \
predicted, and how correct the prediction is, as a number: 0.0 (all wrong), 0.1, 0.2 and so on up \
to 1.0 (all right). Parts of a ground truth joined by <AND> are all needed; of those joined by \
<OR> one is enough. Complete the last row with its number, and write nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
How many birds are there? | 3 | There are four birds on the wire. | 0.0
Which fruits lie on the table? | an apple <AND> a pear | An apple lies on the table. | 0.5
What does the sign say? | stop <OR> halt | The sign says "halt". | 1.0
What is going on? | A man washes his red car in the rain. | A man stands beside a car. | 0.3
"""
# SHA-256 of the table in MM-Vet's own evaluator.
_OFFICIAL_TABLE = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"
_TABLE = re.compile(r'^prompt = """(.*?)"""', re.DOTALL | re.MULTILINE)
_GRADE = re.compile(r"\d+(\.\d+)?")


class MMVet(JudgedBenchmark):
    """The mean grade in percent; also of each capability and of each set that questions need."""

    name = "mmvet"
    title = "MM-Vet"
    headline = "total"
    official_judge = "gpt-4-0613"
    usual_runs = 5
    judge_tokens = 3
    # The published code asks six times, and never looks at the last reply.
    attempts = (
        Attempt(0.0),
        *(Attempt(temperature, SUFFIX) for temperature in (0.0, 0.5, 1.0, 1.5)),
    )
    official_unread = (0.0,)

    def load(self, data_dir: Path) -> list[Item]:
        """One item per question; `truth` is the answer with its <AND> and <OR>."""
        file = find_file(data_dir, self.name, in_folders(FOLDERS, "mm-vet.json"))
        content = read_json(file)
        table = self._table(data_dir)
        find_image = ImageFinder(file.parent, self.name)
        if not isinstance(content, dict):
            raise DataError(f"{file}: an object of questions by id is needed. Take MM-Vet's file.")
        items = []
        for name, row in content.items():
            where = f"{file}, {name}"
            names = ("imagename", "question", "answer", "capability")
            require(row, names, where, texts=names[:3])
            unknown = sorted(set(texts_in(row["capability"], "its capabilities", where)))
            unknown = [capability for capability in unknown if capability not in CAPABILITIES]
            if unknown or not row["capability"]:
                raise DataError(
                    f"{where}: the capabilities are {row['capability']}; MM-Vet has "
                    f"{', '.join(CAPABILITIES)}. Take the official file."
                )
            items.append(
                Item(
                    id=name,
                    image=find_image(row["imagename"]),
                    prompt=row["question"],
                    truth=row["answer"],
                    group=row["imagename"],
                    category=_integration(row["capability"]),
                    extra={"capabilities": tuple(row["capability"]), "table": table},
                )
            )
        return items

    def match(self, answers: Sequence[Answer], items: Sequence[Item], source: str) -> Matching:
        """By id; LLaVA's rows carry the number of "v1_0" alone."""
        known = {item.id for item in items}
        named = [
            replace(answer, id=f"v1_{answer.id}")
            if answer.id not in known and f"v1_{answer.id}" in known
            else answer
            for answer in answers
        ]
        return super().match(named, items, source)

    def messages(self, item: Item, text: str) -> list[Message]:
        """The table with this answer as the row to be completed."""
        truth = item.truth.replace(AND, f" {AND} ").replace(OR, f" {OR} ")
        row = " | ".join([item.prompt, truth, text, ""])
        return [{"role": "user", "content": f"{item.extra['table']}\n{row}"}]

    def instruction(self, item: Item) -> str:
        """The table of examples."""
        return str(item.extra["table"])

    def is_official(self, instruction: str) -> bool:
        """Whether this is the table of MM-Vet's evaluator."""
        return sha256_bytes(instruction.encode()) == _OFFICIAL_TABLE

    def own_instruction(self, item: Item) -> str:
        """The table of this house."""
        return OWN_TABLE

    def read(self, content: str, *, cut: bool) -> Values | None:
        """The grade: what stands before the first space is a number from 0 to 1.

        Beyond MM-Vet's code, it must be written with digits: "0." (cut after the point), "nan" and
        "1e-1" are no grades.
        """
        word = content.split(" ")[0].strip()
        official = self.chosen["unparsed"] == "official"
        if not official and not _GRADE.fullmatch(word):
            return None
        try:
            grade = float(word)
        except ValueError:
            return None
        # As the published code compares: nan is not above 1 and not below 0.
        return None if grade > 1.0 or grade < 0.0 else (grade,)

    def by_words(self, item: Item, text: str) -> Values:
        """How much of what the truth asks for is said."""
        return (round(keyword_share(text, item.truth), 2),)

    def share(self, values: Values) -> float:
        """The grade."""
        return values[0]

    def run_score(self, sums: Sums, run: str) -> Floats:
        """The mean grade in percent, float[...]."""
        return percent(sums[f"value0/{run}"], sums[f"run/{run}"])

    def slices(self, item: Item) -> tuple[str, ...]:
        """Each capability of the question, and the set of them (MM-Vet's integration)."""
        return (*item.extra["capabilities"], item.category)

    def truth_text(self, item: Item) -> str:
        """An answer with all that the truth asks for."""
        return plain_truth(item.truth)

    def read_reviews(self, path: Path) -> tuple[str, list[dict[str, Verdict]]]:
        """The runs in a grade file of MM-Vet's evaluator."""
        content = read_json(path)
        if not isinstance(content, dict) or not content:
            raise DataError(f"{path}: an object of grades by id is needed. Take MM-Vet's file.")
        models: set[str] = set()
        runs: list[dict[str, Verdict]] = []
        for name, row in content.items():
            require(row, ("model", "content", "score"), f"{path}, {name}")
            models |= set(row["model"])
            for run, (said, score) in enumerate(zip(row["content"], row["score"], strict=True)):
                if run == len(runs):
                    runs.append({})
                values = self.read(str(said), cut=False)
                # After its last attempt the published code gives 0, whatever was said.
                runs[run][name] = Verdict(str(said), values if values == (score,) else None)
        return ", ".join(sorted(models)), runs

    def protocol(self) -> dict[str, Any]:
        """Prompt, judge's form and metric as in MM-Vet's paper."""
        return {
            "prompt": "{question}",
            "parser": "a number from 0 to 1 before the first space of a reply",
            "metric": "mean grade in percent, mean over runs",
        }

    def _table(self, data_dir: Path) -> str:
        if self.chosen["instruction"] == "own":
            return OWN_TABLE
        file = find_file_if_any(data_dir, self.name, in_folders(FOLDERS, *EVALUATORS))
        if file is None:
            self.need_official(None, " or ".join(EVALUATORS))
            return OWN_TABLE
        found = _TABLE.search(_code(file))
        if found is None:
            raise DataError(
                f"{file}: there is no prompt in it. Take the evaluator of MM-Vet's repository, or "
                f"choose --option mmvet.instruction=own."
            )
        self.need_official(found[1], f"MM-Vet's evaluator, given {file}")
        return found[1]


def _code(file: Path) -> str:
    """The Python code of a file or of a notebook's cells."""
    if file.suffix != ".ipynb":
        return file.read_text(encoding="utf-8")
    cells = read_json(file).get("cells", [])
    return "\n".join("".join(c["source"]) for c in cells if c.get("cell_type") == "code")


def _integration(capabilities: Sequence[str]) -> str:
    """The name of a set of capabilities, told apart from the capability alone."""
    present = [name for name in CAPABILITIES if name in capabilities]
    return "+".join(present) if len(present) > 1 else f"only {present[0]}"
