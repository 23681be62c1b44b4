"""`pumice serve`: a model behind OpenAI's API, and a page to try it."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pumice.cli.options import (
    LOADING,
    HostOption,
    LoadOptions,
    ModelArg,
    PortOption,
    example,
    with_option_groups,
)
from pumice.cli.output import note
from pumice.core.errors import PumiceError

_KEY = "PUMICE_API_KEY"
# oneDNN keeps what it compiles for each number of rows it meets, 0.2 MB a product. Its own bound of
# 1024 is reached in hours, which looks like a leak; so many are enough for every step of a batch.
_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def _option(name: str, text: str, least: int | None = None) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(name, min=least, help=text)
    return option


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """What one request may cost, and what the server holds at once."""

    max_batch: Annotated[int, _option("--max-batch", "Requests in flight at once.", 1)] = 16
    token_budget: Annotated[
        int | None, _option("--token-budget", "Positions in flight at once.", 1)
    ] = None
    kept_mib: Annotated[
        int, _option("--kept-mib", "MiB of images and prompts kept for later requests.", 0)
    ] = 1536
    max_waiting: Annotated[
        int, _option("--max-waiting", "Requests that may wait; others get 429.", 0)
    ] = 256
    max_waiting_tokens: Annotated[
        int | None, _option("--max-waiting-tokens", "Positions that may wait; others get 429.", 1)
    ] = None
    max_new_tokens: Annotated[int, _option("--max-new-tokens", "Longest answer.", 1)] = 1024
    seconds: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Longest request, seconds.")
    ] = 300.0
    max_images: Annotated[int, _option("--max-images", "Images of a request.", 0)] = 16
    max_image_mib: Annotated[int, _option("--max-image-mib", "MiB of an image's file.", 1)] = 20
    max_pixels: Annotated[int, _option("--max-pixels", "Pixels of an image.", 1)] = 100_000_000
    max_body_mib: Annotated[int, _option("--max-body-mib", "MiB of a whole request.", 1)] = 64
    drain_seconds: Annotated[
        float, typer.Option("--drain", min=0.0, help="Seconds for running requests at the end.")
    ] = 20.0


LIMITS = LimitOptions()


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    lines = ("pumice serve pocket --port 8000", "pumice serve runs/pocket/tune --api-key KEY")
    app.command("serve", epilog=example(*lines))(with_option_groups(serve))


def serve(
    model: ModelArg,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help=f"Else {_KEY}; else none.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; else MODEL's name.")
    ] = None,
    image_hosts: Annotated[
        list[str] | None,
        typer.Option("--image-host", metavar="HOST", help="Fetch images from it; repeatable."),
    ] = None,
    limiting: LimitOptions = LIMITS,
    loading: LoadOptions = LOADING,
) -> None:
    """Serve a model: /v1/chat/completions, /v1/models, /health, /metrics and a page on /.

    Ends on Ctrl-C or SIGTERM, after the requests on their way; a second one ends at once. Images
    come as data URIs; web addresses are refused unless their host is named.
    """
    check_installed("fastapi", "prometheus_client", "uvicorn")
    from pumice.infer.model import load
    from pumice.serve.host_names import local_host
    from pumice.serve.limits import MEBIBYTE, Limits
    from pumice.serve.run import listen, run
    from pumice.serve.server import Server

    key = own_key(api_key) or sendable(os.environ.get(_KEY))
    given = asdict(limiting)
    max_batch, kept = given.pop("max_batch"), given.pop("kept_mib") * MEBIBYTE
    limits = Limits(
        max_image_bytes=given.pop("max_image_mib") * MEBIBYTE,
        max_body_bytes=given.pop("max_body_mib") * MEBIBYTE,
        image_hosts=frozenset(_host_name(host) for host in image_hosts or ()),
        **given,
    )
    os.environ.setdefault(*_KERNELS)
    with listen(host, port) as listener:
        called = name or Path(model).resolve().name
        loaded = load(model, max_batch=max_batch, kept_bytes=kept, **asdict(loading))
        local = local_host(host, listener)
        server = Server(loaded, called, limits=limits, api_key=key, local_host=local)
        url = address(host, listener)
        note(f"{called}: {url} (page), {url}/v1 (OpenAI API)")
        run(server, listener)


def own_key(given: str | None) -> str | None:
    """--api-key as it was given; an empty one would leave open what it was to close.

    Raises PumiceError for that, and for one that no client could send.
    """
    if given is not None and not given.strip():
        raise PumiceError(
            f"--api-key is {given!r}, an empty key, which would let everybody in. Give a key (is "
            f"the variable it comes from set?), or leave --api-key out."
        )
    return sendable(given)


def sendable(key: str | None) -> str | None:
    """The key, if a header can hold it; raises PumiceError otherwise, which never shows it."""
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise PumiceError(
            "the API key has blanks around it, a line end, or a letter that is not ASCII, and "
            "no client's header holds it like that. Give another to --api-key or PUMICE_API_KEY."
        )
    return key


def _host_name(given: str) -> str:
    if not given or set(given) & set("/@?#: *"):
        raise PumiceError(
            f"--image-host {given!r} is no host name. Give the name alone, such as "
            f"images.example.com; http and https on their own ports are fetched from it."
        )
    return given.lower()


def address(host: str, listener: socket.socket) -> str:
    """Where the page is, for people."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def check_installed(*packages: str) -> None:
    """Says what to install when one of the packages that serving needs is missing."""
    for package in packages:
        if find_spec(package) is None:
            raise PumiceError(
                f"serving needs the packages of the extra 'serve', and {package} is not installed. "
                f"Install it with: pip install 'pumice[serve]'."
            )
