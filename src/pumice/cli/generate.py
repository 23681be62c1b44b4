"""`pumice generate`: a file of requests in, a file of answers out, one row per row."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli.options import (
    LOADING,
    SAMPLING,
    BatchSizeOption,
    JsonOption,
    LoadOptions,
    ModelArg,
    ResumeOption,
    SamplingOptions,
    example,
    with_option_groups,
)
from pumice.cli.output import note, say, say_json

if TYPE_CHECKING:
    from pumice.cli.answer_rows import Answers, Line
    from pumice.core.types import Sampling
    from pumice.infer.model import Model

# Requests per call of the engine: enough to sort into batches of similar length, few enough that
# the features of a call's images fit into memory.
_CALL_SIZE = 512


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    line = "pumice generate pocket --requests questions.jsonl --images images --out answers.jsonl"
    app.command("generate", epilog=example(line))(with_option_groups(generate))


def generate(
    model: ModelArg,
    requests: Annotated[
        Path,
        typer.Option(
            "--requests",
            metavar="FILE.jsonl",
            help='Rows {"id", "messages"} (OpenAI chat) or {"question_id", "image", "text"}.',
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.jsonl", help="Where to write.")],
    images: Annotated[
        Path,
        typer.Option("--images", metavar="DIR", help="Directory the image names are relative to."),
    ] = Path(),
    batch_size: BatchSizeOption = 16,
    sampling: SamplingOptions = SAMPLING,
    resume: ResumeOption = "auto",
    loading: LoadOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Answer every request of a file.

    A request that fails becomes a row with an error. A stopped run goes on where it stopped and
    tries failed rows again. In the end the rows stand in the order of the requests. Exits with 1
    when no row could be answered.
    """
    from pumice.cli.answer_rows import Answers, read_lines
    from pumice.cli.weights import weights_hash
    from pumice.core.types import Sampling
    from pumice.infer.model import load

    _check_paths(requests, images, out)
    chosen = Sampling(**asdict(sampling))
    weights = weights_hash(model, loading.quantize, loading.adapter)
    lines = read_lines(requests, settings=[weights, repr(chosen), str(images)])
    with Answers(out, lines, resume=resume == "auto") as answers:
        if answers.kept:
            note(f"{answers.kept} of {len(lines)} rows are answered already")
        loaded = load(model, max_batch=batch_size, **asdict(loading))
        _answer(loaded, answers, images, chosen)
        answers.finish()
    summary = {"out": str(out), "rows": len(lines), "errors": answers.errors}
    if as_json:
        say_json(summary)
    else:
        say(f"{out}: {len(lines)} rows, {answers.errors} errors")
    if lines and answers.errors == len(lines):
        raise typer.Exit(1)


def _check_paths(requests: Path, images: Path, out: Path) -> None:
    """What would fail for every row, or destroy the requests, is refused before a model loads."""
    from pumice.core.errors import PumiceError

    if not images.is_dir():
        raise PumiceError(
            f"--images {images} is not a directory that exists; give the directory the image names "
            "of the requests are relative to, or leave it out for the working directory."
        )
    if out.exists() and requests.exists() and out.samefile(requests):
        raise PumiceError(
            f"--out {out} is the requests file itself; the answers would replace it. Give another "
            "file."
        )
    if out.is_dir():
        raise PumiceError(
            f"--out {out} is a directory; give the file to write, such as {out}/a.jsonl."
        )


def _answer(model: Model, answers: Answers, images: Path, sampling: Sampling) -> None:
    from pumice.core.progress import progress
    from pumice.core.types import Result

    pending = answers.pending()
    with progress(len(pending), "answering") as bar:
        for start in range(0, len(pending), _CALL_SIZE):
            asked: dict[str, Line] = {}
            wanted = []
            for line in pending[start : start + _CALL_SIZE]:
                request = line.request(images, sampling)
                if isinstance(request, Result):
                    answers.write(line, request)
                    bar.update(1)
                else:
                    asked[line.key] = line
                    wanted.append(request)

            def keep(result: Result, asked: dict[str, Line] = asked) -> None:
                answers.write(asked[result.id], result)
                bar.update(1)

            model.generate(wanted, keep)
