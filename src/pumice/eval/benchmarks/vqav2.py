"""VQAv2: short open answers, scored with the official VQA accuracy against ten annotators.

Official files: v2_OpenEnded_mscoco_{val2014,test-dev2015,test2015}_questions.json and
v2_mscoco_val2014_annotations.json; for the test splits also LLaVA's
llava_vqav2_mscoco_{test-dev2015,test2015}.jsonl.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import read_json
from pumice.eval.answers import normalise_m4c, prepare, vqa_accuracy
from pumice.eval.benchmark import (
    PROMPTS,
    Benchmark,
    Floats,
    Item,
    Row,
    Sums,
    mean_of,
    percent,
    ratio,
)
from pumice.eval.locate import ImageFinder, find_file, require, texts_in
from pumice.eval.question_files import read_questions

QUESTIONS = "v2_OpenEnded_mscoco_{split}_questions.json"
LLAVA_QUESTIONS = "llava_vqav2_mscoco_{split}.jsonl"
_NEEDED = ("question_id", "image_id", "question")
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


class VQAv2(Benchmark):
    """Accuracy overall, per question type and per answer type, as the official scorer rounds it."""

    name = "vqav2"
    title = "VQAv2"
    headline = "accuracy"
    paper = True
    decimals = 2
    missing_is_wrong = True
    choices = {
        "scorer": ("2021", "before-2021", "always"),
        # "uploaded": first through M4C's processor, as LLaVA does before it uploads.
        "answers": ("as-given", "uploaded"),
        "split": ("val2014", "test-dev2015", "test2015"),
        "prompt": PROMPTS,
    }

    @property
    def judged(self) -> bool:
        """Only val2014 has public answers."""
        return self.chosen["split"] == "val2014"

    def load(self, data_dir: Path) -> list[Item]:
        """One item per question; `truth` is the list of the annotators' answers (test: None)."""
        split = self.chosen["split"]
        names = [QUESTIONS.format(split=split), LLAVA_QUESTIONS.format(split=split)]
        questions_file = find_file(data_dir, self.name, names if not self.judged else names[:1])
        find_image = ImageFinder(data_dir, self.name)
        if questions_file.suffix == ".jsonl":
            return read_questions(questions_file, find_image, self)
        questions = read_json(questions_file)
        require(questions, ("questions",), str(questions_file))
        annotations = self._annotations(data_dir)
        subtype = questions.get("data_subtype", split)
        items = []
        for index, question in enumerate(questions["questions"]):
            where = f"{questions_file}, question {index}"
            require(question, _NEEDED, where, texts=_NEEDED[2:], ids=_NEEDED[:2])
            annotation = annotations.get(question["question_id"], {})
            if self.judged and not annotation.get("answers"):
                raise DataError(
                    f"vqav2: question {question['question_id']} of {questions_file} has no answers "
                    f"in {ANNOTATIONS}; each question needs its annotators' answers. Take "
                    f"both files from the same release and split."
                )
            items.append(self._item(question, annotation, subtype, find_image, where))
        return items

    def _item(
        self,
        question: dict[str, Any],
        annotation: dict[str, Any],
        subtype: str,
        find_image: ImageFinder,
        where: str,
    ) -> Item:
        # The questions of test-dev are asked of the images of test.
        folder = subtype.replace("test-dev", "test")
        said = [answer["answer"] for answer in annotation.get("answers", ())]
        truths = texts_in(said, "its annotators' answers", where)
        kinds = [str(annotation.get(name, "")) for name in ("question_type", "answer_type")]
        named = annotation.get("multiple_choice_answer")
        usual = named or (Counter(truths).most_common(1)[0][0] if truths else "")
        name = f"COCO_{folder}_{question['image_id']:012d}.jpg"
        return Item(
            id=str(question["question_id"]),
            image=find_image(name, f"{folder}/{name}"),
            prompt=self.prompt(question["question"]),
            truth=truths or None,
            group=str(question["image_id"]),
            category=kinds[0],
            extra={"answer_type": kinds[1], "most_frequent": usual},
        )

    def _annotations(self, data_dir: Path) -> dict[int, dict[str, Any]]:
        if not self.judged:
            return {}
        file = find_file(data_dir, self.name, [ANNOTATIONS])
        answers = read_json(file)
        require(answers, ("annotations",), str(file))
        found = {row["question_id"]: row for row in answers["annotations"]}
        if len(found) < len(answers["annotations"]):
            raise DataError(
                f"{file}: {len(answers['annotations'])} annotations of {len(found)} questions, and "
                f"a question has one. Take the official file."
            )
        return found

    def parse(self, text: str, item: Item) -> str | None:
        """The answer as the scorer compares it; None when nothing was said."""
        if self.chosen["answers"] == "uploaded":
            text = normalise_m4c(text)
        return prepare(text, item.truth or (), self.chosen["scorer"]) or None

    def score(self, parsed: str | None, item: Item) -> float:
        """The official VQA accuracy in 0..1."""
        return vqa_accuracy(parsed or "", item.truth, self.chosen["scorer"])

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
        """Prompt, parser and metric."""
        return {
            "prompt": self.prompt("{question}"),
            "parser": f"VQA scorer, version {self.chosen['scorer']}",
            "metric": "VQA accuracy, each annotator left out in turn, percent",
        }
