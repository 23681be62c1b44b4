"""One of several processes that ask a benchmark together: eval_rank.py DATA OUT [DIE_AFTER].

The last process ends without a word after DIE_AFTER answers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from eval_files import Scripted
from pumice.core.types import Request, Result
from pumice.eval.benchmark import Item
from pumice.eval.benchmarks import BENCHMARKS
from pumice.eval.ranks import joined
from pumice.eval.runner import run_benchmark


class Dying(Scripted):
    """Answers until it is enough, and then the process is gone."""

    def __call__(
        self, requests: Sequence[Request], on_result: Callable[[Result], None] | None
    ) -> list[Result]:
        try:
            return super().__call__(requests, on_result)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGKILL)
            raise


def main(data: Path, out: Path, die_after: int = -1) -> None:
    vqa = BENCHMARKS["vqav2"]
    items: list[Item] = vqa.load(data)
    with joined() as ranks:
        last = ranks.rank == ranks.size - 1
        answer = Dying(items, die_after=die_after if last else -1)
        run_benchmark(answer, vqa, data, out, weights="w", ranks=ranks)
        (out / f"asked.{ranks.rank}").write_text("\n".join(answer.asked))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
