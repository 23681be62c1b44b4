"""A server on a port of its own, for the tests of the API and of the page."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx2
import uvicorn

from pumice.infer.model import Model
from pumice.serve.headers import InTime
from pumice.serve.limits import Limits
from pumice.serve.run import Served, Stopping, listen
from pumice.serve.server import Server


class Listening:
    """Whatever answers HTTP, on a port of its own."""

    def __init__(self, served: Served, api_key: str | None = None) -> None:
        config = uvicorn.Config(served.app, http=InTime, log_level="error", lifespan="on")
        self.uvicorn = Stopping(config, served)
        listener = listen("127.0.0.1", 0)
        self.address = listener.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([listener],), daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=60)

    def post(self, **body: Any) -> httpx2.Response:
        return self.http.post("/v1/chat/completions", json=body)

    def stop(self) -> None:
        self.http.close()
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def abandon_upload(address: tuple[str, int], api_key: str) -> None:
    """Sends the first sign of a question and leaves."""
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api_key}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n")  # fmt: skip
    with socket.create_connection(address) as client:
        client.sendall(f"{head}{{".encode())
        time.sleep(0.2)  # so that the request is being read when its client goes


class Running(Listening):
    """A model behind the API."""

    def __init__(self, model: Model, limits: Limits, api_key: str | None = None) -> None:
        self.server = Server(
            model, "pocket", limits=limits, api_key=api_key, local_host="127.0.0.1"
        )
        super().__init__(self.server, api_key)
