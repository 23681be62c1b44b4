"""The server as clients meet it: a real port, raw HTTP and OpenAI's client, good and bad input."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

import tiny
from conftest import Run
from pumice.core.errors import DataError
from pumice.infer.model import Model, load
from pumice.infer.online import Counters
from pumice.models.tiling import TilingSpec
from pumice.serve import headers, host_names, remote_images
from pumice.serve import pictures as pictures_module
from pumice.serve import server as server_module
from pumice.serve.answers import queued
from pumice.serve.leaving import ClientGone, Wanted
from pumice.serve.limits import Limits
from pumice.serve.run import listen
from pumice.world.scenes import random_scene, render
from serving import Listening, Running, abandon_upload

KEY = "a-key"
LIMITS = Limits(max_images=3, max_image_bytes=200_000, max_body_bytes=600_000, max_new_tokens=64,
                max_pixels=1_000_000, max_waiting=4, seconds=60.0, drain_seconds=1.0)  # fmt: skip
QUESTION = "What color is the background?"


@pytest.fixture(scope="module")
def model() -> Model:
    return load("pocket", max_batch=4)


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Running]:
    server = Running(model, LIMITS, KEY)
    yield server
    server.stop()


def picture(seed: int = 1, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    render(random_scene(seed)).save(buffer, kind)
    return buffer.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def messages(*images: str, text: str = QUESTION) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": i}} for i in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_it_answers_as_the_model_does_whole_and_streamed(running: Running, model: Model) -> None:
    asked = messages(uri(picture()), text="What do you see in the image?")
    wanted = model.ask("What do you see in the image?", images=[picture()], max_new_tokens=40)
    whole = running.post(messages=asked, max_tokens=40, logprobs=True, top_logprobs=2).json()
    [choice] = whole["choices"]
    assert choice["message"]["content"] == wanted.text
    assert choice["finish_reason"] == wanted.finish_reason
    assert whole["usage"]["prompt_tokens"] == wanted.prompt_tokens
    assert whole["usage"]["completion_tokens"] == wanted.new_tokens
    assert whole["usage"]["prompt_tokens_details"]["image_tokens"] == 36
    told = choice["logprobs"]["content"]
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in told)
    assert "".join(entry["token"] for entry in told) == wanted.text
    assert bytes(one for entry in told for one in entry["bytes"]).decode() == wanted.text
    assert all(entry["token"] == entry["top_logprobs"][0]["token"] for entry in told)
    stream = running.post(
        messages=asked, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    assert stream.headers["content-type"].startswith("text/event-stream")
    pieces = events(stream.text)
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces if p["choices"])
    assert text == wanted.text and len(pieces) > 5
    assert pieces[-1]["usage"]["completion_tokens"] == wanted.new_tokens
    assert pieces[-2]["choices"][0]["finish_reason"] == wanted.finish_reason
    # Each piece brings the log probabilities of its own tokens, as OpenAI's do.
    more = {"logprobs": True, "top_logprobs": 2, "stream": True, "max_tokens": 40}
    pieces = events(running.post(messages=asked, **more).text)
    parts = [(p["choices"][0]["logprobs"] or {}).get("content", []) for p in pieces]
    assert [token for part in parts for token in part] == told
    assert sum(1 for part in parts if part) > 5 and max(map(len, parts)) < 4


def test_answers_out_of_a_list(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
    asked: Any = messages(uri(picture()))
    colours = ["crimson", "dark red", "green", "grey", "turquoise"]

    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="pocket", messages=asked, **more)

    new = ask(extra_body={"structured_outputs": {"choice": colours}})
    old = ask(extra_body={"guided_choice": colours}, max_tokens=12)
    assert new.choices[0].message.content == old.choices[0].message.content in colours
    assert new.choices[0].finish_reason == "stop"
    # More than may wait here: they come as one.
    drawn = ask(extra_body={"guided_choice": colours}, n=8, temperature=2.0, seed=3).choices
    texts = {choice.message.content for choice in drawn}
    assert len(drawn) == 8 and texts <= set(colours)
    streamed = ask(extra_body={"guided_choice": ["one", "two"]}, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in streamed)
    assert text in ("one", "two")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"guided_choice": [" a"]}, "guided_choice", "blanks around it"),
        ({"structured_outputs": {"choice": [" a"]}}, "structured_outputs.choice", "blanks"),
        ({"guided_choice": ["a red dog"], "max_tokens": 1}, "max_tokens", "Raise max_tokens, or"),
        ({"guided_choice": ["a red dog"], "max_completion_tokens": 1}, "max_completion_tokens",
         "at most 1. Raise max_completion_tokens"),
        ({"guided_choice": ["red dog " * 99 + "x"]}, "guided_choice", "at most 64. Shorten the ch"),
        ({"messages": messages(text="why " * 325), "guided_choice": ["red dog " * 30 + "x"]},
         "guided_choice", "or the messages before"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_choices_is_told_of_their_field(
    running: Running, body: dict[str, Any], param: str, said: str
) -> None:
    answer = running.post(**{"messages": messages(), **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert said in error["message"] and "max_new_tokens" not in error["message"]


def test_openai_s_own_client(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
    assert [entry.id for entry in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").owned_by == "pumice"
    asked: Any = messages(uri(picture()))
    answer = client.chat.completions.create(model="pocket", messages=asked, max_tokens=20)
    stream = client.chat.completions.create(
        model="pocket", messages=asked, max_tokens=20, stream=True
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in stream)
    assert text == answer.choices[0].message.content
    drawn = [
        client.chat.completions.create(
            model="pocket", messages=asked, n=3, temperature=1.5, seed=7, max_tokens=12
        )
        for _ in range(2)
    ]
    texts = [[choice.message.content for choice in one.choices] for one in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    # An answer goes back as the client holds it, and without a seed no two draws need agree.
    told: Any = answer.choices[0].message.model_dump()
    rules: Any = {"role": "developer", "content": "Be brief."}
    talk = [rules, *asked, told, {"role": "user", "content": "Why?"}]
    free = {
        client.chat.completions.create(
            model="pocket", messages=talk, temperature=2, max_tokens=12
        ).choices[0].message.content
        for _ in range(4)
    }  # fmt: skip
    assert len(free) > 1
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here"):
        client.chat.completions.create(model="gpt-9", messages=asked)
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0).models.list()


def test_many_clients_at_once_get_what_each_gets_alone(running: Running, model: Model) -> None:
    cases = [(picture(seed), f"{QUESTION} {'Now' * (seed % 3)}") for seed in range(12)]
    wanted = [model.ask(text, images=[data], max_new_tokens=16).text for data, text in cases]

    def ask(case: tuple[bytes, str]) -> str:
        while True:
            answer = running.post(messages=messages(uri(case[0]), text=case[1]), max_tokens=16)
            if answer.status_code != 429:
                return str(answer.json()["choices"][0]["message"]["content"])
            assert int(answer.headers["retry-after"]) >= 1
            time.sleep(0.05)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, cases)) == wanted


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({}, "messages"),
    "empty": ({"messages": []}, "messages"),
    "role": ({"messages": [{"role": "boss", "content": "x"}]}, "role"),
    "part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "type"),
    "unknown field": ({"messages": messages(), "tempature": 1}, "tempature"),
    "tools": ({"messages": messages(), "tools": [{"type": "function"}]}, "tools"),
    "penalty": ({"messages": messages(), "frequency_penalty": 0.5}, "frequency_penalty"),
    "temperature": ({"messages": messages(), "temperature": "hot"}, "temperature"),
    "too hot": ({"messages": messages(), "temperature": 9}, "temperature"),
    "too long": ({"messages": messages(), "max_tokens": 65}, "at most 64"),
    "both lengths": ({"messages": messages(), "max_tokens": 3, "max_completion_tokens": 4}, "give"),
    "many choices": ({"messages": messages(), "n": 99}, "n:"),
    "stream options": ({"messages": messages(), "stream_options": {}}, "stream"),
    "many stops": ({"messages": messages(), "stop": ["x"] * 17}, "stop: List should have at most"),
    "odd stop": ({"messages": messages(), "stop": ["x", 5]}, "stop.1: Input should be a valid str"),
    "no stop": ({"messages": messages(), "stop": 5}, "stop: a string or a list of strings"),
    "long name": ({"messages": messages(), "x" * 9000: 5}, f"{'x' * 200}…: no such field"),
    "empty stop": ({"messages": messages(), "stop": ""}, "stop"),
    "message": ({"messages": ["hello"]}, "messages.0"),
    "message field": ({"messages": [{"role": "user", "content": "x", "name": "Eve"}]}, "name"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "content"),
    "no parts": ({"messages": [{"role": "user", "content": []}]}, "content"),
    "detail": ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:,", "detail": "huge"}}]}]}, "detail"),
    "json": ({"messages": messages(), "response_format": {"type": "json_object"}}, "structured_ou"),
    "no choices": ({"messages": messages(), "guided_choice": []}, "guided_choice"),
    "blank choice": ({"messages": messages(), "guided_choice": [" a"]}, "blanks around it"),
    "both choices": ({"messages": messages(), "guided_choice": ["a"],
                      "structured_outputs": {"choice": ["a"]}}, "give one"),
    "grammar": ({"messages": messages(), "structured_outputs": {"regex": "a"}}, "structured_outpu"),
    "choice and stop": ({"messages": messages(), "guided_choice": ["a"], "stop": "b"}, "stop"),
    "surrogate": ({"messages": messages(text="\ud800")}, "half a character"),
    "web address": ({"messages": messages("http://example.com/a.png")}, "fetches none"),
    "a file": ({"messages": messages("/etc/passwd")}, "only data URIs"),
    "file scheme": ({"messages": messages("file:///etc/passwd")}, "only data URIs"),
    "base64": ({"messages": messages("data:image/png;base64,####")}, "base64"),
    "no comma": ({"messages": messages("data:image/png")}, "comma"),
    "empty image": ({"messages": messages("data:image/png;base64,")}, "image"),
    "svg": ({"messages": messages(uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"))}, "image"),
    "text": ({"messages": messages(uri(b"hello there"))}, "image"),
    "cut short": ({"messages": messages(uri(picture()[:300]))}, "image"),
    "which one": ({"messages": messages(uri(picture()), uri(picture(2)[:300]))}, "image 2 of 2"),
    "four images": ({"messages": messages(*[uri(picture())] * 4)}, "at most 3"),
    "many bytes": ({"messages": messages(uri(bytes(200_001)))}, "at most 200000"),
    "long prompt": ({"messages": messages(text="why " * 3000)}, "positions"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_what_is_wrong(running: Running, name: str) -> None:
    body, said = BAD[name]
    answer = running.http.post(
        "/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and said in error["message"]
    # Whatever field is to blame is named for programs, too, and nothing long comes back.
    assert error["param"] and len(answer.text) < 800


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"messages": ', "Expecting value at character 13"),
        (b'{"messages": "h\xe9"}', "utf-8"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_what_is_no_json_is_told_with_its_cause(
    running: Running, content: bytes, said: str
) -> None:
    answer = running.http.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith("the body must be a JSON object") and error["param"] is None
    assert said in error["message"]


def test_detail_is_what_the_recipe_can_show(
    running: Running, folders: SimpleNamespace, model: Model
) -> None:
    def asked(detail: str) -> list[dict[str, Any]]:
        image = {"url": uri(picture()), "detail": detail}
        parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": QUESTION}]
        return [{"role": "user", "content": parts}]

    wanted = model.ask(QUESTION, images=[picture()], max_new_tokens=8).text
    for detail in ("auto", "high", "low"):
        answer = running.post(messages=asked(detail), max_tokens=8).json()
        assert answer["choices"][0]["message"]["content"] == wanted
    tiling = TilingSpec("hd", tiny.IMAGE_SIZE, max_tiles=4)
    lmm = tiny.new_lmm(folders.vision, folders.language, tiling=tiling)
    processor = tiny.processor_for(lmm, folders.language, tiling=tiling)
    tiled = Running(Model(lmm, processor), Limits(drain_seconds=1.0))
    try:
        assert tiled.post(messages=asked("high"), max_tokens=2).status_code == 200
        low = tiled.post(messages=asked("low"), max_tokens=2)
        assert low.status_code == 400 and "trained on tiles" in low.json()["error"]["message"]
    finally:
        tiled.stop()


def test_bombs_bodies_and_paths(running: Running) -> None:
    for size in ((20_000, 20_000), (1, 600_000)):
        bomb = io.BytesIO()
        Image.new("1", size).save(bomb, "PNG")
        answer = running.post(messages=messages(uri(bomb.getvalue())))
        assert answer.status_code == 400 and f"{size[0]} x {size[1]} pixels" in answer.text
    http = running.http
    large = http.post("/v1/chat/completions", content=b" " * 600_001)
    assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"

    def endless() -> Iterator[bytes]:
        for _ in range(700):
            yield b" " * 1000

    assert http.post("/v1/chat/completions", content=endless()).status_code == 413
    for content in (b"", b"[]", b'"x"', b"{", b"[" * 50_000, b'{"messages": NaN}', b"\xff\xfe"):
        broken = http.post("/v1/chat/completions", content=content)
        assert broken.status_code == 400 and broken.json()["error"]["message"]
    nothing = http.post("/v1/completions", json={}).json()["error"]
    assert nothing["type"] == "not_found_error" and "/v1/chat/completions" in nothing["message"]
    no_get = http.get("/v1/chat/completions")
    assert no_get.status_code == 405 and "allowed: POST" in no_get.json()["error"]["message"]
    assert http.get("/page/../server.py").status_code == 404


def counters(running: Running) -> Counters:
    return running.server.online.counters()


def wait_for(running: Running, finished: int) -> None:
    until = time.monotonic() + 30
    while counters(running).running or counters(running).cancelled < finished:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(
    running: Running, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before = counters(running).cancelled
    body = json.dumps({"messages": messages(text="Describe"), "max_tokens": 64, "stream": stream,
                       "temperature": 2.0, "seed": 0, "n": 4})  # fmt: skip
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
    slow = running.server.online._scheduler.step  # as a larger model would be
    running.server.online._scheduler.step = lambda: (time.sleep(0.05), slow())[1]  # type: ignore[method-assign]
    try:
        with socket.create_connection(running.address) as client:
            client.sendall((head + body).encode())
            while not counters(running).running:
                time.sleep(0.01)
        wait_for(running, before + 4)
        assert running.http.get("/health").status_code == 200
        gc.collect()  # the loop complains of what nobody waits for when that is thrown away
        assert not caplog.records
    finally:
        running.server.online._scheduler.step = slow  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_has_broken_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("a mistake of ours")

    server = Running(model, Limits(drain_seconds=1.0))
    monkeypatch.setattr(server.server.online._scheduler, "step", fail)
    try:
        first = server.post(messages=messages(text="x"))
        assert first.status_code == 500 and "has stopped" in first.json()["error"]["message"]
        server.server.online._thread.join(20)
        for refused in (server.post(messages=messages(text="x")), server.http.get("/health")):
            assert refused.status_code == 503
            assert "engine has stopped" in refused.json()["error"]["message"]
    finally:
        server.stop()


def test_health_metrics_models_and_the_page_s_paths(running: Running) -> None:
    http = running.http
    assert running.post(messages=messages(text="x"), max_tokens=1).status_code == 200
    assert http.get("/health").json()["status"] == "ok"
    text = http.get("/metrics").text
    for name in ("pumice_engine_new_tokens_total", "pumice_engine_reused_tokens_total",
                 "pumice_engine_running", "pumice_first_token_seconds_bucket"):  # fmt: skip
        assert name in text
    assert 'pumice_http_requests_total{path="/v1/chat/completions",status="200"}' in text
    open_to_all = httpx2.Client(base_url=running.url)
    assert open_to_all.get("/health").status_code == 200
    page = open_to_all.get("/")
    script = open_to_all.get("/page/page.js")
    # After an update no browser may go on with a part of the page before it.
    assert script.status_code == 200 and script.headers["cache-control"] == "no-cache"
    assert (
        page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    )
    told = open_to_all.get("/page/settings").json()
    assert told["model"] == "pocket" and told["takes_key"]
    plan = open_to_all.get("/page/image-plan", params={"width": 30, "height": 20}).json()
    assert plan == {"image_tokens": 36, "mode": "pad", "view": 96, "plan": None}
    for path in ("/metrics", "/v1/models"):
        refused = open_to_all.get(path)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    for given, status in {f"bearer {KEY}": 200, f"Basic {KEY}": 401, KEY: 401}.items():
        headers = {"Authorization": given}
        assert open_to_all.get("/v1/models", headers=headers).status_code == status
    for path in ("/", "/health"):
        assert open_to_all.head(path).status_code == 200
    # What is refused counts under its path; paths that are none count together, however many.
    for number in range(3):
        assert open_to_all.get(f"/nowhere/{number}").status_code == 401
        assert http.get(f"/v1/models/none-{number}").status_code == 404
    text = http.get("/metrics").text
    for path, status in {"/v1/models": 401, "/metrics": 401, "/page": 200, "other": 401}.items():
        assert f'pumice_http_requests_total{{path="{path}",status="{status}"}}' in text, text
    assert "nowhere" not in text and "none-" not in text


def test_a_local_server_without_a_key_answers_to_its_own_names(
    running: Running, model: Model
) -> None:
    local = Running(model, Limits(drain_seconds=1.0))
    try:
        ours = ("localhost", "LOCALHOST:80", "localhost.", "127.0.0.1:1", "127.9.9.9", "[::1]:1")
        for own in ours:
            assert local.http.get("/v1/models", headers={"Host": own}).status_code == 200
        for other in ("a.test", "a.test:80", "localhost.a.test", "127.0.0.1.a.test", "10.0.0.1", "",
                      "[::2]", "0.0.0.0", "localhost:x", "a/localhost", "[localhost]"):  # fmt: skip
            for path in ("/v1/models", "/", "/health"):
                refused = local.http.get(path, headers={"Host": other})
                assert refused.status_code == 403
                error = refused.json()["error"]
                assert error["code"] == "host_not_allowed" and repr(other) in error["message"]
                assert "localhost, 127.0.0.1, [::1]" in error["message"]
                assert "--api-key" in error["message"]
        asked = {"messages": messages(text="x"), "max_tokens": 1}
        headers = {"Host": "a.test"}
        refused = local.http.post("/v1/chat/completions", json=asked, headers=headers)
        assert refused.status_code == 403
    finally:
        local.stop()
    # Who does not know the key learns nothing by another name.
    assert running.http.get("/v1/models", headers={"Host": "a.test"}).status_code == 200


def test_no_connection_waits_for_an_acknowledgement_before_it_sends() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connected, _ = listener.accept()
        with connected:
            assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_only_a_port_of_this_machine_has_names_of_its_own() -> None:
    for address, local in {"127.0.0.1": "my-box", "0.0.0.0": None}.items():
        with socket.create_server((address, 0)) as listener:
            assert host_names.local_host("my-box", listener) == local
    assert host_names.foreign_host(b"My-Box:8000", "my-box") is None
    refused = host_names.foreign_host(b"a.test", "my-box")
    assert refused is not None and "[::1], my-box" in refused.message


def test_the_command_knows_whether_only_this_machine_reaches_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(served: Any, listener: socket.socket) -> None:
        listening = Listening(served)
        statuses.append(listening.http.get("/", headers={"Host": "a.test"}).status_code)
        listening.stop()

    statuses: list[int] = []
    monkeypatch.setattr("pumice.serve.run.run", told)
    monkeypatch.delenv("PUMICE_API_KEY", raising=False)
    for more in ((), ("--host", "localhost"), ("--host", "0.0.0.0"), ("--api-key", KEY)):
        assert run("serve", "pocket", "--port", 0, *more)[0] == 0
    assert statuses == [403, 403, 200, 200]


def test_a_fault_of_ours_is_counted_and_told_as_one(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(running.server, "_submit", fail)
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = {"messages": messages(text="x")}
    url = f"{running.url}/v1/chat/completions"
    answer = httpx2.post(url, json=asked, headers=headers)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    text = httpx2.get(f"{running.url}/metrics", headers=headers).text
    assert '{path="/v1/chat/completions",status="500"} 1.0' in text


def test_a_client_that_leaves_while_it_sends_is_no_wrong_request(running: Running) -> None:
    abandon_upload(running.address, KEY)
    counted = '{path="/v1/chat/completions",status="499"}'
    until = time.monotonic() + 20
    while counted not in running.http.get("/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_no_room_is_429_and_a_slow_answer_504(model: Model) -> None:
    server = Running(model, Limits(max_waiting=0, drain_seconds=0.1))
    online, go_on = server.server.online, threading.Event()
    step = online._scheduler.step
    online._scheduler.step = lambda: (go_on.wait(), step())[1]  # type: ignore[method-assign]
    # Long ago two answers took a fifth of a second; that nobody asked since then tells nothing.
    server.server._answers += [(0.0, 0.1), (5.0, 5.1)]
    try:
        with ThreadPoolExecutor(1) as pool:
            # It takes all places of the batch, though none may wait.
            first = pool.submit(server.post, messages=messages(), n=4, max_tokens=2)
            while len(online._handles) < 4:
                time.sleep(0.01)
            full = server.post(messages=messages())
            go_on.set()
            assert full.status_code == 429 and full.headers["retry-after"] == "1"
            assert full.json()["error"]["type"] == "rate_limit_error"
            assert len(first.result().json()["choices"]) == 4
    finally:
        go_on.set()
        server.stop()
    server = Running(model, Limits(seconds=0.4, drain_seconds=0.1))
    try:
        step = server.server.online._scheduler.step
        server.server.online._scheduler.step = lambda: (time.sleep(0.3), step())[1]  # type: ignore[method-assign]
        late = server.post(messages=messages(text="Describe"), temperature=2.0, seed=0)
        assert late.status_code == 504 and "0.4 seconds" in late.json()["error"]["message"]
    finally:
        server.stop()


def test_a_signal_lets_running_requests_end_and_refuses_new_ones(model: Model) -> None:
    server = Running(model, Limits(drain_seconds=30.0))
    step = server.server.online._scheduler.step
    server.server.online._scheduler.step = lambda: (time.sleep(0.03), step())[1]  # type: ignore[method-assign]
    asked = messages(uri(picture()), text="What do you see in the image?")
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, messages=asked, max_tokens=40)
        while not counters(server).running:
            time.sleep(0.01)
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        while not server.server.stopping:
            time.sleep(0.01)
        for refused in (server.post(messages=asked), server.http.get("/health")):
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert "stopping" in refused.json()["error"]["message"]
        assert whole.result().json()["choices"][0]["finish_reason"]
    server.thread.join(20)
    assert not server.thread.is_alive() and not server.uvicorn._captured_signals
    server.http.close()


def test_who_still_sends_when_the_server_ends_is_told(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    server = Running(model, Limits(drain_seconds=0.1))
    server.uvicorn.config.timeout_graceful_shutdown = 1
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n"
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(f"{head}{{".encode())
        time.sleep(0.2)
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        told = b"".join(iter(lambda: client.recv(4096), b""))
    server.thread.join(20)
    server.http.close()
    assert told.startswith(b"HTTP/1.1 503 ") and b"the server is stopping" in told
    assert "Traceback" not in caplog.text and not any(r.exc_info for r in caplog.records)


def test_a_second_signal_breaks_off_what_is_on_its_way(model: Model) -> None:
    server = Running(model, Limits(drain_seconds=60.0))
    step = server.server.online._scheduler.step
    server.server.online._scheduler.step = lambda: (time.sleep(0.1), step())[1]  # type: ignore[method-assign]
    long = {"messages": messages(), "guided_choice": [" ".join(["red"] * 200)], "n": 4}
    start = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.post, **long, stream=stream) for stream in (True, False, True)]
        while not counters(server).running or not counters(server).waiting:
            time.sleep(0.01)
        server.uvicorn.handle_exit(signal.SIGINT, None)
        while not server.server.stopping:
            time.sleep(0.01)
        server.uvicorn.handle_exit(signal.SIGINT, None)
        answers = [one.result() for one in asked]
    server.thread.join(20)
    # Before the twenty seconds that the first four answers take, and the forty of the others.
    assert not server.thread.is_alive() and time.monotonic() - start < 10
    assert [answer.status_code for answer in answers] == [200, 503, 200]
    assert all("the answer was not finished" in answer.text for answer in answers)
    server.http.close()


def test_what_is_kept_for_later_has_a_bound(model: Model) -> None:
    small = Model(model.lmm, model.processor, 4, kept_bytes=600_000)
    server = Running(small, Limits(drain_seconds=1.0))
    try:
        # Weights are laid out before the first request, which need not wait for it.
        assert small.engine._decoder and small.engine.memory.features._encoders
        for seed in range(12):
            assert server.post(messages=messages(uri(picture(seed))), max_tokens=2).is_success
        kept = counters(server)
        assert 0 < kept.prefix_bytes <= 400_000 and 0 < kept.feature_bytes
        assert kept.images_encoded == 12
    finally:
        server.stop()


def test_what_the_allocator_keeps_is_given_back(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = threading.Semaphore(0)
    monkeypatch.setattr(server_module, "_TIDY_SECONDS", 0.02)
    monkeypatch.setattr(server_module, "give_back_heap", given.release)
    server = Running(model, Limits(drain_seconds=1.0))
    try:
        assert given.acquire(timeout=20) and given.acquire(timeout=20)
    finally:
        server.stop()


def test_bodies_of_all_requests_together_have_a_limit(model: Model) -> None:
    server = Running(model, Limits(max_held_bytes=1000, drain_seconds=1.0))
    try:
        for _ in range(3):  # what was refused is not held any longer
            refused = server.post(messages=messages(text="x" * 2000))
            assert refused.status_code == 429 and refused.headers["retry-after"]
        assert server.post(messages=messages(text="x"), max_tokens=1).status_code == 200
    finally:
        server.stop()


def test_a_body_that_never_ends_is_told_in_the_time_of_a_request(model: Model) -> None:
    server = Running(model, Limits(seconds=0.5, drain_seconds=1.0))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n"
    try:
        with socket.create_connection(server.address, timeout=10) as client:
            client.sendall(f"{head}{{".encode())
            told = b"".join(iter(lambda: client.recv(4096), b""))
        assert told.startswith(b"HTTP/1.1 408 ") and b"within 0.5 seconds" in told
        answer = server.post(messages=messages(text="x"), max_tokens=1)
        assert answer.status_code == 200
    finally:
        server.stop()


def test_connections_that_never_finish_their_headers_are_closed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "SECONDS", 0.6)
    server = Running(model, Limits(drain_seconds=1.0))
    step = server.server.online._scheduler.step
    monkeypatch.setattr(
        server.server.online._scheduler, "step", lambda: (time.sleep(0.2), step())[1]
    )
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"

    def closed_after(client: socket.socket, sign: bytes = b"") -> float:
        start = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - start < 5:
                client.sendall(sign)
                client.settimeout(0.1)
                with suppress(TimeoutError):
                    if not client.recv(4096):
                        break
        return time.monotonic() - start

    try:
        with socket.create_connection(server.address) as client:
            assert 0.4 < closed_after(client) < 3
        for first in (b"", ask + b"\r\n"):  # also those of a second request
            with socket.create_connection(server.address) as client:
                client.sendall(first)
                if first:
                    assert client.recv(4096).startswith(b"HTTP/1.1 200")
                client.sendall(ask + b"X: ")
                assert 0.4 < closed_after(client, b"x") < 4
        # A long answer is no business of theirs, nor is a body that comes slowly.
        answer = server.post(
            messages=messages(text="Describe"), max_tokens=6, temperature=2.0, seed=0
        )
        assert answer.status_code == 200 and answer.elapsed.total_seconds() > 0.6
        body = json.dumps({"messages": messages(text="x"), "max_tokens": 1}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json"
        with socket.create_connection(server.address, timeout=10) as client:
            client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:5])
            time.sleep(1.0)
            client.sendall(body[5:])
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        server.stop()


def test_web_images_come_from_named_public_hosts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = frozenset({"pictures.test"})

    def fetch(url: str) -> bytes:
        return remote_images.fetch_image(url, hosts, max_bytes=1000, seconds=2)

    for url, said in {
        "http://other.test/a.png": "not a host to fetch from",
        "http://pictures.test:22/a.png": "not a host to fetch from",
        "ftp://pictures.test/a.png": "http and https",
        "http://me:secret@pictures.test/a.png": "without a password",
        "http://[::1": "no web address",
    }.items():
        with pytest.raises(DataError, match=said):
            fetch(url)
    for address in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "0.0.0.0", "224.0.0.1",
                    "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "fec0::1"):  # fmt: skip
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, found=found, **k: found)
        with pytest.raises(DataError, match="not public"):
            fetch("http://pictures.test/a.png")


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The look-ups of *.test, of which none ends; afterwards none is left."""
    asked, over, look_up = [], threading.Event(), socket.getaddrinfo

    def hang(host: str, *more: Any, **options: Any) -> list[Any]:
        if not str(host).endswith(".test"):
            return look_up(host, *more, **options)
        asked.append(host)
        over.wait()
        raise socket.gaierror("over")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield asked
    over.set()
    for _ in range(remote_images._MAX_LOOKUPS):
        assert remote_images._lookups.acquire(timeout=10)
    remote_images._lookups.release(remote_images._MAX_LOOKUPS)


def test_a_look_up_ends_with_the_time_of_the_image(hanging: list[str]) -> None:
    most = remote_images._MAX_LOOKUPS
    start = time.monotonic()
    for _ in range(most + 2):
        with pytest.raises(DataError, match="'slow.test' took too long to look up"):
            remote_images.fetch_image("http://slow.test/a.png", frozenset({"slow.test"}),
                                      max_bytes=1000, seconds=0.1)  # fmt: skip
    assert len(hanging) == most and time.monotonic() - start < 10


def test_slow_hosts_hold_up_nobody_else(model: Model, hanging: list[str]) -> None:
    limits = Limits(image_hosts=frozenset({"slow.test"}), fetch_seconds=4.0, drain_seconds=1.0)
    server = Running(model, limits)
    slow = messages("http://slow.test/a.png")
    try:
        with ThreadPoolExecutor(server_module._FETCHERS) as pool:
            waiting = [
                pool.submit(server.post, messages=slow) for _ in range(server_module._FETCHERS)
            ]
            while len(hanging) < server_module._FETCHERS:
                time.sleep(0.01)
            assert server.http.get("/health").status_code == 200
            quick = server.post(messages=messages(uri(picture())), max_tokens=2)
            assert quick.status_code == 200 and not any(one.done() for one in waiting)
        for one in waiting:
            error = one.result().json()["error"]
            assert one.result().status_code == 400 and "too long to look up" in error["message"]
    finally:
        server.stop()


def test_the_images_of_a_request_are_fetched_at_the_same_time(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(4)

    def fetch(url: str, *more: Any, **options: Any) -> bytes:
        together.wait(10)
        return picture(int(url[-1]))

    monkeypatch.setattr(pictures_module, "fetch_image", fetch)
    server = Running(model, Limits(image_hosts=frozenset({"a.test"}), drain_seconds=1.0))
    try:
        urls = [f"http://a.test/{number}" for number in range(4)]
        fetched = server.post(messages=messages(*urls), max_tokens=4).json()
        sent = [uri(picture(number)) for number in range(4)]
        wanted = server.post(messages=messages(*sent), max_tokens=4).json()
        assert fetched["choices"] == wanted["choices"]
    finally:
        server.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_in_which_images_are_fetched_counts(
    model: Model, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    over, given = threading.Event(), []

    def fetch(url: str, *more: Any, seconds: float, **options: Any) -> bytes:
        given.append(seconds)
        over.wait(10)
        return picture()

    monkeypatch.setattr(pictures_module, "fetch_image", fetch)
    limits = Limits(image_hosts=frozenset({"a.test"}), seconds=0.5, drain_seconds=1.0)
    server = Running(model, limits)
    try:
        urls = [f"http://a.test/{number}" for number in range(9)]
        late = server.post(messages=messages(*urls), stream=stream)
        assert late.status_code == 504 and "0.5 seconds" in late.json()["error"]["message"]
        # Not even begun, for the thread that fetches knows as well.
        over.set()
        assert max(given) <= 0.5 and len(given) < 9
        assert server.post(messages=messages(), max_tokens=1).status_code == 200
    finally:
        over.set()
        server.stop()


def test_what_is_queued_just_as_its_client_is_found_gone_is_cancelled() -> None:
    cancelled: list[str] = []

    async def ask() -> None:
        through = asyncio.Event()
        handle: Any = SimpleNamespace(cancel=lambda: cancelled.append("handle"))

        async def submit() -> list[Any]:
            await through.wait()
            return [handle]

        async def is_disconnected() -> bool:
            through.set()
            await asyncio.sleep(0.05)
            return True

        request: Any = SimpleNamespace(is_disconnected=is_disconnected)
        with pytest.raises(ClientGone):
            await queued(submit, request, Wanted(time.monotonic() + 60))
        await asyncio.sleep(0)

    asyncio.run(ask())
    assert cancelled == ["handle"]


def test_what_is_queued_when_nobody_waits_any_more_is_cancelled(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Running(model, Limits(seconds=0.4, drain_seconds=1.0))
    online, go_on = server.server.online, threading.Event()
    submit, queued = online.submit_together, []

    def late(requests: Any) -> Any:
        go_on.wait(10)
        queued.extend(submit(requests))
        return queued

    monkeypatch.setattr(online, "submit_together", late)
    try:
        assert server.post(messages=messages(text="Describe"), n=3).status_code == 504
        with suppress(httpx2.TimeoutException):  # of one who leaves nothing goes on either
            server.http.post("/v1/chat/completions", json={"messages": messages()}, timeout=0.1)
        # Held at the step, so that none of them could be done before it is cancelled.
        step = online._scheduler.step
        monkeypatch.setattr(online._scheduler, "step", lambda: (time.sleep(0.1), step())[1])
        go_on.set()
        while len(queued) < 4:
            time.sleep(0.01)
        ends = [handle.result(10).finish_reason for handle in queued]
        assert ends == ["cancelled"] * 4
    finally:
        go_on.set()
        server.stop()


def test_a_redirect_is_checked_like_the_first_address(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "/moved": "HTTP/1.1 302 Found\r\nLocation: http://inside.test/\r\n\r\n",
        "/round": "HTTP/1.1 302 Found\r\nLocation: /round\r\n\r\n",
        "/large": "HTTP/1.1 200 OK\r\n\r\n" + "x" * 5000,
        "/good": "HTTP/1.1 200 OK\r\n\r\nimage",
        "/gone": "HTTP/1.1 404 Not Found\r\n\r\n",
    }
    # One sign at a time, each soon enough for a timeout of the connection alone.
    drip = {"/slow": "HTTP/1.1 200 OK\r\nX: ", "/slow-body": "HTTP/1.1 200 OK\r\n\r\n"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connect = socket.create_connection

        def slowly(client: socket.socket, path: str) -> None:
            client.sendall(drip[path].encode())
            for _ in range(100):
                client.sendall(b"x")
                time.sleep(0.1)

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    path = client.recv(4096).split()[1].decode()
                    with suppress(OSError):
                        slowly(client, path) if path in drip else client.sendall(
                            answers[path].encode()
                        )

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        monkeypatch.setattr(remote_images, "_public_address", lambda *_: "203.0.113.1")
        monkeypatch.setattr(socket, "create_connection",
                            lambda address, **k: connect(("127.0.0.1", port), **k))  # fmt: skip

        def fetch(path: str, seconds: float = 5) -> bytes:
            return remote_images.fetch_image(
                f"http://pictures.test{path}", frozenset({"pictures.test"}), max_bytes=1000,
                seconds=seconds,
            )  # fmt: skip

        assert fetch("/good") == b"image"
        refused = {"/moved": "inside.test", "/round": "more than 3 times",
                   "/large": "more than 1000 bytes", "/gone": "HTTP 404"}  # fmt: skip
        for path, said in refused.items():
            with pytest.raises(DataError, match=said):
                fetch(path)
        for path in drip:
            start = time.monotonic()
            with pytest.raises(DataError, match="too long"):
                fetch(path, seconds=0.5)
            assert time.monotonic() - start < 3
