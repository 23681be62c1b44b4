"""`pumice ask`: one question, one answer."""

from __future__ import annotations

from typing import Annotated

import typer

from pumice.cli.options import (
    DeviceOption,
    DtypeOption,
    ImagesOption,
    JsonOption,
    MaxNewTokensOption,
    ModelArg,
    SeedOption,
    TemperatureOption,
    TopPOption,
    example,
)
from pumice.cli.output import note, say, say_json


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("ask", epilog=example('pumice ask pocket "What is this?" --image cat.jpg'))(ask)


def ask(
    model: ModelArg,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The question.")],
    images: ImagesOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
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
    loaded = load(model, device=device, dtype=dtype)
    result = loaded.ask(
        text,
        images=images or [],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        keys = ("text", "finish_reason", "prompt_tokens", "image_tokens", "new_tokens")
        say_json({key: getattr(result, key) for key in keys})
        return
    say(result.text)
    if result.finish_reason == "length":
        note(f"(cut after {result.new_tokens} tokens; raise --max-new-tokens for more)")
