"""OpenAI's chat API: what a request may hold, and what is sent back.

A field that would change the answer and is not supported is an error, never ignored.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pumice.core.types import Result, Sampling, TokenLogprob

MAX_CHOICES = 8
# What OpenAI's clients may send although it changes no answer here.
_HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls",
)  # fmt: skip
# Not supported, unless with a value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "response_format": (None, {"type": "text"}),
    "reasoning_effort": (None,),
    "audio": (None,),
    "prediction": (None,),
}


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions; temperature 0, the default, is greedy."""

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in _NEUTRAL.items():
            if name in data and data[name] not in neutral:
                raise ValueError(f"{name} is not supported here; leave it out")
        return {k: v for k, v in data.items() if k not in _HARMLESS and k not in _NEUTRAL}

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def sampling(self, most_tokens: int) -> Sampling:
        """As the engine takes it; without a limit of its own the answer has the server's."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        asked = self.max_completion_tokens or self.max_tokens or most_tokens
        return Sampling(
            max_new_tokens=asked,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed or 0,
            stop=stop,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


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
                "logprobs": logprobs(result),
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


def logprobs(result: Result) -> dict[str, Any] | None:
    """OpenAI's logprobs object; None when none were asked for."""
    if result.logprobs is None:
        return None
    return {"content": [_token(entry) for entry in result.logprobs], "refusal": None}


def _token(entry: TokenLogprob) -> dict[str, Any]:
    top = [_named(text, value) for _, text, value in entry.top]
    return {**_named(entry.token, entry.logprob), "top_logprobs": top}


def _named(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}
