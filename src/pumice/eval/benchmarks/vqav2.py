"""VQAv2: short open answers, scored with the official VQA accuracy against ten annotators.

Official files: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json
from pumice.eval.answers import prepare, vqa_accuracy
from pumice.eval.benchmark import Benchmark, Floats, Item, Row, Sums, mean_of, percent, ratio
from pumice.eval.locate import ImageFinder, find_file, require
from pumice.processing.response_formats import SHORT, with_format

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


class VQAv2(Benchmark):
    """Accuracy overall, per question type and per answer type, as the official scorer rounds it."""

    name = "vqav2"
    title = "VQAv2"
    headline = "accuracy"
    decimals = 2
    missing_is_wrong = True

    def load(self, data_dir: Path) -> list[Item]:
        """One item per question; `truth` is the list of the annotators' answers."""
        questions_file = find_file(data_dir, self.name, [QUESTIONS])
        annotations_file = find_file(data_dir, self.name, [ANNOTATIONS])
        questions, answers = read_json(questions_file), read_json(annotations_file)
        require(questions, ("questions",), str(questions_file))
        require(answers, ("annotations",), str(annotations_file))
        annotations = {row["question_id"]: row for row in answers["annotations"]}
        subtype = questions.get("data_subtype", "val2014")
        find_image = ImageFinder(data_dir, self.name)
        items = []
        for index, question in enumerate(questions["questions"]):
            where = f"{questions_file}, question {index}"
            require(question, ("question_id", "image_id", "question"), where)
            annotation = annotations.get(question["question_id"])
            if annotation is None or not annotation.get("answers"):
                raise DataError(
                    f"vqav2: question {question['question_id']} of {questions_file} has no answers "
                    f"in {annotations_file}; each question needs its annotators' answers. Take "
                    f"both files from the same release and split."
                )
            items.append(_item(question, annotation, subtype, find_image))
        return items

    def parse(self, text: str, item: Item) -> str | None:
        """The answer as the official scorer compares it; None when nothing was said."""
        return prepare(text, item.truth) or None

    def score(self, parsed: str | None, item: Item) -> float:
        """The official VQA accuracy in 0..1."""
        return vqa_accuracy(parsed or "", item.truth)

    def tally(self, row: Row) -> dict[str, float]:
        """Score, count and answer length, the first two also for the question type."""
        score, kind = row.prediction.score or 0.0, row.item.category
        words = float(len(row.prediction.text.split()))
        return {"n": 1.0, "score": score, "words": words, f"n/{kind}": 1.0, f"score/{kind}": score}

    def metrics(self, sums: Sums) -> dict[str, Floats]:
        """Overall accuracy, its mean over question types, words per answer; each float[...]."""
        kinds = [percent(sums[f"score/{kind}"], sums[f"n/{kind}"]) for kind in sums.under("n")]
        return {
            "accuracy": percent(sums["score"], sums["n"]),
            "mean_over_question_types": mean_of(kinds),
            "answer_words": ratio(sums["words"], sums["n"]),
        }

    def category_metrics(self, sums: Sums) -> dict[str, Floats]:
        """Accuracy and words per answer, each float[...]."""
        whole = self.metrics(sums)
        return {name: whole[name] for name in ("accuracy", "answer_words")}

    def slices(self, item: Item) -> tuple[str, ...]:
        """The question type, and the answer type as "answer_type=..."."""
        return (item.category, f"answer_type={item.extra['answer_type']}")

    def truth_text(self, item: Item) -> str:
        """The annotators' most frequent answer, which the annotations name."""
        return str(item.extra["most_frequent"])

    def protocol(self) -> dict[str, Any]:
        """Prompt, parser and metric; the split is val2014."""
        return {
            "prompt": f"{{question}}\n{SHORT}",
            "parser": "official VQA scorer of 2021-03-11 (normalises unless unanimous)",
            "metric": "VQA accuracy, each annotator left out in turn, percent",
        }


def _item(
    question: dict[str, Any], annotation: dict[str, Any], subtype: str, find_image: ImageFinder
) -> Item:
    file = f"COCO_{subtype}_{question['image_id']:012d}.jpg"
    truths = [answer["answer"] for answer in annotation["answers"]]
    return Item(
        id=str(question["question_id"]),
        image=find_image(file),
        prompt=with_format(question["question"], "short"),
        truth=truths,
        group=str(question["image_id"]),
        category=annotation.get("question_type", ""),
        extra={
            "answer_type": annotation.get("answer_type", ""),
            "most_frequent": annotation.get("multiple_choice_answer")
            or Counter(truths).most_common(1)[0][0],
        },
    )
