"""Arguments and options that several commands share, each described once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint directory or a shipped name (pocket).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ImagesOption = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="An image file; may be given several times."),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Stop after this many tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token (greedy).")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this share of probability.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; the best one when left out.")
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
QuantizeOption = Annotated[
    str | None,
    typer.Option("--quantize", help="int8 or int4: hold the language model in so many bits."),
]
AdapterOption = Annotated[
    Literal["merge", "keep"],
    typer.Option("--adapter", help="merge: add a LoRA to its base's weights; keep: beside them."),
]
CompileOption = Annotated[
    bool,
    typer.Option("--compile", help="Decode through torch.compile: faster after a minute or two."),
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="How many requests are answered together.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Ask only this many items, spread evenly.")
]
AllowErrorsOption = Annotated[
    bool, typer.Option("--allow-errors", help="Score the rest although some items are errors.")
]
CategoriesOption = Annotated[
    bool, typer.Option("--categories", help="Also a table of each benchmark's categories.")
]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="Directory of the official files.")
]
BenchOptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="BENCH.NAME=VALUE",
        help="An official version, such as vqav2.scorer=before-2021 (docs/benchmarks.md).",
    ),
]
ApiExtraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--api-extra",
        metavar="NAME=JSON",
        help="A key of every request to an address; null takes one out. Repeatable.",
    ),
]
ResumeOption = Annotated[
    Literal["auto", "never"],
    typer.Option("--resume", help="auto goes on where a run stopped; never starts again."),
]
FeatureCacheOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Keep image features of a frozen vision backbone here, for reuse."
    ),
]
FeatureCacheGbOption = Annotated[
    float | None, typer.Option(metavar="N", help="Write at most N GB of image features.")
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Curves also to tensorboard or wandb; may be repeated."),
]


HostOption = Annotated[
    str, typer.Option("--host", help="Address to listen on; 0.0.0.0 or :: (IPv6, too) are all.")
]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How answers are made: a command with a parameter of this class has these options."""

    max_new_tokens: MaxNewTokensOption = 256
    temperature: TemperatureOption = 0.0
    top_p: TopPOption = 1.0
    seed: SeedOption = 0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is opened: a command with a parameter of this class has these options."""

    device: DeviceOption = None
    dtype: DtypeOption = None
    quantize: QuantizeOption = None
    adapter: AdapterOption = "merge"
    compile: CompileOption = False


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How a model behind an address is asked: for commands whose MODEL may be one."""

    api_model: Annotated[
        str | None,
        typer.Option("--api-model", metavar="NAME", help="Its name there; if there are several."),
    ] = None
    api_images: Annotated[
        Literal["as-is", "square"],
        typer.Option("--api-images", help="as-is: the files' bytes; square: padded, as LLaVA-1.5."),
    ] = "as-is"
    concurrency: Annotated[int, typer.Option(min=1, help="Calls of an address at a time.")] = 16
    per_minute: Annotated[float | None, typer.Option(help="Calls of it a minute, at most.")] = None
    timeout: Annotated[float, typer.Option(help="Seconds before a call is given up.")] = 300.0


SAMPLING, LOADING, ENDPOINT = SamplingOptions(), LoadOptions(), EndpointOptions()


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: each group of options spread out in its parameter's place.

    A group is a dataclass whose fields are options.
    """
    signature = inspect.signature(command, eval_str=True)
    kinds: dict[str, type[Any]] = {p.name: p.annotation for p in signature.parameters.values()}
    groups = {name: kind for name, kind in kinds.items() if is_dataclass(kind)}
    spread: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        spread += _spread(groups[parameter.name]) if parameter.name in groups else [parameter]

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{entry.name: given.pop(entry.name) for entry in fields(group)})
        command(**given)

    run.__signature__ = signature.replace(parameters=spread)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return run


def _spread(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=entry.default,
            annotation=hints[entry.name],
        )
        for entry in fields(group)
    ]


def example(*lines: str) -> str:
    """The epilog of a command's help: its examples, kept line by line."""
    return "\b\n" + "\n".join(("Example:", *(f"  {line}" for line in lines)))
