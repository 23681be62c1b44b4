"""TextVQA (val): questions about text in the image, asked with what an OCR system read there.

Official files: TextVQA_0.5.1_val.json; train_images/<image_id>.jpg. The OCR tokens are not in it:
they come from LLaVA's llava_textvqa_val_v051_ocr.jsonl or TextVQA_Rosetta_OCR_v0.2_val.json.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json, read_jsonl
from pumice.eval.answers import prepare, vqa_accuracy
from pumice.eval.benchmark import Answer, Benchmark, Floats, Item, Matching, Row, Sums, percent
from pumice.eval.locate import ImageFinder, find_file, find_file_if_any, require, texts_in
from pumice.processing.response_formats import OCR_TOKENS, SHORT, with_format

FILE = "TextVQA_0.5.1_val.json"
LLAVA_OCR = "llava_textvqa_val_v051_ocr.jsonl"
ROSETTA_OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"
RULE = "m4c"
_ANNOTATORS = 10
_SHORT_ANSWER = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
Key = tuple[str, str]


class TextVQA(Benchmark):
    """VQA accuracy by M4C's evaluator."""

    name = "textvqa"
    title = "TextVQA"
    headline = "accuracy"
    paper = True
    decimals = 2
    choices = {"ocr": ("given", "none")}

    @property
    def as_published(self) -> bool:
        """Without OCR tokens the prompt is another one than the paper's."""
        return self.chosen["ocr"] == "given"

    def load(self, data_dir: Path) -> list[Item]:
        """One item per question; `truth` is the list of the ten answers."""
        file = find_file(data_dir, self.name, [FILE])
        content = read_json(file)
        require(content, ("data",), str(file))
        tokens = _ocr_tokens(data_dir) if self.chosen["ocr"] == "given" else None
        find_image = ImageFinder(data_dir, self.name)
        items = []
        for index, row in enumerate(content["data"]):
            where = f"{file}, question {index}"
            names = ("question_id", "image_id", "question", "answers")
            require(row, names, where, texts=("image_id", "question"), ids=("question_id",))
            if len(texts_in(row["answers"], "its answers", where)) != _ANNOTATORS:
                raise DataError(
                    f"{where}: it has {len(row['answers'])} answers, {_ANNOTATORS} are needed. "
                    f"Take the official file."
                )
            items.append(_item(row, tokens, find_image))
        return items

    def prepare(self, items: Sequence[Item]) -> None:
        """An error when an item's OCR tokens are not known: the prompt would be another one."""
        bare = [item for item in items if self.chosen["ocr"] == "given" and not item.extra["ocr"]]
        if bare:
            raise DataError(
                f"textvqa: {len(bare)} of {len(items)} questions have no OCR tokens, which "
                f"LLaVA-1.5's prompts hold (7B: 58.2 with them, about 46 without). Put {LLAVA_OCR} "
                f"or {ROSETTA_OCR} beside {FILE}, or ask without them: --option textvqa.ocr=none"
            )

    def knows_prompt(self, item: Item) -> bool:
        """Not without the OCR tokens, which scoring can do without."""
        return self.chosen["ocr"] == "none" or item.extra["ocr"]

    def match(self, answers: Sequence[Answer], items: Sequence[Item], source: str) -> Matching:
        """By question id, or as LLaVA's scorer does by image and the question in the prompt."""
        known = {item.id for item in items}
        places: dict[Key, list[str]] = defaultdict(list)
        for item in items:
            places[item.extra["key"]].append(item.id)
        asked: Counter[Key] = Counter()
        named = []
        for answer in answers:
            key = (answer.id, question_in(answer.prompt or ""))
            if answer.id not in known and key in places:
                same = places[key]
                answer = replace(answer, id=same[asked[key] % len(same)])
                asked[key] += 1
            named.append(answer)
        matching = super().match(named, items, source)
        note = self._asked_otherwise(list(matching.answers.values()))
        return replace(matching, notes=(*matching.notes, *note))

    def _asked_otherwise(self, answers: Sequence[Answer]) -> list[str]:
        """A note where prompts show that OCR tokens were given and should not be, or otherwise.

        LLaVA's scorer takes both, so the answers are scored; a prompt that is not whole tells
        nothing.
        """
        given = self.chosen["ocr"] == "given"
        whole = [answer.prompt for answer in answers if answer.prompt and SHORT in answer.prompt]
        other = sum((OCR_TOKENS.strip() in prompt) != given for prompt in whole)
        if not other:
            return []
        told, choice = ("without", "none") if given else ("with", "given")
        return [
            f"{other} of {len(answers)} answers were asked {told} OCR tokens, as their prompts "
            f"show, which is another task; it is scored under its name with --option "
            f"textvqa.ocr={choice}"
        ]

    def parse(self, text: str, item: Item) -> str | None:
        """The answer as M4C's processor leaves it; None when nothing was said."""
        return prepare(text, item.truth, RULE) or None

    def score(self, parsed: str | None, item: Item) -> float:
        """The VQA accuracy in 0..1."""
        return vqa_accuracy(parsed or "", item.truth, RULE)

    def tally(self, row: Row) -> dict[str, float]:
        """Score and count."""
        return {"n": 1.0, "score": row.prediction.score or 0.0}

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """The accuracy, float[...]."""
        return {"accuracy": percent(sums["score"], sums["n"])}

    def truth_text(self, item: Item) -> str:
        """The most frequent answer."""
        return str(Counter(item.truth).most_common(1)[0][0])

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric as LLaVA-1.5 uses them."""
        ocr = f"{OCR_TOKENS}{{tokens}}\n" if self.chosen["ocr"] == "given" else ""
        return {
            "prompt": f"{{question.capitalize()}}\n{ocr}{SHORT}",
            "parser": "M4C's processor",
            "metric": "VQA accuracy, each annotator left out in turn, percent",
        }


def question_in(prompt: str) -> str:
    """The question of a recorded prompt, in small letters; "" when its form is unknown."""
    lines = prompt.replace("<image>\n", "").split("\n")
    if prompt.startswith("OCR tokens: "):
        found = _SHORT_ANSWER.search(prompt)
        return found.group(1).lower() if found else ""
    if len(lines) == 3 and OCR_TOKENS.strip() in prompt:
        return lines[1 if lines[0].startswith(OCR_TOKENS.strip()) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else ""


def _ocr_tokens(data_dir: Path) -> dict[Key, str]:
    """What stands behind "Reference OCR token: ", by image and question ("" for any question)."""
    file = find_file_if_any(data_dir, "textvqa", [LLAVA_OCR, ROSETTA_OCR])
    if file is None:
        return {}
    if file.name == ROSETTA_OCR:
        rows = read_json(file)["data"]
        return {(row["image_id"], ""): ", ".join(row["ocr_tokens"]) for row in rows}
    found = {}
    for number, row in read_jsonl(file):
        names = ("question_id", "text")
        require(row, names, f"{file}, line {number}", texts=names)
        lines = row["text"].split("\n")
        if len(lines) != 3 or not lines[1].startswith(OCR_TOKENS):
            raise DataError(f"{file}, line {number}: no line {OCR_TOKENS!r}. Take LLaVA's file.")
        found[row["question_id"], lines[0].lower()] = lines[1].removeprefix(OCR_TOKENS)
    return found


def _item(row: dict[str, Any], tokens: dict[Key, str] | None, find_image: ImageFinder) -> Item:
    key = (row["image_id"], row["question"].lower())
    known = None if tokens is None else tokens.get(key, tokens.get((row["image_id"], "")))
    # capitalize() also makes every other letter small; the published questions are so.
    question = row["question"].capitalize()
    prompt = question if known is None else f"{question}\n{OCR_TOKENS}{known}"
    image = f"{row['image_id']}.jpg"
    return Item(
        id=str(row["question_id"]),
        image=find_image(image, f"train_images/{image}"),
        prompt=with_format(prompt, "short"),
        truth=row["answers"],
        group=row["image_id"],
        extra={"key": key, "ocr": known is not None},
    )
