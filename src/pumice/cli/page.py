"""`pumice page`: the page in front of an endpoint that answers elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli.endpoint import is_url, open_endpoint
from pumice.cli.options import HostOption, PortOption, example
from pumice.cli.output import note
from pumice.cli.serve import address, check_installed, own_key
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.core.llm_client import LLMClient


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    line = "pumice page http://127.0.0.1:8000/v1 --port 8001"
    app.command("page", epilog=example(line))(page)


def page(
    url: Annotated[str, typer.Argument(metavar="URL", help="An endpoint, as http://host/v1.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = 8001,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="Who uses the page must send it.")
    ] = None,
    api_model: Annotated[
        str | None,
        typer.Option("--api-model", metavar="NAME", help="The model; if there are several."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=16, help="Longest answer to ask for.")
    ] = 1024,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte of an answer.")
    ] = 300.0,
) -> None:
    """Show the page for a model behind an OpenAI-compatible address, such as vLLM's or SGLang's.

    The key of the address is read from PUMICE_API_KEY or OPENAI_API_KEY and stays here; without one
    the key that is typed on the page is sent; name the model by --api-model where the list of
    models asks for a key, too.
    """
    if not is_url(url):
        raise PumiceError(
            f"{url!r} is no address; give one as http://host/v1. A model here is served, page and "
            f"all, by: pumice serve {url}."
        )
    key = own_key(api_key)
    check_installed("fastapi", "uvicorn")
    from pumice.core.llm_client import LLMClient
    from pumice.serve.forward import Forwarder
    from pumice.serve.host_names import local_host
    from pumice.serve.limits import Limits
    from pumice.serve.run import listen, run

    endpoint = open_endpoint(url, concurrency=1, per_minute=None, timeout=timeout)
    with listen(host, port) as listener:
        with LLMClient(endpoint) as client:
            name = _model(client, api_model)
        limits = Limits(max_new_tokens=max_new_tokens)
        note(f"{name} of {url}: {address(host, listener)} (page)")
        local = local_host(host, listener)
        run(Forwarder(endpoint, name, limits=limits, api_key=key, local_host=local), listener)


def _model(client: LLMClient, named: str | None) -> str:
    """The model to ask; who asks may have the key that even the list of models needs."""
    from pumice.core.llm_client import KeyRefusedError
    from pumice.infer.remote import choose_model

    try:
        return choose_model(client, named)
    except KeyRefusedError as error:
        if client.endpoint.api_key:
            raise
        if named is None:
            raise PumiceError(
                f"{error} Or name the model by --api-model; the key is then typed on the page."
            ) from error
        return named
