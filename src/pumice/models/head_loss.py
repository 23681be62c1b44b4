"""The loss behind the output head, a piece of the positions at a time.

Logits are the largest tensor of a training step: 4,000 supervised positions of a vocabulary of
32,000 are half a gigabyte in float32, and their gradient as much again. A piece's logits are turned
into their gradients at once, in place, and forgotten: the products are those of a whole head, and
memory holds one piece. After the fused linear cross entropy of Liger Kernel (arXiv 2410.10989).

Shapes: K supervised positions, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from pumice.models.language import LanguageModel

# Numbers of one piece of logits: 64 MiB in float32. Smaller ones are computed as a whole.
PIECE = 2**24


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """float[K, D], float[V, D], float[V], long[K] -> float[], the summed cross entropy."""
    device = hidden.device.type
    lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    loss: torch.Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, lower
    )
    return loss


def has_plain_head(language: LanguageModel) -> bool:
    """Whether logits are nothing but a linear layer of what comes before; asked of this model.

    Some families cap their logits, and no name says which. A factor on them does no harm: it comes
    to stand before the layer.
    """
    head = language.model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not torch.nn.Linear:
        return False
    with language.answering():
        ids = torch.arange(3, device=language.device)[None] % language.vocab_size
        keep = torch.ones_like(ids, dtype=torch.bool)
        hidden = language.embed(ids)
        logits, before = language(hidden, keep=keep), language(hidden, keep=keep, head=False)
        return before.shape[-1] == head.in_features and torch.allclose(
            head(before), logits, rtol=1e-5, atol=1e-8
        )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        lower: torch.dtype | None,
    ) -> torch.Tensor:
        wants = ctx.needs_input_grad
        table = weight if lower is None else weight.to(lower)
        states = hidden if lower is None else hidden.to(lower)
        shift = None if bias is None else bias.to(table.dtype)
        of_states = torch.empty_like(states) if wants[0] else None
        of_weight = torch.zeros_like(weight) if wants[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        loss = torch.zeros((), device=hidden.device)
        rows = max(1, PIECE // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(states), rows):
                piece, wanted = states[start : start + rows], targets[start : start + rows]
                logits = F.linear(piece, table, shift).float()
                loss += F.cross_entropy(logits, wanted, reduction="sum")
                if not any(wants):
                    continue
                # The gradient of a cross entropy: shares, less one at the target.
                share = torch.softmax(logits, -1, out=logits)
                share[torch.arange(len(wanted), device=share.device), wanted] -= 1.0
                share = share.to(table.dtype)
                if of_states is not None:
                    torch.mm(share, table, out=of_states[start : start + rows])
                if of_weight is not None:
                    of_weight += share.T @ piece
                if of_bias is not None:
                    of_bias += share.sum(0)
        ctx.save_for_backward(of_states, of_weight, of_bias)
        ctx.types = (hidden.dtype, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_states, of_weight, of_bias = ctx.saved_tensors
        (scale,) = gradients
        return (
            None if of_states is None else (of_states * scale).to(ctx.types[0]),
            None if of_weight is None else of_weight.mul_(scale),
            None if of_bias is None else of_bias * scale,
            None,
            None,
        )
