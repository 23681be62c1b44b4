"""`pumice serve`: a model behind OpenAI's API, and a page to try it."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pumice.cli.options import (
    LOADING,
    LoadOptions,
    ModelArg,
    example,
    with_option_groups,
)
from pumice.cli.output import note
from pumice.core.errors import PumiceError

_KEY = "PUMICE_API_KEY"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lines = ("pumice serve pocket --port 8000", "pumice serve runs/pocket/tune --api-key KEY")
    app.command("serve", epilog=example(*lines))(with_option_groups(serve))


def serve(
    model: ModelArg,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help=f"Else {_KEY}; else none.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; else MODEL's name.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests in flight at once.")
    ] = 16,
    token_budget: Annotated[
        int | None, typer.Option("--token-budget", min=1, help="Positions in flight at once.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Requests that may wait; others get 429.")
    ] = 256,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")
    ] = 1024,
    seconds: Annotated[float, typer.Option("--timeout", help="Longest request, seconds.")] = 300.0,
    image_hosts: Annotated[
        list[str] | None,
        typer.Option("--image-host", metavar="HOST", help="Fetch images from it; repeatable."),
    ] = None,
    loading: LoadOptions = LOADING,
) -> None:
    """Serve a model: /v1/chat/completions, /v1/models, /health, /metrics and a page on /.

    Ends on Ctrl-C or SIGTERM, after the requests on their way. Images come as data URIs; web
    addresses are refused unless their host is named.
    """
    check_installed()
    import uvicorn

    from pumice.infer.model import load
    from pumice.serve.limits import Limits
    from pumice.serve.server import Server

    limits = Limits(
        max_new_tokens=max_new_tokens,
        seconds=seconds,
        image_hosts=frozenset(host.lower() for host in image_hosts or ()),
        token_budget=token_budget,
        max_waiting=max_waiting,
    )
    loaded = load(model, max_batch=max_batch, **asdict(loading))
    called = name or Path(model).name
    server = Server(loaded, called, limits=limits, api_key=api_key or os.environ.get(_KEY))
    note(f"{called}: http://{host}:{port} (page), http://{host}:{port}/v1 (OpenAI API)")
    uvicorn.run(
        server.app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=int(limits.drain_seconds),
    )


def check_installed() -> None:
    """Says what to install when the packages that serving needs are missing."""
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        if find_spec(package) is None:
            raise PumiceError(
                f"serving needs the packages of the extra 'serve', and {package} is not installed. "
                f"Install it with: pip install 'pumice[serve]'."
            )
