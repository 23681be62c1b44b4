"""A model behind an OpenAI-compatible endpoint, asked as a model in this process is.

What is sent is the question; its template and what becomes of a picture are the server's. Needs no
torch.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, Literal, get_args

import PIL.Image

from pumice.core.errors import DataError, PumiceError, some_of
from pumice.core.images import open_image
from pumice.core.llm_client import LLMClient
from pumice.core.llm_types import ChatRequest, Failure, Reply, chat_messages
from pumice.core.registry import check_choice
from pumice.core.types import ImagePart, Message, Part, Request, Result, Sampling
from pumice.models.constants import CLIP_MEAN

ImageForm = Literal["as-is", "square"]
"""as-is: the file's bytes. square: padded to a square with CLIP's mean colour, as LLaVA-1.5 does
before its vision backbone, for servers that would crop the picture."""

# Past so many failures of the endpoint in a row the others would fail too, each after its retries.
GIVE_UP_AFTER = 24
_OWN_KEYS = ("model", "messages", "stream", "n")
_MEAN_COLOR = tuple(int(value * 255) for value in CLIP_MEAN)


class RemoteModel:
    """Asks the model `name` of a client's endpoint; an open client is needed."""

    def __init__(
        self,
        client: LLMClient,
        name: str,
        *,
        images: ImageForm = "as-is",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """`extra` are keys of every request's body, beside ours and over them; None takes one out.

        Raises PumiceError for one that would change what is asked, or the form of the reply.
        """
        check_choice("the form of images", images, get_args(ImageForm))
        self.extra = dict(extra or {})
        if taken := [name for name in _OWN_KEYS if name in self.extra]:
            raise PumiceError(
                f"{' and '.join(taken)} of a request cannot be set; leave these to pumice."
            )
        self.client, self.name, self.images = client, name, images
        self._failures = 0
        self._lock = threading.Lock()

    def ask(self, request: Request) -> Result:
        """The answer to one request, or an error; never raises for a failure of the endpoint.

        An empty text counts as an answer only where the reply is complete and says so itself.
        """
        try:
            wanted = self.chat_request(request)
        except DataError as error:
            return Result(id=request.id, error=str(error))
        reply = self.client.ask(wanted)
        failure = reply.failure
        if failure is not None and not _says_nothing(reply):
            self._count(failure)
            return Result(id=request.id, error=f"the endpoint: {failure.reason}")
        self._count(None)
        if not _is_text(reply.text):
            cut = "the reply holds half a character (a lone surrogate), which is no text"
            return Result(id=request.id, error=f"the endpoint: {cut}")
        # As answers of a model here: LLaVA strips what it decodes.
        text = reply.text.strip()
        if wrong := not_chosen(request, text):
            return Result(id=request.id, error=f"the endpoint: {wrong}")
        return Result(
            id=request.id,
            text=text,
            finish_reason="length" if reply.finish_reason == "length" else "stop",
            prompt_tokens=reply.prompt_tokens,
            new_tokens=reply.completion_tokens,
        )

    def generate(
        self, requests: Sequence[Request], on_result: Callable[[Result], None] | None = None
    ) -> list[Result]:
        """One result per request, in their order; `on_result` hears of each as soon as it is there.

        Raises PumiceError when the endpoint fails again and again.
        """
        results: dict[Future[Result], Result] = {}
        finished = False
        with ThreadPoolExecutor(self.client.endpoint.concurrency, "remote") as pool:
            futures = [pool.submit(self.ask, request) for request in requests]
            try:
                for future in as_completed(futures):
                    results[future] = future.result()
                    if on_result is not None:
                        on_result(results[future])
                    self._check(results[future])
                finished = True
            finally:
                if not finished:
                    self._stop(pool, [f for f in futures if f not in results], on_result)
        return [results[future] for future in futures]

    def _stop(
        self,
        pool: ThreadPoolExecutor,
        futures: Sequence[Future[Result]],
        on_result: Callable[[Result], None] | None,
    ) -> None:
        """Sends nothing more; what is on its way is waited for, and answers among it are told."""
        self.client.stop()
        pool.shutdown(cancel_futures=True)
        for future in futures:
            if on_result and not future.cancelled() and future.result().error is None:
                on_result(future.result())

    def chat_request(self, request: Request) -> ChatRequest:
        """What is sent; raises DataError for a picture that cannot be."""
        messages = request.messages
        if self.images == "square":
            messages = tuple(map(_with_squares, messages))
        sampling = request.sampling
        return ChatRequest(
            self.name,
            chat_messages(messages),
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            options=_options(sampling) | self.extra,
        )

    def _count(self, failure: Failure | None) -> None:
        with self._lock:
            self._failures = 0 if failure is None else self._failures + 1

    def _check(self, result: Result) -> None:
        if self._failures >= GIVE_UP_AFTER:
            raise PumiceError(
                f"the last {self._failures} requests to {self.client.url} all failed; the last "
                f"says: {result.error}. What was answered is kept: see to the endpoint, and give "
                f"the same command again to go on."
            )


def choose_model(client: LLMClient, name: str | None) -> str:
    """The name of a model that the endpoint serves: the given one, or its only one.

    Raises PumiceError when the endpoint cannot be reached, or does not list this name.
    """
    served = client.models()
    if name is None and len(served) == 1:
        return served[0]
    if name is None:
        told = f"serves {some_of(served)}" if served else "does not list its models"
        raise PumiceError(
            f"{client.url} {told}, and none was named. Name one with --api-model, and check that "
            f"the address ends with its version, as http://host/v1."
        )
    if served:
        check_choice(f"the model of {client.url}", name, served)
    return name


def padded_square(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in the middle of a square of its longer side, CLIP's mean colour around it."""
    side = max(picture.size)
    square = PIL.Image.new("RGB", (side, side), _MEAN_COLOR)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _with_squares(message: Message) -> Message:
    return replace(message, content=tuple(map(_squared, message.content)))


def _squared(part: Part) -> Part:
    if not isinstance(part, ImagePart):
        return part
    buffer = io.BytesIO()
    padded_square(open_image(part.image)).save(buffer, format="PNG")
    return ImagePart(buffer.getvalue())


def _options(sampling: Sampling) -> dict[str, Any]:
    """What differs from a server's own defaults; greedy requests need none of it."""
    options: dict[str, Any] = {"stop": list(sampling.stop)} if sampling.stop else {}
    if sampling.choices:
        options["structured_outputs"] = {"choice": list(sampling.choices)}
    if sampling.temperature > 0:
        options["seed"] = sampling.seed
        options |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        options |= {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
    return options


def not_chosen(request: Request, text: str) -> str | None:
    """What is wrong with an answer that should be one of the choices; None for nothing."""
    choices = request.sampling.choices
    if not choices or text in choices:
        return None
    return (
        f"the answer {text[:80]!r} is none of the {len(choices)} choices; it does not know "
        f"structured_outputs, by which they are sent"
    )


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _says_nothing(reply: Reply) -> bool:
    """True for a complete reply whose text is there and empty: the model ended at once."""
    empty = reply.failure is not None and reply.failure.kind == "empty"
    return empty and reply.has_text and reply.finish_reason == "stop"
