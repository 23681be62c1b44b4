"""An answer of an OpenAI-compatible endpoint, piece by piece as it is said."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from typing import Any

import httpx2

from pumice.core.errors import PumiceError
from pumice.core.types import FinishReason, Request, Result
from pumice.infer.remote import RemoteModel, not_chosen

_DATA = "data:"


def stream_remote(model: RemoteModel, request: Request) -> Generator[str, None, Result]:
    """The pieces of one answer; the generator returns the whole result.

    Closing the generator closes the connection, by which the server knows that nobody listens.
    Raises PumiceError when there is no answer, or only a part of it.
    """
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    body = model.chat_request(request).body() | streaming
    endpoint, url = model.client.endpoint, f"{model.client.url}/chat/completions"
    key = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    text, finish = "", ""
    used: dict[str, Any] = {}
    try:
        with httpx2.stream("POST", url, json=body, headers=key, timeout=endpoint.timeout) as answer:
            if answer.status_code != 200:
                answer.read()
                raise PumiceError(f"{url} answers {answer.status_code}: {_cause(answer.text)}")
            for event in _events(answer, url):
                for choice in event.get("choices") or ():
                    said = choice.get("delta") or choice.get("message") or {}
                    piece = said.get("content") or ""
                    finish = choice.get("finish_reason") or finish
                    if piece:
                        text += piece
                        yield piece
                used = event.get("usage") or used
    except httpx2.TransportError as error:
        raise PumiceError(f"the connection to {url} failed: {error!r}.") from error
    if wrong := not_chosen(request, text.strip()):
        raise PumiceError(f"{url}: {wrong}.")
    reason: FinishReason = "length" if finish == "length" else "stop"
    return Result(
        text=text.strip(),
        finish_reason=reason,
        prompt_tokens=int(used.get("prompt_tokens") or 0),
        new_tokens=int(used.get("completion_tokens") or 0),
    )


def _events(answer: httpx2.Response, url: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of server-sent events, which must come to their end.

    That is a reason why the answer ended; not every server sends [DONE] after it. Of one that
    answers at once, whatever is asked, the answer is one such object.
    """
    if answer.headers.get("content-type", "").startswith("application/json"):
        answer.read()
        yield from _event(answer.text, url)
        return
    ended = False
    for line in _lines(answer):
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA).strip()
        if data == "[DONE]":
            return
        for event in _event(data, url):
            ended |= any(choice.get("finish_reason") for choice in event.get("choices") or ())
            yield event
    if not ended:
        raise PumiceError(f"{url} broke off in the middle of the answer.")


def _event(data: str, url: str) -> Iterator[dict[str, Any]]:
    """The object that `data` is, if it is one; raises PumiceError for an error and for no JSON."""
    try:
        event = json.loads(data)
    except ValueError as error:
        raise PumiceError(f"{url} sends what is no JSON: {data[:200]!r}.") from error
    if isinstance(event, dict):
        if event.get("error"):
            raise PumiceError(f"{url}: {_cause(data)}")
        yield event


def _lines(answer: httpx2.Response) -> Iterator[str]:
    """Lines as the protocol ends them.

    Python ends them at signs that may stand in an answer, too, such as U+2028 and U+0085.
    """
    rest = ""
    for piece in answer.iter_text():
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest


def _cause(body: str) -> str:
    """What an error's body says, in OpenAI's shape or any other."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300].strip() or "nothing more"
