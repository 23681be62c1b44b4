"""The server under requests that nobody would send: no fault of its own, and alive afterwards.

    python benchmarks/fuzz_serve.py --examples 5000 --images 5000

schemathesis makes requests from the server's own OpenAPI description, sound and unsound ones; then
the bytes of images are changed, cut and mixed up in seven formats. Every answer must have a
status below 500 that the description allows, and every error OpenAI's shape with a cause. Writes
benchmarks/results/fuzz_serve.json.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import time
from collections import Counter
from typing import Any

import httpx2
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from measured import where, write
from server_process import serving

from pumice.world.scenes import random_scene, render

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
CHAT = "/v1/chat/completions"
NEW_TOKENS = 4


def main() -> None:
    """Run and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    options = ("--max-new-tokens", str(NEW_TOKENS))
    with serving("pocket", *options) as server:
        requests = fuzz_requests(server.url, arguments.examples, arguments.seed)
        images = fuzz_images(server.url, arguments.images, arguments.seed)
        check_alive(server.url)
    record = {
        **where("fuzz_serve.py"),
        "schemathesis": schemathesis.__version__,
        "answers_to_requests": requests,
        "answers_to_images": images,
        "faults": 0,
        "alive_afterwards": True,
        "ended_with": server.status,
        "seconds": round(time.monotonic() - start),
    }
    write("fuzz_serve.json", record)


def fuzz_requests(url: str, examples: int, number: int = 0) -> dict[str, dict[str, int]]:
    """Requests made from the OpenAPI description -> answers by path and status.

    AssertionError for a fault, with the request that caused it.
    """
    found: dict[str, dict[str, int]] = {}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for operation in (result.ok() for result in schema.get_all_operations()):
        statuses: Counter[str] = Counter()
        sound, unsound = (
            operation.as_strategy(generation_mode=mode)
            for mode in (
                schemathesis.GenerationMode.POSITIVE,
                schemathesis.GenerationMode.NEGATIVE,
            )
        )
        cases = sound | unsound | sound.map(answerable)
        _checked(cases, examples, number, statuses)()
        found[f"{operation.method.upper()} {operation.path}"] = dict(sorted(statuses.items()))
    return found


def _checked(cases: Any, examples: int, number: int, statuses: Counter[str]) -> Any:
    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def check(case: Any) -> None:
        answer = case.call()
        statuses[str(answer.status_code)] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        case.validate_response(answer, checks=[
            schemathesis.checks.not_a_server_error,
            schemathesis.specs.openapi.checks.status_code_conformance,
            schemathesis.specs.openapi.checks.content_type_conformance,
            schemathesis.specs.openapi.checks.response_schema_conformance,
        ])  # fmt: skip

    return check


def answerable(case: Any) -> Any:
    """A sound request changed into one that this server has an answer to, if it is one of chat."""
    if isinstance(case.body, dict):
        case.body.pop("model", None)
        case.body.pop("max_completion_tokens", None)
        case.body["max_tokens"] = NEW_TOKENS
        if not case.body.get("stream"):
            case.body.pop("stream_options", None)
        if not case.body.get("logprobs"):
            case.body.pop("top_logprobs", None)
        last = case.body["messages"][-1]
        last["role"] = "user"
        for part in last["content"] if isinstance(last["content"], list) else ():
            if part["type"] == "image_url":
                part["image_url"] = {"url": uri(PICTURE)}
        case.body["messages"] = [last]
    return case


def fuzz_images(url: str, count: int, number: int = 0) -> dict[str, int]:
    """Broken images -> answers by status; AssertionError for a fault."""
    rng = random.Random(number)
    sound = [encoded(seed, kind) for seed in range(4) for kind in FORMATS]
    statuses: Counter[str] = Counter()
    with httpx2.Client(base_url=url, timeout=120) as client:
        for _ in range(count):
            data = broken(rng, sound)
            answer = client.post(CHAT, json=question(data))
            statuses[str(answer.status_code)] += 1
            assert answer.status_code in (200, 400), (answer.text, data[:2000])
            if answer.status_code == 400:
                assert answer.json()["error"]["message"], data[:2000]
    return dict(sorted(statuses.items()))


def encoded(number: int, kind: str) -> bytes:
    """A scene as a file of this format."""
    buffer = io.BytesIO()
    render(random_scene(number)).save(buffer, kind)
    return buffer.getvalue()


def broken(rng: random.Random, sound: list[bytes]) -> bytes:
    """An image with some bytes changed, cut out, doubled, or put together with another."""
    data = bytearray(rng.choice(sound))
    match rng.randrange(5):
        case 0:  # the header, where sizes and offsets stand
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.randrange(min(len(data), 120))] = rng.choice((0, 1, 127, 128, 255))
        case 1:
            for _ in range(rng.choice((1, 8, 200))):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            del data[rng.randrange(len(data)) :]
        case 3:
            first = rng.randrange(len(data))
            del data[first : first + rng.randrange(1, 64)]
        case _:
            other = rng.choice(sound)
            data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]
    return bytes(data)


def question(data: bytes) -> dict[str, Any]:
    """A request that shows these bytes."""
    image = {"type": "image_url", "image_url": {"url": uri(data)}}
    content = [image, {"type": "text", "text": "What is this?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}


def uri(data: bytes) -> str:
    """As a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def check_alive(url: str) -> None:
    """An ordinary question is answered."""
    answer = httpx2.post(f"{url}{CHAT}", json=question(encoded(0, "PNG")), timeout=60)
    assert answer.status_code == 200, answer.text


PICTURE = encoded(0, "PNG")


if __name__ == "__main__":
    main()
