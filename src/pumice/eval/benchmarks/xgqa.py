"""xGQA: GQA's testdev questions in eight languages, with English answers.

Official files: testdev_balanced_questions_{language}.json of xGQA's zero_shot folder; GQA's images.
"""

from __future__ import annotations

from pumice.eval.benchmark import PROMPTS
from pumice.eval.benchmarks.gqa import GQA


class XGQA(GQA):
    """GQA's accuracies, of questions in one language that is not English unless asked for."""

    name = "xgqa"
    title = "xGQA"
    paper = False
    choices = {
        "language": ("de", "bn", "en", "id", "ko", "pt", "ru", "zh"),
        "prompt": PROMPTS,
    }

    def files(self) -> list[str]:
        """The question files of the language, the first one's place first."""
        name = f"testdev_balanced_questions_{self.chosen['language']}.json"
        return [f"{folder}{name}" for folder in ("", "zero_shot/", "data/zero_shot/")]
