"""`pumice page`: the page before an endpoint; what is asked goes there and back unchanged."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

import tiny
from conftest import Run
from pumice.core.llm_client import Endpoint
from pumice.infer.model import Model
from pumice.serve.forward import Forwarder
from pumice.serve.limits import Limits
from pumice.serve.run import listen
from serving import Listening, Running, abandon_upload

KEY, THEIRS = "of-the-endpoint", "of-the-page"
ASKED = {"messages": [{"role": "user", "content": "what is the cat"}], "max_tokens": 12}


@pytest.fixture(scope="module")
def endpoint(folders: SimpleNamespace) -> Iterator[Running]:
    lmm = tiny.new_lmm(folders.vision, folders.language)
    model = Model(lmm, tiny.processor_for(lmm, folders.language))
    running = Running(model, Limits(max_new_tokens=200, drain_seconds=1.0), KEY)
    yield running
    running.stop()


def forwarder(url: str, key: str | None = KEY, limits: Limits | None = None) -> Listening:
    given = Endpoint(url=f"{url}/v1", api_key=key)
    served = Forwarder(given, "pocket", limits=limits or Limits(), api_key=THEIRS if key else None)
    return Listening(served, THEIRS if key else None)


@pytest.fixture(scope="module")
def page(endpoint: Running) -> Iterator[Listening]:
    listening = forwarder(endpoint.url)
    yield listening
    listening.stop()


def test_answers_whole_and_streamed_and_errors_are_the_endpoint_s(
    page: Listening, endpoint: Running
) -> None:
    endpoint.post(**ASKED)  # from here on it knows the prompt
    for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
        there, here = (one.post(**ASKED, **more) for one in (endpoint, page))
        assert here.headers["content-type"] == there.headers["content-type"]
        assert _said(here) == _said(there)
    assert page.http.get("/v1/models").json() == endpoint.http.get("/v1/models").json()
    for bad in ({"messages": []}, {**ASKED, "max_tokens": 201}, {**ASKED, "model": "gpt-9"}):
        there, here = endpoint.post(**bad), page.post(**bad)
        assert (here.status_code, here.json()) == (there.status_code, there.json())
        assert here.status_code in (400, 404)
    client = openai.OpenAI(base_url=f"{page.url}/v1", api_key=THEIRS, max_retries=0)
    assert [model.id for model in client.models.list()] == ["pocket"]


def _said(answer: httpx2.Response) -> list[object]:
    """The texts of an answer, and its usage; ids and times differ from call to call."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    return [(event["choices"] and {**event["choices"][0]}, event.get("usage")) for event in events]


def test_keys_do_not_travel_further_than_they_must(page: Listening, endpoint: Running) -> None:
    for path in ("/", "/page/settings", "/page/page.js", "/v1/models"):
        assert KEY not in page.http.get(path).text
    stranger = httpx2.Client(base_url=page.url)
    assert stranger.get("/").status_code == stranger.get("/page/settings").status_code == 200
    assert stranger.post("/v1/chat/completions", json=ASKED).status_code == 401
    # A form of another site can be sent without asking; it must not reach the endpoint.
    key = {"Authorization": f"Bearer {THEIRS}", "Content-Type": "text/plain"}
    form = stranger.post("/v1/chat/completions", content=json.dumps(ASKED), headers=key)
    assert form.status_code == 400 and "application/json" in form.json()["error"]["message"]
    assert page.http.get("/v1/files").status_code == 404
    # Without a key of its own it sends what the person typed.
    open_to_all = forwarder(endpoint.url, key=None)
    try:
        assert open_to_all.post(**ASKED).json()["error"]["code"] == "invalid_api_key"
        typed = {"Authorization": f"Bearer {KEY}"}
        answer = open_to_all.http.post("/v1/chat/completions", json=ASKED, headers=typed)
        assert answer.status_code == 200
    finally:
        open_to_all.stop()


def test_without_a_key_of_its_own_it_answers_to_its_own_names(
    run: Run, endpoint: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(served: Forwarder, listener: socket.socket) -> None:
        listening = Listening(served)
        for path in ("/", "/v1/models"):
            refused = listening.http.get(path, headers={"Host": "a.test"})
            statuses.append(refused.status_code)
        listening.stop()

    statuses: list[int] = []
    monkeypatch.setattr("pumice.serve.run.run", told)
    monkeypatch.setenv("PUMICE_API_KEY", KEY)
    for more in ((), ("--host", "0.0.0.0"), ("--api-key", THEIRS)):
        assert run("page", f"{endpoint.url}/v1", "--port", 0, *more)[0] == 0
    # Otherwise any site could spend the endpoint's key.
    assert statuses == [403, 403, 200, 200, 200, 401]


def test_who_leaves_while_sending_and_faults_of_ours(
    page: Listening, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.addHandler(caplog.handler)
    try:
        abandon_upload(page.address, THEIRS)
        assert page.http.get("/page/settings").status_code == 200
        assert not caplog.records
    finally:
        uvicorn.removeHandler(caplog.handler)

    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(Forwarder, "_pass_on", fail)
    headers = {"Authorization": f"Bearer {THEIRS}"}
    answer = httpx2.post(f"{page.url}/v1/chat/completions", json=ASKED, headers=headers)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_endpoint(page: Listening, endpoint: Running, stream: bool) -> None:
    online = endpoint.server.online
    before, step = online.counters().cancelled, online._scheduler.step
    online._scheduler.step = lambda: (time.sleep(0.05), step())[1]  # type: ignore[method-assign]
    asked = {**ASKED, "max_tokens": 200, "temperature": 2.0, "seed": 0, "stream": stream}
    until = time.monotonic() + 20
    try:
        if stream:
            with page.http.stream("POST", "/v1/chat/completions", json=asked) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx2.ReadTimeout):
                page.http.post("/v1/chat/completions", json=asked, timeout=0.5)
        while online.counters().cancelled == before or online.counters().running:
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        online._scheduler.step = step  # type: ignore[method-assign]


def test_an_answer_on_its_way_when_the_page_ends_is_told(
    endpoint: Running, caplog: pytest.LogCaptureFixture
) -> None:
    page, online = forwarder(endpoint.url), endpoint.server.online
    page.uvicorn.config.timeout_graceful_shutdown = 1
    step = online._scheduler.step
    online._scheduler.step = lambda: (time.sleep(0.05), step())[1]  # type: ignore[method-assign]
    asked = {**ASKED, "max_tokens": 200, "temperature": 2.0, "seed": 0}
    try:
        with ThreadPoolExecutor(2) as pool:
            post = partial(page.http.post, "/v1/chat/completions")
            answers = [pool.submit(post, json={**asked, "stream": way}) for way in (True, False)]
            while online.counters().running < 2:
                time.sleep(0.02)
            page.uvicorn.handle_exit(signal.SIGINT, None)
            streamed, whole = (answer.result() for answer in answers)
    finally:
        online._scheduler.step = step  # type: ignore[method-assign]
    page.thread.join(20)
    page.http.close()
    assert (streamed.status_code, whole.status_code) == (200, 503)
    assert "the server is stopping" in whole.json()["error"]["message"]
    assert (
        "the server is stopping"
        in json.loads(streamed.text.split("data: ")[-1])["error"]["message"]
    )
    assert not any(record.exc_info for record in caplog.records)


def test_an_endpoint_that_is_gone_is_told(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    listening = forwarder(url)
    try:
        gone = listening.post(**ASKED)
        assert gone.status_code == 502 and "does not answer" in gone.json()["error"]["message"]
    finally:
        listening.stop()
    code, out, err = run("page", "pocket")
    assert (code, out) == (2, "") and "pumice serve pocket" in err


def test_the_command_serves_the_page_without_torch(endpoint: Running) -> None:
    program = f"""
import sys
from pumice.serve import run
from pumice.cli.app import main
def told(served, listener):
    sys.exit(served.model + (" with torch" if "torch" in sys.modules else " alone"))
run.run = told
main(["page", "{endpoint.url}/v1", "--port", "0"])
"""
    env = {"OPENAI_API_KEY": KEY, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, env=env)
    assert done.stderr.endswith("pocket alone\n"), done.stderr


class Broken(ThreadingHTTPServer):
    """An endpoint that sends these bytes to every question, and then closes the connection."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sends = b""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Broken

    def do_GET(self) -> None:
        self.wfile.write(self.server.sends)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(self.server.sends)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def broken() -> Iterator[Broken]:
    with Broken() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def test_what_an_endpoint_breaks_off_is_told(
    broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    def head(kind: str, length: int = 1000, more: str = "") -> bytes:
        told = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}\r\n"
        return told.encode()

    whole, half = b'data: {"choices": []}\n\n', b'data: {"cho'
    page = forwarder(broken.url, key=None)
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.addHandler(caplog.handler)
    try:
        for cut in (half, whole[:-1], b""):
            broken.sends = head("text/event-stream") + whole + cut
            lines = [line for line in page.post(**ASKED).text.split("\n") if line]
            # What is cut within a line is nothing that anybody could read.
            assert lines[:-1] == [whole.decode().strip()] * (2 if cut == whole[:-1] else 1)
            error = json.loads(lines[-1].removeprefix("data: "))["error"]
            assert "broke off its answer" in error["message"]
        no_gzip = head("application/json", 4, "Content-Encoding: gzip\r\n") + b"oops"
        for sends in (head("application/json") + b"{", b"no HTTP\r\n\r\n", no_gzip):
            broken.sends = sends
            told = page.post(**ASKED)
            assert told.status_code == 502 and "does not answer" in told.text
        broken.sends = (
            b"HTTP/1.1 301 Moved\r\nLocation: https://b.test/v1\r\nContent-Length: 0\r\n\r\n"
        )
        told = page.post(**ASKED)
        assert told.status_code == 502 and "leads on to https://b.test/v1" in told.text
        assert not caplog.records
    finally:
        uvicorn.removeHandler(caplog.handler)
        page.stop()


def test_an_address_that_leads_elsewhere_is_told(run: Run, broken: Broken) -> None:
    broken.sends = b"HTTP/1.1 308 Moved\r\nLocation: https://b.test/v1/models\r\n\r\n"
    code, out, err = run("page", f"{broken.url}/v1", "--port", 0)
    assert (code, out) == (2, "") and "leads on to https://b.test/v1/models" in err


def test_a_key_may_be_typed_where_even_the_models_ask_for_one(
    run: Run, endpoint: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Forwarder] = []
    monkeypatch.setattr("pumice.serve.run.run", lambda served, _: seen.append(served))
    for name in ("PUMICE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    asked = ("page", f"{endpoint.url}/v1", "--port", 0)
    code, _, err = run(*asked)
    assert code == 2 and "name the model by --api-model" in err
    assert run(*asked, "--api-model", "pocket")[0] == 0
    assert seen[0].model == "pocket" and seen[0].page_settings()["takes_key"]
    # A wrong key is not made good by any name.
    monkeypatch.setenv("PUMICE_API_KEY", "wrong")
    assert run(*asked, "--api-model", "pocket")[0] == 2
    monkeypatch.setenv("PUMICE_API_KEY", KEY)
    assert run(*asked)[0] == 0 and not seen[1].page_settings()["takes_key"]


def test_two_colons_are_all_addresses_of_both_kinds() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6, or none beside IPv4 on one port")
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=5).close()
    with listen("::1", 0) as listener, pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=5)


def test_an_empty_host_does_not_open_the_port_to_all(run: Run, endpoint: Running) -> None:
    code, _, err = run("page", f"{endpoint.url}/v1", "--port", 0, "--host", "")
    assert code == 2 and "--host is ''" in err
