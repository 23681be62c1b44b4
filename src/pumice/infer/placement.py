"""Where a model runs and in which precision: the defaults, and the check of what a user asks."""

from __future__ import annotations

import re

import torch

from pumice.core.distributed import local_rank, world_size
from pumice.core.errors import PumiceError
from pumice.core.registry import suggest

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DEVICE = re.compile(r"cpu|cuda(:(\d+))?")


def default_placement() -> tuple[torch.device, torch.dtype]:
    """The GPU with bfloat16 where there is one; otherwise the CPU with float32.

    Of several processes on a machine each takes the next GPU.
    """
    if torch.cuda.is_available():
        if world_size() == 1:
            return torch.device("cuda"), torch.bfloat16
        return torch.device("cuda", local_rank() % torch.cuda.device_count()), torch.bfloat16
    return torch.device("cpu"), torch.float32


def placement(
    device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """The device and dtype asked for, with defaults for what is None.

    bfloat16 is the default on every GPU, float32 on the CPU. Raises PumiceError for what is unknown
    or not here.
    """
    chosen = default_placement()[0] if device is None else _checked_device(device)
    if dtype is None:
        return chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return chosen, _checked_dtype(dtype)


def _checked_device(device: str | torch.device) -> torch.device:
    name = str(device)
    match = _DEVICE.fullmatch(name)
    if match is None:
        raise PumiceError(
            f"device {name!r} is unknown; allowed: cpu, cuda, cuda:N."
            f"{suggest(name, ('cpu', 'cuda'))} Leave the device out to take the best one."
        )
    if name != "cpu":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(match[2] or 0) >= count:
            here = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
            found = f"{count} GPUs" if count else "no GPU"
            raise PumiceError(
                f"device {name!r} is not here: torch {torch.__version__} finds {found}; allowed on "
                f"this machine: {here}. Leave the device out to take the best one, or install a "
                "torch and a driver that fit the GPU."
            )
    return torch.device(name)


def _checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    name = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str) and name in DTYPES:
        return DTYPES[name]
    raise PumiceError(
        f"dtype {name!r} is unknown; known: {', '.join(DTYPES)}.{suggest(name, DTYPES)} Leave the "
        "dtype out to take the one that suits the device."
    )
