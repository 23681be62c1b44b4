"""What is sent back: the JSON objects of OpenAI's chat API."""

from __future__ import annotations

from typing import Any

from pumice.core.types import Result, TokenLogprob


class Reply:
    """The JSON objects of one answer; all share its id, time and model."""

    def __init__(self, identity: str, created: int, model: str) -> None:
        self._common = {"id": identity, "created": created, "model": model}

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """The answer of a request without stream."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": logprobs(result.logprobs),
                "finish_reason": result.finish_reason,
            }
            for index, result in enumerate(results)
        ]
        common = {"object": "chat.completion", **self._common}
        return {**common, "choices": choices, "usage": usage(results)}

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        told: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A piece of a stream."""
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
        return {"object": "chat.completion.chunk", **self._common, "choices": [choice]}

    def usage_chunk(self, results: list[Result]) -> dict[str, Any]:
        """The last piece of a stream that tells its usage."""
        common = {"object": "chat.completion.chunk", **self._common}
        return {**common, "choices": [], "usage": usage(results)}


def usage(results: list[Result]) -> dict[str, Any]:
    """Tokens of the prompt, which all choices share, and of all answers."""
    first = results[0]
    new = sum(result.new_tokens for result in results)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": first.prompt_tokens + new,
        "prompt_tokens_details": {
            "cached_tokens": first.cached_tokens,
            "image_tokens": first.image_tokens,
        },
    }


def logprobs(tokens: tuple[TokenLogprob, ...] | None) -> dict[str, Any] | None:
    """OpenAI's logprobs object; None when none were asked for."""
    if tokens is None:
        return None
    return {"content": [_token(entry) for entry in tokens], "refusal": None}


def _token(entry: TokenLogprob) -> dict[str, Any]:
    top = [_named(text, value) for _, text, value in entry.top]
    return {**_named(entry.token, entry.logprob), "top_logprobs": top}


def _named(text: str, value: float) -> dict[str, Any]:
    # Of a part of a character the bytes are not known, which the API says by null.
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": value, "bytes": list(text.encode()) if whole else None}
