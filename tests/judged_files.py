"""Small hand-made files of LLaVA-Bench and MM-Vet, and a judge that says what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tiny
from eval_files import dump, dump_lines
from pumice.core.llm_types import ChatRequest, Failure, Reply

RULE = "Give two numbers."
TABLE = "Grade this.\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
CATEGORIES = ("conv", "detail", "complex", "conv")


def wild_files(root: Path, *, rule: str | None = RULE) -> Path:
    """Four questions about three images; the third image has two captions."""
    folder = root / "llava-bench-in-the-wild"
    images = ("001.jpg", "002.jpg", "003.jpg", "001.jpg")
    rows: list[dict[str, object]] = [
        {"question_id": n, "image": images[n], "category": CATEGORIES[n], "text": f"What is {n}?"}
        for n in range(4)
    ]
    dump_lines(folder / "questions.jsonl", rows)
    captions: dict[str, Any] = {
        "001.jpg": "One cat.", "002.jpg": "A dog.", "003.jpg": ["A hat.", "A man."],
    }  # fmt: skip
    dump_lines(
        folder / "context.jsonl",
        [
            {"id": n, "image": name, "caption": text}
            for n, (name, text) in enumerate(captions.items())
        ],
    )
    dump_lines(
        folder / "answers_gpt4.jsonl",
        # Not in the order of the questions: they are matched by id.
        [{"question_id": n, "text": f"reference {n}", "answer_id": f"r{n}"} for n in (3, 1, 0, 2)],
    )
    if rule is not None:
        names = ("conv", "detail", "complex")
        rules = {f"llava_bench_{name}": {"role": "Assistant", "prompt": rule} for name in names}
        dump(folder / "rule.json", rules)
    return root


def review(question: int, content: str, pair: tuple[float, float]) -> dict[str, object]:
    return {
        "id": question + 1, "question_id": question, "answer1_id": f"r{question}",
        "answer2_id": f"a{question}", "category": f"llava_bench_{CATEGORIES[question]}",
        "content": content, "tuple": list(pair),
    }  # fmt: skip


def vet_files(root: Path, *, table: str | None = TABLE) -> Path:
    """Four questions, of one capability or two."""
    truths = ("-1<AND>-5", "stop<OR>halt", "a cat", "7")
    capabilities = (["ocr", "math"], ["ocr"], ["rec"], ["math", "ocr"])
    rows = {
        f"v1_{n}": {
            "imagename": f"v1_{n}.png", "question": f"What is {n}?", "answer": truths[n],
            "imagesource": "here", "capability": capabilities[n],
        }
        for n in range(4)
    }  # fmt: skip
    dump(root / "mm-vet" / "mm-vet.json", rows)
    if table is not None:
        code = f'import json\n\nprompt = """{table}"""\n\n\nother = """no prompt"""\n'
        (root / "mm-vet" / "mm-vet_evaluator.py").write_text(code, encoding="utf-8")
    return root


def both_with_images(root: Path) -> Path:
    """Both benchmarks' files, and their images."""
    wild_files(vet_files(root))
    for folder, names in (
        ("llava-bench-in-the-wild", [f"{n:03d}.jpg" for n in range(1, 4)]),
        ("mm-vet", [f"v1_{n}.png" for n in range(4)]),
    ):
        for number, name in enumerate(names):
            (root / folder / "images").mkdir(exist_ok=True)
            tiny.noise(number).save(root / folder / "images" / name)
    return root


def answers_file(root: Path, texts: Iterable[str] = ("one", "two", "three", "four")) -> Path:
    rows: list[dict[str, object]] = [
        {"question_id": n, "text": text, "answer_id": f"a{n}"} for n, text in enumerate(texts)
    ]
    return dump_lines(root / "answers.jsonl", rows)


class ScriptedChat:
    """A judge whose reply is a function of the request; a None is a reply that never comes."""

    def __init__(self, say: Callable[[ChatRequest], str | None], *, die_after: int = -1) -> None:
        self.say, self.die_after = say, die_after
        self.asked: list[ChatRequest] = []

    def is_cached(self, request: ChatRequest) -> bool:
        return False

    def ask_all(self, requests: Iterable[ChatRequest]) -> Iterator[Reply]:
        for request in requests:
            if len(self.asked) == self.die_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            text = self.say(request)
            if text is None:
                yield Reply(key="", failure=Failure("timeout", "no answer within 1 seconds"))
            else:
                yield Reply(key="", text=text, finish_reason="stop")
