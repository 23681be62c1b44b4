"""`pumice ask`: one question, one answer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli.endpoint import check_options, is_url, remote_model
from pumice.cli.options import (
    ENDPOINT,
    LOADING,
    SAMPLING,
    EndpointOptions,
    ImagesOption,
    JsonOption,
    LoadOptions,
    ModelArg,
    SamplingOptions,
    example,
    with_option_groups,
)
from pumice.cli.output import note, say, say_json
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.core.types import Result


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("ask", epilog=example('pumice ask pocket "What is this?" --image cat.jpg'))(
        with_option_groups(ask)
    )


def ask(
    model: ModelArg,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The question.")],
    images: ImagesOption = None,
    choices: Annotated[
        list[str] | None,
        typer.Option("--choice", metavar="TEXT", help="The answer is one of these; repeatable."),
    ] = None,
    sampling: SamplingOptions = SAMPLING,
    endpoint: EndpointOptions = ENDPOINT,
    loading: LoadOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Ask a model one question; print its answer.

    MODEL may be the address of an OpenAI-compatible endpoint, as http://host/v1; its key is read
    from PUMICE_API_KEY or OPENAI_API_KEY.
    """
    if not text.strip():
        # Before the model is loaded: most likely a shell variable that was not set.
        raise PumiceError(
            f"the question is empty (given {text!r}); give the question as TEXT, in quotes: "
            'pumice ask MODEL "What is this?" --image FILE.'
        )
    check_options(model, endpoint, loading)
    asked = {**asdict(sampling), "choices": tuple(choices or ())}
    if is_url(model):
        result = _ask_endpoint(model, text, images or [], asked, endpoint)
    else:
        from pumice.infer.model import load

        result = load(model, **asdict(loading)).ask(text, images=images or [], **asked)
    if as_json:
        keys = ("text", "finish_reason", "prompt_tokens", "image_tokens", "new_tokens")
        told = {key: getattr(result, key) for key in keys}
        # OpenAI's API does not say how much of a prompt are images.
        say_json(told | ({"image_tokens": None} if is_url(model) else {}))
        return
    say(result.text)
    if result.finish_reason == "length":
        note(f"(cut after {result.new_tokens} tokens; raise --max-new-tokens for more)")


def _ask_endpoint(
    url: str, text: str, images: list[Path], sampling: dict[str, Any], endpoint: EndpointOptions
) -> Result:
    from pumice.core.types import Request, Sampling, user

    with remote_model(url, endpoint) as remote:
        result = remote.ask(Request((user(text, *images),), Sampling(**sampling)))
    if result.error is not None:
        raise PumiceError(result.error)
    return result
