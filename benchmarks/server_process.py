"""`pumice serve` in a process of its own, for the benchmarks of the server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2


@dataclass
class Process:
    """A server, its address, and how it ended."""

    url: str
    pid: int
    status: int | None = None

    @property
    def resident_megabytes(self) -> int:
        """Memory that it holds."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        found = next(line for line in lines if line.startswith("VmRSS"))
        return round(int(found.split()[1]) / 1024)

    @property
    def kept_megabytes(self) -> int:
        """What of it is kept of images and prompts for later requests, by its own numbers."""
        told = httpx2.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        names = ("pumice_engine_prefix_bytes ", "pumice_engine_feature_bytes ")
        return round(sum(float(line.split()[1]) for line in told if line.startswith(names)) / 2**20)


@contextmanager
def serving(model: str, *options: str) -> Iterator[Process]:
    """A server while the block lasts; it must still be there at the end, and end when asked."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pumice", "serve", model, "--port", str(port), *options]
    child = subprocess.Popen(command)
    server = Process(f"http://127.0.0.1:{port}", child.pid)
    try:
        _wait_until_ready(server.url)
        yield server
        assert child.poll() is None, "the server ended by itself"
    finally:
        child.terminate()
        server.status = child.wait(60)


def _wait_until_ready(url: str) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.2)
    sys.exit("the server did not start")
