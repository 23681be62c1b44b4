"""`pumice data generate`: training conversations from captions and boxes, by any endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli.data_source import check_out
from pumice.cli.endpoint import open_endpoint
from pumice.cli.options import JsonOption, example
from pumice.cli.output import note, say, say_json
from pumice.cli.prices import read_prices
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.data.engine import Estimate, Outcome
    from pumice.data.engine_prompts import Kind


def register(group: typer.Typer) -> None:
    """Add the command to `pumice data`."""
    line = (
        "pumice data generate conversation --captions captions_train2017.json "
        "--endpoint http://127.0.0.1:8001/v1 --out conversation.jsonl"
    )
    group.command("generate", epilog=example(line))(generate)


KindArg = Annotated[
    str, typer.Argument(metavar="KIND", help="conversation, detail, reasoning or custom.")
]
ExamplesOption = Annotated[
    Path | None, typer.Option("--examples", metavar="FILE", help="JSONL: replies to learn by.")
]
LanguageOption = Annotated[
    str,
    typer.Option("--language", metavar="NAME", help="en, any (no check), or as script:han."),
]
NearOption = Annotated[
    float, typer.Option("--near", min=0.01, max=1.0, help="Rows so alike are copies; 1: equal.")
]


def generate(
    kind: KindArg,
    captions: Annotated[Path, typer.Option("--captions", help="COCO captions, or JSONL.")],
    endpoint: Annotated[str, typer.Option("--endpoint", metavar="URL", help="As https://host/v1.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="LLaVA JSONL.")],
    boxes: Annotated[Path | None, typer.Option("--boxes", help="COCO instances, or JSONL.")] = None,
    model: Annotated[str, typer.Option("--model", help="Its name there.")] = "pumice-teacher",
    prompt: Annotated[Path | None, typer.Option("--prompt", help="custom: the request.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Of a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Of a million new tokens.")] = None,
    cost_cap: Annotated[float | None, typer.Option(help="All runs together, at most.")] = None,
    estimate_only: Annotated[bool, typer.Option("--estimate", help="Send nothing.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N images.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls at a time.")] = 8,
    per_minute: Annotated[float | None, typer.Option(help="Calls a minute, at most.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds before a call is given up.")] = 120.0,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the endpoint's model.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 1024,
    examples: ExamplesOption = None,
    language: LanguageOption = "en",
    near: NearOption = 0.8,
    as_json: JsonOption = False,
) -> None:
    """Make training conversations from captions and boxes.

    The key is read from PUMICE_API_KEY or OPENAI_API_KEY. Replies are kept in FILE.replies.jsonl:
    the same command goes on where it stopped and pays for nothing twice. Rejected rows go to
    FILE.rejected.jsonl with their reason. Exits with 1 when an image got no reply.
    """
    from pumice.core.llm_client import LLMClient
    from pumice.data import engine
    from pumice.data.engine_examples import read_examples
    from pumice.data.engine_scenes import read_described

    wanted = _kind(kind, prompt)
    order = engine.Order(
        kind=wanted,
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        language=language,
        near=near,
        examples=() if examples is None else read_examples(examples, wanted, language),
    )
    check_out(out, ".jsonl")
    scenes = read_described(captions, boxes)[:limit]
    target = open_endpoint(
        endpoint, concurrency=concurrency, per_minute=per_minute, timeout=timeout
    )
    prices = read_prices(price_in, price_out, "--price")
    with LLMClient(target, cache=_beside(out, "replies"), prices=prices, cost_cap=cost_cap) as llm:
        before = engine.estimate(llm, order, scenes)
        note(_estimate_text(before, cost_cap))
        if estimate_only:
            return
        outcome = engine.generate(llm, order, scenes, out, _beside(out, "rejected"))
    _report(outcome, out, as_json=as_json)


def _report(outcome: Outcome, out: Path, *, as_json: bool) -> None:
    if as_json:
        say_json(outcome.to_dict() | {"out": str(out)})
    else:
        say(_outcome_text(outcome, out))
    if outcome.failed:
        note(f"first failure: {outcome.first_failure}. The same command asks again.")
        raise typer.Exit(1)


def _kind(name: str, prompt: Path | None) -> Kind:
    from pumice.core.registry import check_choice
    from pumice.data.engine_prompts import KINDS, custom_kind

    check_choice("KIND", name, (*KINDS, "custom"))
    if (name == "custom") != (prompt is not None):
        raise PumiceError("custom needs --prompt FILE, and the other kinds have their own prompt.")
    return custom_kind(prompt) if prompt is not None else KINDS[name]


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}.jsonl")


def _estimate_text(found: Estimate, cap: float | None) -> str:
    text = f"{found.images} images, {found.cached} with a reply kept"
    if found.expected is None:
        return f"{text}; the cost is not known without --price-in and --price-out"
    text += f"; the rest costs about {found.expected:.4g}, at most {found.most:.4g}"
    return text if cap is None else f"{text}; the cap over all runs is {cap:.4g}"


def _outcome_text(outcome: Outcome, out: Path) -> str:
    def counted(found: Any) -> str:
        names = ", ".join(f"{name} {n}" for name, n in sorted(found.items()))
        return f"{found.total()}" + (f" ({names})" if names else "")

    return (
        f"{out}: {outcome.kept} kept, {counted(outcome.rejected)} rejected, "
        f"{counted(outcome.failed)} without a reply"
    )
