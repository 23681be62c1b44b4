"""Groups of options: a command with a group has each of its options, in the group's place."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from pumice.cli.options import (
    LOADING,
    SAMPLING,
    JsonOption,
    LoadOptions,
    ModelArg,
    SamplingOptions,
    with_option_groups,
)
from pumice.core.types import Sampling

got: list[object] = []


def command(
    model: ModelArg,
    sampling: SamplingOptions = SAMPLING,
    as_json: JsonOption = False,
    loading: LoadOptions = LOADING,
) -> None:
    """Keep what came."""
    got[:] = [model, sampling, as_json, loading]


def test_options_stand_in_the_place_of_their_group() -> None:
    names = [*inspect.signature(with_option_groups(command)).parameters]
    assert (
        names
        == (
            "model max_new_tokens temperature top_p seed as_json device dtype quantize adapter "
            "compile"
        ).split()
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("m", ["m", SAMPLING, False, LOADING]),
        (
            "m --temperature 0.5 --seed 7 --json --quantize int8",
            ["m", SamplingOptions(temperature=0.5, seed=7), True, LoadOptions(quantize="int8")],
        ),
    ],
)
def test_what_is_given_comes_as_groups(line: str, expected: list[object]) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(with_option_groups(command))
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 0, done.output
    assert got == expected


def test_the_defaults_are_those_of_the_library() -> None:
    for entry in fields(SamplingOptions):
        assert getattr(SAMPLING, entry.name) == getattr(Sampling(), entry.name)
