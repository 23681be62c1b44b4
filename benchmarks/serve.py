"""Many clients at once on `pumice serve`: errors, times, tokens a second, and whether memory grows.

    python benchmarks/serve.py --clients 64 --seconds 120

Starts a server of its own in a process of its own. Half of the clients are OpenAI's, half are plain
HTTP; half of the requests stream. Writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import random
import statistics
import threading
import time
from collections import Counter
from typing import Any

import httpx2
import openai
from measured import where, write
from server_process import Process, serving

from pumice.world.scenes import random_scene, render

PICTURES = 200
QUESTIONS = (
    "What color is the background?\nAnswer the question using a single word or phrase.",
    "What do you see in the image?",
    "Describe the image in detail.",
    "How many shapes are there?",
)
SAMPLES = 48
ALONE = 50


def main() -> None:
    """Run and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--max-waiting", type=int, default=32)
    parser.add_argument("--kept-mib", type=int, default=96, help="filled within the time")
    arguments = parser.parse_args()
    options = ["--max-waiting", str(arguments.max_waiting)]
    options += ["--kept-mib", str(arguments.kept_mib)]
    with serving(arguments.model, *options) as server:
        alone = one_client(server.url)
        record = measure(server, arguments.clients, arguments.seconds)
    record = {
        **where("serve.py"),
        "model": arguments.model,
        "max_waiting": arguments.max_waiting,
        "kept_mib": arguments.kept_mib,
        "protocol": "clients that ask again at once (after 429: after Retry-After); an image each, "
        f"of {PICTURES} or, every fourth time, one never shown before; four questions, at most 48 "
        "tokens; half of the clients OpenAI's, half raw HTTP, half of the answers streamed; "
        "clients run on the same cores",
        "one_client_ms": alone,
        **record,
        "ended_with": server.status,
    }
    write("serve.json", record)


def one_client(url: str) -> dict[str, float]:
    """Milliseconds of one request after the other, in the middle of `ALONE` of each kind."""
    session = httpx2.Client(base_url=url, timeout=60)
    shown = picture(0)

    def short(stream: bool) -> None:
        body = {"messages": messages(shown, QUESTIONS[0]), "max_tokens": 8, "stream": stream}
        session.post("/v1/chat/completions", json=body).raise_for_status()

    kinds = {
        "models": lambda: session.get("/v1/models").raise_for_status(),
        "short_answer": lambda: short(False),
        "short_answer_streamed": lambda: short(True),
    }
    found = {}
    for name, ask in kinds.items():
        times = []
        for _ in range(ALONE):
            start = time.monotonic()
            ask()
            times.append(time.monotonic() - start)
        found[name] = round(statistics.median(times) * 1e3, 2)
    return found


def measure(server: Process, clients: int, seconds: float) -> dict[str, Any]:
    """Every client for so many seconds."""
    pictures = [picture(seed) for seed in range(PICTURES)]
    fresh = itertools.count(PICTURES)
    statuses: Counter[str] = Counter()
    taken: list[float] = []
    tokens: list[int] = []
    until = time.monotonic() + seconds

    def client(number: int) -> None:
        rng = random.Random(number)
        ask = ask_openai(server.url) if number % 2 else ask_http(server.url)
        while time.monotonic() < until:
            shown = picture(next(fresh)) if rng.random() < 0.25 else rng.choice(pictures)
            start = time.monotonic()
            status, new = ask(shown, rng.choice(QUESTIONS), rng.random() < 0.5)
            statuses[status] += 1
            if status == "200":
                taken.append(time.monotonic() - start)
                tokens.append(new)
            elif status == "429":
                time.sleep(1)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory, kept = [], []
    for _ in range(SAMPLES):
        time.sleep(seconds / SAMPLES)
        memory.append(server.resident_megabytes)
        kept.append(server.kept_megabytes)
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(taken, n=100)
    return {
        "answers_by_status": dict(statuses),
        "requests_per_second": round(len(taken) / seconds, 1),
        "new_tokens_per_second": round(sum(tokens) / seconds, 1),
        "seconds": {
            "p50": round(cuts[49], 2),
            "p90": round(cuts[89], 2),
            "p99": round(cuts[98], 2),
        },
        "second_half_megabytes_per_minute": growth(memory[SAMPLES // 2 :], seconds / SAMPLES / 60),
        "resident_megabytes": memory[3::4],
        "kept_for_later_megabytes": kept[3::4],
    }


def growth(memory: list[int], minutes: float) -> dict[str, float]:
    """The slope of samples so many minutes apart, and twice its standard error.

    The first half of a run is its warm-up: what is kept fills up, and kernels are compiled.
    """
    times = [minutes * place for place in range(len(memory))]
    slope, start = statistics.linear_regression(times, memory)
    apart = [value - start - slope * time for time, value in zip(times, memory, strict=True)]
    spread = len(memory) * statistics.pvariance(times)
    error = (sum(one * one for one in apart) / (len(memory) - 2) / spread) ** 0.5
    return {"slope": round(slope, 2), "plus_or_minus": round(2 * error, 2)}


def ask_http(url: str) -> Any:
    """Plain HTTP; a stream is read event by event."""
    session = httpx2.Client(base_url=url, timeout=300)

    def ask(image: str, text: str, stream: bool) -> tuple[str, int]:
        body = {"messages": messages(image, text), "max_tokens": 48, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        response = session.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return str(response.status_code), 0
        if not stream:
            return "200", response.json()["usage"]["completion_tokens"]
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]", lines[-1]
        return "200", json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"]

    return ask


def ask_openai(url: str) -> Any:
    """OpenAI's own client."""
    session = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(image: str, text: str, stream: bool) -> tuple[str, int]:
        asked: Any = {"model": session.models.list().data[0].id, "max_tokens": 48,
                      "messages": messages(image, text)}  # fmt: skip
        try:
            if not stream:
                answer = session.chat.completions.create(**asked)
                return "200", answer.usage.completion_tokens if answer.usage else 0
            usage = {"include_usage": True}
            pieces = session.chat.completions.create(**asked, stream=True, stream_options=usage)
            used = [piece.usage for piece in pieces if piece.usage]
            return "200", used[-1].completion_tokens
        except openai.APIStatusError as error:
            return str(error.status_code), 0

    return ask


def messages(image: str, text: str) -> list[dict[str, Any]]:
    """One question about one picture."""
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def picture(seed: int) -> str:
    """A scene as a data URI."""
    buffer = io.BytesIO()
    render(random_scene(seed)).save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    main()
