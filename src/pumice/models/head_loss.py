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

if TYPE_CHECKING:
    from pumice.models.language import LanguageModel

# Numbers of one piece of logits: 64 MiB in float32.
PIECE = 2**24
# So few are computed as a whole, by autograd: it keeps them three times, 48 MiB.
WHOLE = 2**22


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
        of_weight = of_bias = None
        loss = torch.zeros((), device=hidden.device)
        rows = max(1, min(len(states), PIECE // len(weight)))
        # Every piece is computed where the last one was: fresh pages for each would cost more time
        # than the softmax. `scores` are the logits in float32, then the shares of the tokens.
        space = torch.empty(rows, len(weight), dtype=table.dtype, device=table.device)
        mixed = table.dtype != torch.float32
        wide = space.float() if mixed else space
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(states), rows):
                piece, wanted = states[start : start + rows], targets[start : start + rows, None]
                logits, scores = space[: len(piece)], wide[: len(piece)]
                if shift is None:
                    torch.mm(piece, table.T, out=logits)
                else:
                    torch.addmm(shift, piece, table.T, out=logits)
                if mixed:
                    scores.copy_(logits)
                loss += _to_shares(scores, wanted).sum()
                if not any(wants):
                    continue
                # The gradient of a cross entropy: shares, less one at the target.
                scores.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=scores.dtype))
                if mixed:
                    logits.copy_(scores)
                if of_states is not None:
                    torch.mm(logits, table, out=of_states[start : start + rows])
                if wants[1]:
                    of_weight = _added(of_weight, logits.T @ piece, weight)
                if bias is not None and wants[2]:
                    of_bias = _added(of_bias, logits.sum(0), bias)
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


def _to_shares(scores: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """float[K, V] logits become their softmax, in place; gives the cross entropy, float[K].

    `wanted` is long[K, 1]. From the share of the likeliest token, which cannot underflow.
    """
    most, place = scores.max(-1, keepdim=True)
    distance = most - scores.gather(1, wanted)
    torch.softmax(scores, -1, out=scores)
    return (distance - scores.gather(1, place).log()).squeeze(1)


def _added(total: torch.Tensor | None, more: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A sum over pieces, held in the type of `like`."""
    more = more.to(like.dtype)  # first, as an addition of two types is many times slower
    return more if total is None else total.add_(more)
