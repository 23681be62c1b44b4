"""The sentences that ask for a form of answer: one source for training data and benchmarks.

They are LLaVA-1.5's, letter for letter; a model tuned on one wording answers worse to another.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from pumice.core.errors import PumiceError
from pumice.core.registry import Registry

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CHINESE = "请直接回答选项字母。"
DETAILED = "Answer in detail."
CAPTION = "Provide a one-sentence caption for the provided image."
QUESTION_ANSWER = "Q: {question} A:"
"""How InstructBLIP asks; it does not say which form of answer is wanted."""
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: {phrase}."
REGION = "Please provide a short description for this region: {box}."
OCR_TOKENS = "Reference OCR token: "
BRIEF_INSTRUCTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""What the captions of LCS-558K answer."""

FORMATS: Registry[str] = Registry(
    "response format",
    {
        "none": "",
        "short": SHORT,
        "letter": LETTER,
        "letter_chinese": LETTER_CHINESE,
        "detailed": DETAILED,
        "caption": CAPTION,
        "unanswerable": f"{UNANSWERABLE}\n{SHORT}",
        "qa": QUESTION_ANSWER,
    },
)


def with_format(question: str, name: str) -> str:
    """The question, a line break, the sentence of that format.

    "none" adds nothing, and "qa" puts the question between its two letters.
    """
    sentence = FORMATS[name]
    if "{question}" in sentence:
        return sentence.replace("{question}", question)
    return f"{question}\n{sentence}" if sentence else question


def letter_prompt(question: str, choices: Sequence[str], hint: str | None = None) -> str:
    """A multiple-choice question as LLaVA-1.5 asks ScienceQA, ending with the LETTER sentence."""
    if not 1 <= len(choices) <= len(string.ascii_uppercase):
        raise PumiceError(
            f"the question {question!r} has {len(choices)} choices; 1 to 26 are allowed, one per "
            f"letter. Correct its choices."
        )
    lines = [f"Context: {hint}"] if hint else []
    lines += [question, *choice_lines(choices)]
    # Once only, so three spaces become two: that is what the published questions went through.
    text = "\n".join(lines).replace("  ", " ").strip()
    return with_format(text, "letter")


def choice_lines(choices: Sequence[str]) -> list[str]:
    """The choices with their letters: "A. a cat", "B. a dog"."""
    return [
        f"{letter}. {choice}"
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    ]


def box_prompt(phrase: str) -> str:
    """Asks where the thing a phrase describes is."""
    return BOX.format(phrase=phrase)


def region_prompt(box: Sequence[float]) -> str:
    """Asks what is inside a box, given as x1, y1, x2, y2 between 0 and 1."""
    return REGION.format(box=format_box(box))


def format_box(box: Sequence[float]) -> str:
    """A box as questions and answers write it: "[0.12, 0.50, 0.33, 0.98]"."""
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"
