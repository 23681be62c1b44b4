"""A model shared out over the processes that train it, and put together again (FSDP2).

Each block of the decoder, and of a vision backbone that learns, is one unit: its weights, gradients
and optimizer states are split over all processes and gathered while it computes. Embeddings, output
head, connector and gated layers are one more unit, gathered for the whole of a forward and backward
pass. A frozen vision backbone is whole in every process.

What computes with a shared model calls `LMM.forward` (`loss`, `logits`), in all processes alike, or
else does so within `computable`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pumice.core.distributed import local_rank, world_size
from pumice.core.errors import PumiceError
from pumice.core.processes import ALONE, Processes
from pumice.models.recompute import block_lists, checkpoint_blocks
from pumice.train.dealing import Dealer

if TYPE_CHECKING:
    from pumice.models.lmm import LMM


def mixed_precision_pays() -> bool:
    """True where bfloat16 is native: the GPU, or a CPU with AVX512-BF16. Elsewhere it is slower."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def training_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() if world_size() > 1 else torch.cuda.current_device())


class SharedModel:
    """The model of a stage as its processes hold it; with one process it is the model itself."""

    def __init__(
        self,
        lmm: LMM,
        group: Processes = ALONE,
        *,
        checkpointing: str = "none",
        compiled: bool = False,
    ) -> None:
        """Shares `lmm` out, in place, and puts it where it is trained."""
        self.lmm, self.group = lmm, group
        self.half = mixed_precision_pays()
        """Whether it computes in bfloat16; its weights and what the optimizer keeps are float32."""
        device = training_device()
        if group.size == 1:
            _prepare_blocks(lmm.to(device), checkpointing, compiled)
            return
        # Its structure, to be filled when training is over; nobody else needs it.
        self._outline = _outline(lmm) if group.is_main else None
        # Only now: a copy of a wrapped block would compute with the block it was copied from.
        _prepare_blocks(lmm, checkpointing, compiled, device.type)
        learns = {name for name in ("vision", "connector") if _learns(lmm.part(name))}
        lmm.always_looks = bool(learns)
        # It computes with the model to find out, which only the process that has it whole can.
        lmm.language.plain_head = group.from_main(lmm.language.has_plain_head)
        _shard(lmm, device, group, whole_vision="vision" not in learns, half=self.half)

    def whole(self) -> LMM | None:
        """In the main process the model with all its weights, in the others None; once, at the end.

        All processes call it, and none trains on afterwards.
        """
        if self.group.size == 1:
            return self.lmm
        places = iter(() if self._outline is None else self._outline.parameters())
        for tensor in gathered(self.lmm):
            if self._outline is not None:
                next(places).data = tensor.to("cpu", copy=True)
        if self._outline is None:
            return None
        # Buffers are shared with the model that was trained, and may be on its GPU.
        return self._outline.to("cpu")


def _prepare_blocks(
    lmm: LMM, checkpointing: str, compiled: bool, device: str | None = None
) -> None:
    from pumice.models.compiled import compile_blocks

    if compiled:
        compile_blocks(lmm, device or lmm.device.type)
    checkpoint_blocks(lmm, checkpointing)


def gathered(module: nn.Module) -> Iterator[torch.Tensor]:
    """Each parameter whole, in all processes; they must all go through to the end."""
    for parameter in module.parameters():
        yield whole_tensor(parameter.detach())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a part -> all of it, in all processes."""
    full = getattr(tensor, "full_tensor", None)
    whole: torch.Tensor = tensor if full is None else full()
    return whole


@contextmanager
def computable(lmm: LMM) -> Iterator[None]:
    """While it lasts, `lmm` may be computed with apart from `LMM.forward`, by all processes alike.

    What is gathered for a whole forward pass is; blocks gather themselves.
    """
    from torch.distributed.fsdp import FSDPModule

    root: Any = lmm
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _shard(
    lmm: LMM, device: torch.device, group: Processes, *, whole_vision: bool, half: bool
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (group.size,))
    # Inputs keep their type: autocast says what is computed in bfloat16, as with one process.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # One unit after the other is dealt out and split, so that no other process than the main one
    # ever holds more than its share and one whole unit.
    dealer = Dealer(lmm, group, device)
    if whole_vision:
        dealer.deal(lmm.vision)
    for blocks in block_lists(lmm):
        for block in blocks:
            dealer.deal(block)
            fully_shard(block, mesh=mesh, mp_policy=policy)
    dealer.deal(lmm)
    left_out = set(lmm.vision.parameters()) if whole_vision else set()
    fully_shard(lmm, mesh=mesh, ignored_params=left_out)
    for module in lmm.modules():
        if isinstance(module, FSDPModule):
            # A process's loss is its part of the sum over all of them, so gradients add up. gloo
            # can only add, hence the second line.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if lmm.cross_attention is not None:
        _exchange_unused(lmm)


def _exchange_unused(lmm: Any) -> None:
    """Gated layers that see no image in one process take part in the exchange of the others'."""
    if not hasattr(lmm, "set_reduce_scatter_unused_params"):
        raise PumiceError(
            f"torch {torch.__version__} cannot train gated cross-attention on several processes; "
            f"2.13 and newer can. Install it, or train with one process."
        )
    lmm.set_reduce_scatter_unused_params(True, recurse=False)


def _outline(lmm: LMM) -> LMM:
    """A copy that shares buffers and whose parameters take no memory but may be given some.

    One number stands for each: `data` can be set to a tensor of the same shape, and weights that
    are tied stay so.
    """
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), p.requires_grad)
        for p in lmm.parameters()
    }
    return copy.deepcopy(lmm, empty | {id(buffer): buffer for buffer in lmm.buffers()})
