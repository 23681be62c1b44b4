"""`pumice chat`: a conversation in the terminal, the answers streamed."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from pumice.cli.endpoint import check_options, is_url, remote_model
from pumice.cli.options import (
    ENDPOINT,
    LOADING,
    SAMPLING,
    EndpointOptions,
    ImagesOption,
    LoadOptions,
    ModelArg,
    SamplingOptions,
    example,
    with_option_groups,
)
from pumice.cli.output import fail, note
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.cli.talk import Speak
    from pumice.core.types import Request, Result
    from pumice.infer.online import Online

_HINT = "/image FILE shows the model a picture, /help lists what else there is, Ctrl-D ends."


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lines = ("pumice chat pocket --image cat.jpg", "pumice chat http://127.0.0.1:8000/v1")
    app.command("chat", epilog=example(*lines))(with_option_groups(chat))


def chat(
    model: ModelArg,
    images: ImagesOption = None,
    sampling: SamplingOptions = SAMPLING,
    endpoint: EndpointOptions = ENDPOINT,
    loading: LoadOptions = LOADING,
) -> None:
    """Talk with a model in the terminal, or with one behind an OpenAI-compatible address.

    /image FILE shows it a picture, /format asks for short answers, letters or details, /reset
    forgets the talk, /help lists all. Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice, ends.
    Questions may come through a pipe, one a line; when one of them fails the rest are asked, and
    the command ends with an error. The key of an address is read from PUMICE_API_KEY or
    OPENAI_API_KEY.
    """
    from pumice.cli.picture import drawing
    from pumice.cli.talk import NAMES, Leave, Talk
    from pumice.cli.typed_lines import TypedLines
    from pumice.core.types import Sampling

    check_options(model, endpoint, loading)
    with _speaking(model, endpoint, loading) as speak:
        talk = Talk(speak, Sampling(**asdict(sampling)), drawing())
        for path in images or []:
            talk.show(path)
        typed, failed = TypedLines(NAMES), False
        if typed.by_hand:
            note(_HINT)
        with closing(iter(typed)) as lines:
            for line in lines:
                try:
                    talk.hear(line)
                except Leave:
                    break
                except KeyboardInterrupt:
                    if not typed.by_hand:
                        raise
                    typed.interrupted = True
                    note("(stopped; Ctrl-C again to leave)")
                except PumiceError as error:
                    fail(str(error))
                    failed = True
        if failed and not typed.by_hand:
            raise typer.Exit(1)


@contextmanager
def _speaking(model: str, endpoint: EndpointOptions, loading: LoadOptions) -> Iterator[Speak]:
    """What answers requests, piece by piece; to close its generator stops the answer."""
    if is_url(model):
        from pumice.infer.remote_stream import stream_remote

        with remote_model(model, endpoint) as remote:
            yield lambda request: stream_remote(remote, request)
        return
    from pumice.infer.model import load
    from pumice.infer.online import Online

    # The engine has a thread of its own, which a Ctrl-C of the person cannot tear apart.
    with Online(load(model, **asdict(loading)).engine, max_batch=1) as online:
        yield lambda request: _spoken(online, request)


def _spoken(online: Online, request: Request) -> Generator[str, None, Result]:
    handle = online.submit(request)
    try:
        yield from handle
    finally:
        handle.cancel()
    return handle.result()
