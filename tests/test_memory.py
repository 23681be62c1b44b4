"""Memory that is no longer used goes back to the system; the most that was held is told."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from pumice.core import memory
from pumice.core.memory import give_back_memory


class Ring:
    """Holds itself."""

    def __init__(self) -> None:
        self.me = self


def held() -> int:
    """Bytes of the process's own memory that are in RAM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.skipif(
    memory._glibc("malloc_trim") is None or not Path("/proc/self/status").is_file(),
    reason="only glibc on Linux keeps freed blocks, and only Linux tells how many",
)
def test_freed_blocks_between_held_ones_leave_the_process() -> None:
    size, count = 100_000, 400  # below glibc's least size of a block of its own
    blocks = [bytearray(b"x") * size for _ in range(count)]
    before = held()
    pins = blocks[::50]
    del blocks
    give_back_memory()
    assert before - held() > size * count * 0.6
    assert len(pins) == 8


def test_what_only_a_cycle_holds_is_freed() -> None:
    gone = weakref.ref(Ring())
    give_back_memory()
    assert gone() is None


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda name: None)
    give_back_memory()
    memory.keep_freed_memory.__wrapped__()


_BLOCKS = """
import resource
from pathlib import Path
from pumice.core import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x]
    return int(line.split()[1]) * 1024

new = [faults(), faults()]
memory.keep_freed_memory()
kept = [faults(), faults()]
much = held()
memory.give_back_heap()
print(new[1], kept[1], much - held())
"""


@pytest.mark.skipif(
    memory._glibc("mallopt") is None or not Path("/proc/self/status").is_file(),
    reason="only glibc can be told to keep freed blocks, and only Linux tells how many it keeps",
)
def test_large_freed_blocks_are_kept_when_asked_and_can_still_be_given_back() -> None:
    told = subprocess.run(
        [sys.executable, "-c", _BLOCKS], capture_output=True, text=True, check=True
    )
    new, kept, given_back = map(int, told.stdout.split())
    assert new > 30 * max(kept, 1)
    assert given_back > 2**25


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(),
    reason="only Linux tells a process its own peak",
)
def test_a_peak_is_the_process_own_and_not_inherited() -> None:
    block = bytearray(b"x") * 2**28
    assert memory.peak_memory_bytes() >= len(block)
    asked = "from pumice.core.memory import peak_memory_bytes; print(peak_memory_bytes())"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert 2**20 < int(told.stdout) < 2**27
