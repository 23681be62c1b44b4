"""What every result file says of where it was measured."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def where(script: str) -> dict[str, Any]:
    """The command and the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "machine": {
            "processor": names[0] if names else platform.machine(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
        },
    }


def status(key: str) -> int:
    """Bytes of a line of this process's status, such as VmRSS: what it holds now.

    VmHWM is the most it held, as getrusage's mark is inherited.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def write(name: str, record: dict[str, Any]) -> None:
    """The result file, also shown."""
    text = json.dumps(record, indent=1) + "\n"
    (RESULTS / name).write_text(text)
    sys.stdout.write(text)
