"""`pumice generate`: a file of requests in, a file of answers out, one row per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli.endpoint import check_options, is_url, remote_model
from pumice.cli.options import (
    ENDPOINT,
    LOADING,
    SAMPLING,
    BatchSizeOption,
    EndpointOptions,
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
    from collections.abc import Sequence

    from pumice.cli.answer_rows import Answers, Line
    from pumice.core.types import Request, Result, Sampling

    Generate = Callable[[Sequence[Request], Callable[[Result], None]], list[Result]]

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
    endpoint: EndpointOptions = ENDPOINT,
    loading: LoadOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Answer every request of a file.

    MODEL may be the address of an OpenAI-compatible endpoint; its key is read from PUMICE_API_KEY
    or OPENAI_API_KEY. A request that fails becomes a row with an error. A stopped run goes on where
    it stopped and tries failed rows again. In the end the rows stand in the order of the requests.
    Exits with 1 when no row could be answered.
    """
    from pumice.core.types import Sampling

    _check_paths(requests, images, out)
    check_options(model, endpoint, loading)
    job = _Job(requests, out, images, Sampling(**asdict(sampling)), resume=resume == "auto")
    if is_url(model):
        with remote_model(model, endpoint) as remote:
            answered_by = f"{remote.client.url} {remote.name} {remote.images}"
            rows, errors = job.run(answered_by, lambda: remote.generate)
    else:
        from pumice.cli.weights import weights_hash
        from pumice.infer.model import load

        weights = weights_hash(model, loading.quantize, loading.adapter)
        rows, errors = job.run(
            weights, lambda: load(model, max_batch=batch_size, **asdict(loading)).generate
        )
    if as_json:
        say_json({"out": str(out), "rows": rows, "errors": errors})
    else:
        say(f"{out}: {rows} rows, {errors} errors")
    if rows and errors == rows:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Job:
    """Which requests are answered, how, and where the answers go."""

    requests: Path
    out: Path
    images: Path
    sampling: Sampling
    resume: bool

    def run(self, answered_by: str, opened: Callable[[], Generate]) -> tuple[int, int]:
        """How many rows there are, and how many of them are errors.

        `answered_by` names the model: rows of another one are not kept. It is opened when the
        requests have been read.
        """
        from pumice.cli.answer_rows import Answers, read_lines

        settings = [answered_by, repr(self.sampling), str(self.images)]
        lines = read_lines(self.requests, settings=settings)
        with Answers(self.out, lines, resume=self.resume) as answers:
            if answers.kept:
                note(f"{answers.kept} of {len(lines)} rows are answered already")
            _answer(opened(), answers, self.images, self.sampling)
            answers.finish()
        return len(lines), answers.errors


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


def _answer(generate: Generate, answers: Answers, images: Path, sampling: Sampling) -> None:
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

            generate(wanted, keep)
