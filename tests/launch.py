"""Starts processes as torchrun would, each told its rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def started_together(processes: int, *command: object) -> list[subprocess.Popen[str]]:
    """That many processes of `python *command`; their output can be read as text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "PYTHONPATH": paths},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str]]:
    """Exit code and stderr of each, when all have ended."""
    found = []
    for process in processes:
        _, err = process.communicate(timeout=seconds)
        found.append((process.returncode, err))
    return found
