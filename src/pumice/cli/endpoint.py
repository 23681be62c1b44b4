"""Models behind an OpenAI-compatible endpoint, where a command takes MODEL."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pumice.cli.options import ENDPOINT, LOADING, EndpointOptions, LoadOptions
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.core.llm_client import Endpoint
    from pumice.infer.remote import RemoteModel

_KEYS = ("PUMICE_API_KEY", "OPENAI_API_KEY")


def is_url(model: str) -> bool:
    """Whether MODEL is the address of an endpoint."""
    return model.startswith(("http://", "https://"))


def check_options(model: str, endpoint: EndpointOptions, loading: LoadOptions) -> None:
    """An error when an option is given that only the other kind of MODEL has."""
    given, default, other = (
        (loading, LOADING, "a model that is loaded here")
        if is_url(model)
        else (endpoint, ENDPOINT, "a MODEL that is an address, as http://host/v1")
    )
    names = [f.name for f in fields(given) if getattr(given, f.name) != getattr(default, f.name)]
    if names:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise PumiceError(f"{flags} belongs to {other}; MODEL is {model!r}. Leave it out.")


def read_extra(model: str, given: Sequence[str]) -> dict[str, Any]:
    """The keys and values of --api-extra; an error for a MODEL that is no address."""
    if given and not is_url(model):
        raise PumiceError(f"--api-extra belongs to an address; MODEL is {model!r}. Leave it out.")
    extra = {}
    for entry in given:
        name, _, value = entry.partition("=")
        try:
            extra[name] = json.loads(value)
        except ValueError as error:
            raise PumiceError(
                f"--api-extra {entry!r} is not NAME=JSON ({error}); write top_k=1, max_tokens=null "
                f"or, in quotes, 'reasoning_effort=\"low\"'."
            ) from error
    return extra


@contextmanager
def remote_model(
    url: str, options: EndpointOptions, extra: Mapping[str, Any] | None = None
) -> Iterator[RemoteModel]:
    """The endpoint's model while the block runs. The key is in the environment, if it needs one."""
    from pumice.core.llm_client import LLMClient
    from pumice.infer.remote import RemoteModel, choose_model

    endpoint = open_endpoint(
        url,
        concurrency=options.concurrency,
        per_minute=options.per_minute,
        timeout=options.timeout,
    )
    with LLMClient(endpoint) as client:
        name = choose_model(client, options.api_model)
        yield RemoteModel(client, name, images=options.api_images, extra=extra)


def open_endpoint(
    url: str, *keys: str, concurrency: int, per_minute: float | None, timeout: float
) -> Endpoint:
    """The endpoint with its key, which is in one of `keys` of the environment or the usual ones."""
    from pumice.core.llm_client import Endpoint

    key = next((key for name in (*keys, *_KEYS) if (key := os.environ.get(name, "").strip())), None)
    return Endpoint(
        url=url, api_key=key, concurrency=concurrency, per_minute=per_minute, timeout=timeout
    )
