"""torch.compile for the decoder's blocks, one block at a time: they are alike and compile once."""

from __future__ import annotations

import shutil

import torch
from transformers import AttentionInterface

from pumice.core.errors import PumiceError
from pumice.models.cross_attention import decoder_blocks
from pumice.models.lmm import LMM
from pumice.models.packed_attention import NAME, document_attention


def compile_blocks(lmm: LMM, device: str) -> None:
    """Compile the blocks of the language model for rows of any length, or refuse with the reason.

    `device` is the type of the device it will compute on.

    The first steps take minutes longer. Attention over packed rows stays outside: its number of
    documents is another one in each row, and each would be compiled anew.
    """
    check_compiler(device)
    AttentionInterface.register(NAME, torch.compiler.disable(document_attention))  # type: ignore[no-untyped-call]
    for block in decoder_blocks(lmm.language):
        # The method, not the module: what wraps it later (checkpointing, hooks) stays outside.
        block.forward = torch.compile(block.forward, dynamic=True)


def check_compiler(device: str) -> None:
    """Refuse a device for which torch.compile finds no compiler."""
    if not has_compiler(device):
        needed = (
            "a C++ compiler (g++ or clang++; the environment variable CXX names another)"
            if device == "cpu"
            else "Triton, which comes with torch for NVIDIA and AMD GPUs"
        )
        raise PumiceError(
            f"compile is asked for, and torch.compile needs {needed} for the device {device}, "
            f"which is not there. Install it, or leave compile out (in a recipe, compile: false)."
        )


def has_compiler(device: str) -> bool:
    """Whether torch.compile finds what it needs for this type of device."""
    if device != "cpu":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except (InvalidCxxCompiler, RuntimeError):
        return False
