"""Published figures of accelerators, for arithmetic about runs on machines that are not at hand.

From the makers' data sheets: dense bfloat16 with float32 accumulation, memory as the driver shows
it, bytes a second to memory and, in one direction, to the other accelerators of a machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pumice.core.errors import PumiceError
from pumice.core.registry import Registry


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator's peaks."""

    title: str
    flops: float
    memory: int
    bandwidth: float
    link: float


def _of(title: str, tera: float, gib: float, memory_gb: float, link_gb: float) -> Accelerator:
    return Accelerator(title, tera * 1e12, int(gib * 2**30), memory_gb * 1e9, link_gb * 1e9)


ACCELERATORS: Registry[Accelerator] = Registry(
    "GPU",
    {
        "a100-40g": _of("A100-40G", 312, 39.4, 1555, 300),
        "a100-80g": _of("A100-80G", 312, 79.1, 2039, 300),
        "h100-80g": _of("H100-80G", 989, 79.1, 3350, 450),
        "h200": _of("H200", 989, 139.8, 4800, 450),
        "b200": _of("B200", 2250, 178.0, 8000, 900),
        "mi300x": _of("MI300X", 1307, 191.7, 5300, 448),
        "l4": _of("L4", 121, 22.0, 300, 32),
        "l40s": _of("L40S", 362, 44.4, 864, 32),
        "a6000": _of("RTX A6000", 155, 47.4, 768, 32),
        "rtx3090": _of("RTX 3090", 71, 23.6, 936, 32),
        "rtx4090": _of("RTX 4090", 165, 23.5, 1008, 32),
    },
)


@dataclass(frozen=True, slots=True)
class Machine:
    """So many equal accelerators."""

    count: int
    each: Accelerator

    @property
    def title(self) -> str:
        """Such as 8 x A100-80G."""
        return f"{self.count} x {self.each.title}"


def read_machine(gpus: str, gpu: str | None = None) -> Machine:
    """A machine from `8xA100-80G`, or from `8` and the name of the GPU."""
    match = re.fullmatch(r"([1-9]\d*)(?:\s*x\s*(\S+))?", gpus.strip(), re.IGNORECASE)
    name = gpu if match is None or match[2] is None else match[2]
    if match is None or name is None or (match[2] is not None and gpu is not None):
        given = f"--gpus {gpus}" + ("" if gpu is None else f" --gpu {gpu}")
        raise PumiceError(
            f"the machine is given as {given!r}; a number and a name are needed, as in --gpus "
            f"8xA100-80G, or --gpus 8 --gpu a100-80g. Known: {', '.join(ACCELERATORS)}."
        )
    return Machine(int(match[1]), ACCELERATORS[name.lower()])
