"""`pumice ask`: one question, one answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pumice.cli.options import (
    LOADING,
    SAMPLING,
    ImagesOption,
    JsonOption,
    LoadOptions,
    ModelArg,
    SamplingOptions,
    example,
    with_option_groups,
)
from pumice.cli.output import note, say, say_json


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("ask", epilog=example('pumice ask pocket "What is this?" --image cat.jpg'))(
        with_option_groups(ask)
    )


def ask(
    model: ModelArg,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The question.")],
    images: ImagesOption = None,
    sampling: SamplingOptions = SAMPLING,
    loading: LoadOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Ask a model one question; print its answer."""
    from pumice.core.errors import PumiceError
    from pumice.infer.model import load

    if not text.strip():
        # Before the model is loaded: most likely a shell variable that was not set.
        raise PumiceError(
            f"the question is empty (given {text!r}); give the question as TEXT, in quotes: "
            'pumice ask MODEL "What is this?" --image FILE.'
        )
    loaded = load(model, **asdict(loading))
    result = loaded.ask(text, images=images or [], **asdict(sampling))
    if as_json:
        keys = ("text", "finish_reason", "prompt_tokens", "image_tokens", "new_tokens")
        say_json({key: getattr(result, key) for key in keys})
        return
    say(result.text)
    if result.finish_reason == "length":
        note(f"(cut after {result.new_tokens} tokens; raise --max-new-tokens for more)")
