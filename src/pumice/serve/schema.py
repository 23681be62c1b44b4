"""What a request of OpenAI's chat API may hold.

A field that would change the answer and is not supported is an error, never ignored.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from pumice.core.types import Sampling
from pumice.serve.messages import ChatMessage

MAX_CHOICES = 8
# Each of them is looked for at every token.
Stop = Annotated[str, Field(min_length=1, max_length=200)]
MAX_STOPS = 16


def _stops_tag(stops: Any) -> str | None:
    if isinstance(stops, str):
        return "(string)"
    return "(list)" if isinstance(stops, list) else None


Stops = Annotated[
    Annotated[Stop, Tag("(string)")]
    | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("(list)")],
    Discriminator(
        _stops_tag,
        custom_error_type="stop",
        custom_error_message="a string or a list of strings is needed",
    ),
]
# The tokens of each are looked up when its request comes.
Choice = Annotated[str, Field(min_length=1, max_length=1000)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=256)]
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


def fault(param: str, message: str) -> PydanticCustomError:
    """What is wrong about one field beside others."""
    return PydanticCustomError("fault", "{message}", {"message": message, "param": param})


_INSTEAD = {
    "response_format": 'for an answer out of a list give structured_outputs: {"choice": [...]}',
}


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class StructuredOutputs(BaseModel):
    """What an answer must be, as vLLM has it: here one of a list."""

    model_config = ConfigDict(extra="forbid", strict=True)
    choice: Choices


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions.

    Temperature 0, the default, is greedy. Without a seed, drawn answers differ from call to call.
    `structured_outputs.choice`, or `guided_choice`, is a list that the answer is one of.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: Stops | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    structured_outputs: StructuredOutputs | None = None
    guided_choice: Choices | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in _NEUTRAL.items():
            if name in data and data[name] not in neutral:
                instead = _INSTEAD.get(name, "leave it out")
                raise fault(name, f"{name} is not supported here; {instead}")
        return {
            name: value
            for name, value in data.items()
            if value is not None and name not in _HARMLESS and name not in _NEUTRAL
        }

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            what = "max_tokens and max_completion_tokens differ; give one of them"
            raise fault("max_tokens", what)
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs", "top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "stream_options needs stream: true")
        if self.structured_outputs and self.guided_choice:
            what = "structured_outputs and guided_choice are both given; give one"
            raise fault("guided_choice", what)
        if self.choices and self.stop:
            what = "stop ends no answer that is one of a list of choices; leave it out"
            raise fault("stop", what)
        return self

    @property
    def choices(self) -> tuple[str, ...]:
        """What the answer is one of; () for any answer."""
        given = self.structured_outputs.choice if self.structured_outputs else self.guided_choice
        return tuple(given or ())

    @property
    def choices_field(self) -> str:
        """Where the list of choices stands."""
        return "structured_outputs.choice" if self.structured_outputs else "guided_choice"

    def sampling(self, most_tokens: int) -> Sampling:
        """As the engine takes it; without a limit of its own the answer has the server's."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        asked = self.max_completion_tokens or self.max_tokens or most_tokens
        return Sampling(
            max_new_tokens=asked,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
            stop=stop,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            choices=self.choices,
        )
