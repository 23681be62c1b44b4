"""`pumice chat`: through a pipe, on a real terminal, and with a model behind an address."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import PIL.Image
import pytest

import tiny
from conftest import Run
from pumice.cli import chat
from pumice.cli.picture import drawn
from pumice.cli.talk import Talk
from pumice.core.errors import PumiceError
from pumice.core.llm_client import Endpoint, LLMClient
from pumice.core.types import Request, Result, Sampling, user
from pumice.infer import remote_stream
from pumice.infer.model import load
from pumice.infer.remote import RemoteModel
from pumice.serve.errors import event
from pumice.serve.limits import Limits
from pumice.world.scenes import random_scene, render
from serving import Running

QUESTION = "What color is the background?"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    render(random_scene(1)).save(path)
    return path


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))


def test_a_talk_through_a_pipe(run: Run, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def spoken(online: Any, request: Request) -> Generator[str, None, Result]:
        asked.append(request)
        yield from ("an ", "answer")
        return Result(text="an answer", finish_reason="length", new_tokens=7)

    monkeypatch.setattr(chat, "_spoken", spoken)
    typed(
        monkeypatch, "first", f"/image {scene}", "/image missing.png", "/imgae x", "/image",
        "", "/format short", "/reset all", "/exit 1", "second", "/format none", "/reset", "third",
        "/format shrt", "/help me", "/help", "/exit", "never read",
    )  # fmt: skip
    code, out, err = run("chat", "pocket", "--image", scene, "--temperature", 0.5)
    assert code == 1  # some of it was wrong, and nobody may be looking
    assert out == "an answer\n" * 3
    for said in ("missing.png", "Did you mean '/image'?", "needs a file", "192 x 192",
                 "Did you mean 'short'?", "/reset", "cut after 7 tokens", "/help takes nothing",
                 "/reset takes nothing behind it ('all')", "/exit takes nothing"):  # fmt: skip
        assert said in err
    first, second, third = (request.messages for request in asked)
    assert [part.image for part in first[-1].images] == [scene.read_bytes()]
    assert [message.role for message in second] == ["user", "assistant", "user"]
    assert second[1].text == "an answer"
    assert [part.image for part in second[-1].images] == [scene.read_bytes()]
    assert second[-1].text.endswith("second\nAnswer the question using a single word or phrase.")
    assert [message.text for message in third] == ["third"]
    assert asked[0].sampling.temperature == 0.5


def test_a_picture_stays_what_was_shown(scene: Path, tmp_path: Path) -> None:
    asked: list[Request] = []

    def speak(request: Request) -> Generator[str, None, Result]:
        asked.append(request)
        yield "so"
        return Result(text="so", finish_reason="stop")

    talk, file = Talk(speak, Sampling()), tmp_path / "shot.png"
    shown = [scene.read_bytes(), b""]
    file.write_bytes(shown[0])
    talk.hear(f"/image {file}")
    # As programs do that take pictures of the screen into one and the same file.
    PIL.Image.new("RGB", (8, 8)).save(file)
    shown[1] = file.read_bytes()
    talk.hear("what?")
    talk.hear(f"/image {file}")
    file.unlink()
    talk.hear("and now?")
    assert [[i.image for m in r.messages for i in m.images] for r in asked] == [shown[:1], shown]


def test_files_as_terminals_write_them(
    run: Run, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my cat's.png"
    path.write_bytes(scene.read_bytes())
    escaped = re.sub(r"([ '])", r"\\\1", str(path))
    ways = (str(path), f'"{path}"', escaped, path.as_uri())
    typed(monkeypatch, *(f"/image {way}" for way in ways))
    code, _, err = run("chat", "pocket")
    assert code == 0 and err.count("192 x 192") == len(ways)
    typed(monkeypatch, str(path), "/image 'half")
    code, _, err = run("chat", "pocket")
    assert code == 1 and f"/image {path}" in err and "'half does not exist" in err


def test_signs_that_end_lines_for_python_end_none_of_a_stream() -> None:
    answer = {"text": "one\u2028two\x85three\u2029four\x0c"}
    raw = json.dumps(answer, ensure_ascii=False)
    pieces = [part.encode() for part in (": wait\r\n\r\nda", f"ta: {raw}\r\n\r\n", "data: [DONE]")]
    stream = httpx2.Response(200, content=iter(pieces))
    assert list(remote_stream._events(stream, "http://x")) == [answer]
    # Ours are read right by those who take Python's lines.
    [line, _] = event(answer).splitlines()
    assert json.loads(line.removeprefix("data: ")) == answer


def test_a_reason_is_an_end_too() -> None:
    pieces = (
        '{"choices": [{"delta": {"content": "so"}}]}',
        '{"choices": [{"finish_reason": "stop"}]}',
    )
    for count in (2, 1):
        lines = [f"data: {piece}\n\n".encode() for piece in pieces[:count]]
        events = remote_stream._events(httpx2.Response(200, content=iter(lines)), "http://x")
        if count == 2:
            assert len(list(events)) == 2
            continue
        with pytest.raises(PumiceError, match="broke off"):
            list(events)


def test_an_answer_that_comes_at_once_is_an_answer() -> None:
    told = {"choices": [{"message": {"content": " so "}, "finish_reason": "length"}]}

    class AtOnce(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps(told).encode()
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Tests are quiet."""

    with HTTPServer(("127.0.0.1", 0), AtOnce) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        with LLMClient(Endpoint(url=url)) as client:
            stream = remote_stream.stream_remote(
                RemoteModel(client, "any"), Request((user("what?"),))
            )
            assert next(stream) == " so "
            with pytest.raises(StopIteration) as end:
                next(stream)
    assert (end.value.value.text, end.value.value.finish_reason) == ("so", "length")


@pytest.mark.parametrize(("said", "terminal"), [("", True), ("half", False), ("half", True)])
def test_what_is_told_of_a_stop_has_a_line_of_its_own(
    said: str, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak(request: Request) -> Generator[str, None, Result]:
        if said:
            yield said
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with pytest.raises(KeyboardInterrupt):
        Talk(speak, Sampling()).hear("what?")
    out, err = capsys.readouterr()
    # The terminal has written ^C; the answer's end leads on to a new line if it stands there, too.
    assert out == f"{said}\n" * bool(said) and err == "\n" * (not said or not terminal)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    server = Running(load("pocket", max_batch=2), Limits(max_new_tokens=300, drain_seconds=1.0))
    yield server
    server.stop()


def test_a_model_behind_an_address_answers_as_here(
    run: Run, running: Running, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (QUESTION, f"/image {scene}", "What do you see in the image?")
    typed(monkeypatch, *lines)
    code, out, err = run("chat", f"{running.url}/v1", "--image", scene)
    assert code == 0 and "error" not in err
    typed(monkeypatch, *lines)
    assert run("chat", "pocket", "--image", scene)[1] == out
    typed(monkeypatch, QUESTION)
    code, out, err = run("chat", f"{running.url}/v1", "--max-new-tokens", 301)
    assert (code, out) == (1, "") and "at most 300" in err


class Terminal:
    """`pumice chat` on a terminal of its own."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.end, child = pty.openpty()
        env = {**os.environ, "PUMICE_CACHE": str(home), "TERM": "xterm-256color", "COLUMNS": "80"}
        command = [sys.executable, "-m", "pumice", "chat", *arguments]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, env=env, start_new_session=True,
            # A runner in the background passes on that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def send(self, text: str) -> None:
        self.seen = ""
        os.write(self.end, text.encode())

    def interrupt(self, over: Callable[[float], bool]) -> None:
        """SIGINT, again where it got lost: readline misses one between its prompt and its wait."""
        for _ in range(6):
            self.process.send_signal(signal.SIGINT)
            if over(10):
                return
        raise AssertionError(self.seen)

    def shows(self, pattern: str, seconds: float) -> bool:
        """Whether it comes in this time."""
        with suppress(AssertionError):
            self.wait_for(pattern, seconds)
            return True
        return False

    def ends(self, seconds: float) -> bool:
        """Whether the process ends in this time."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return True
        return False

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        until = time.monotonic() + seconds
        while not re.search(pattern, self.seen, re.S):
            assert time.monotonic() < until, (pattern, self.seen)
            if select.select([self.end], [], [], 0.2)[0]:
                self.seen += os.read(self.end, 65536).decode(errors="replace")
        return self.seen


def test_a_talk_on_a_terminal(running: Running, scene: Path, tmp_path: Path) -> None:
    # A model behind an address, because its process starts in a fifth of the time.
    arguments = (f"{running.url}/v1", "--temperature", "2", "--max-new-tokens", "300")
    step = running.server.online._scheduler.step
    terminal = Terminal(tmp_path, *arguments)
    try:
        terminal.wait_for("Ctrl-D ends.*> ")
        terminal.send(f"/image {scene}\n")
        assert "▀" in terminal.wait_for("192 x 192.*> ")
        running.server.online._scheduler.step = lambda: (time.sleep(0.05), step())[1]  # type: ignore[method-assign]
        before = running.server.online.counters().cancelled
        terminal.send(f"{QUESTION}\n")
        terminal.wait_for(r"background\?\r\n[^\r\n]")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for(r"\(stopped; Ctrl-C again to leave\).*> ")
        running.server.online._scheduler.step = step  # type: ignore[method-assign]
        terminal.send("\x1b[A")  # the arrow up brings the question back
        assert QUESTION in terminal.wait_for(r"background\?")
        terminal.send("\x15/re\t\n")  # Tab makes it /reset
        terminal.wait_for(r"\(forgotten\).*> ")
        terminal.send(f"/im\t{scene}\n")  # and leaves a blank before the file
        terminal.wait_for(r"192 x 192.*> ")
        terminal.interrupt(partial(terminal.shows, r"\(Ctrl-C again to leave\).*> "))
        terminal.interrupt(terminal.ends)
        assert terminal.process.returncode == 0
        assert running.server.online.counters().cancelled > before
    finally:
        running.server.online._scheduler.step = step  # type: ignore[method-assign]
        terminal.process.kill()
        os.close(terminal.end)
    assert QUESTION in (tmp_path / "chat_history").read_text()


def test_a_picture_as_characters() -> None:
    picture = PIL.Image.new("RGB", (40, 4), "red")
    picture.paste((0, 0, 255), (0, 2, 40, 4))
    [line] = [line for line in drawn(picture, 20).split("\n") if line]
    assert len(line) == 20
    assert {str(span.style) for span in line.spans} == {"#ff0000 on #0000ff"}
    assert len(drawn(tiny.smooth(10, 1000), 80).split("\n", allow_blank=False)) == 16
