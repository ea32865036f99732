"""Cross-entropy over a large vocabulary that never holds the logits of the whole batch.

The gradient of a chunk of rows is known as soon as its logits are: both are made together, in the forward pass, and
what the backward pass needs is the gradient of the input and of the weight, not the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanokimi.model.layers import at_least_fp32
from nanokimi.products import as_multiplied, product

ROWS_PER_CHUNK = 512  # 100 MB of fp32 logits with a vocabulary of 49,152
CPU_STRIP = 4096  # entries of the vocabulary whose gradients are multiplied at once: a caches' worth of operands


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``-log softmax(x Wᵀ)[label]`` over the rows, in nats; the softmax is in fp32 or better.

    Args:
        x: ``[n, D]``.
        weight: ``[V, D]``.
        labels: int64 ``[n]``.
    """
    x, weight = as_multiplied(x), as_multiplied(weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, labels)  # type: ignore[no-untyped-call]
        return loss
    chunks = zip(x.split(ROWS_PER_CHUNK), labels.split(ROWS_PER_CHUNK), strict=True)
    return torch.stack([_chunk(rows, weight, targets)[0] for rows, targets in chunks]).sum() / len(x)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, with the gradients of ``x`` and ``weight`` made on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses, grad_x = [], torch.empty_like(x)
        grad_weight = torch.empty(weight.shape, dtype=at_least_fp32(weight[:0]).dtype, device=weight.device)
        for start in range(0, len(x), ROWS_PER_CHUNK):
            rows, targets = x[start : start + ROWS_PER_CHUNK], labels[start : start + ROWS_PER_CHUNK]
            loss, exponentials, total = _chunk(rows, weight, targets)
            grad = exponentials.div_(total * len(x))
            grad[targets, torch.arange(len(rows), device=x.device)] -= 1 / len(x)
            part = torch.ops.nanokimi.logit_gradients(grad.to(x.dtype), rows, weight, grad_weight, start == 0)
            grad_x[start : start + ROWS_PER_CHUNK] = part
            losses.append(loss)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return torch.stack(losses).sum() / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_weight * grad.to(grad_weight.dtype), None


@torch.library.custom_op("nanokimi::logit_gradients", mutates_args=("grad_weight",))
def _logit_gradients(grad: Tensor, rows: Tensor, weight: Tensor, grad_weight: Tensor, first: bool) -> Tensor:
    """From the gradient of logits ``[V, n]`` that of ``rows`` ``[n, D]``; adds (``first``: writes) that of ``weight``.

    On a CPU a strip of the vocabulary at a time: neither a transposed copy of the weight nor a second gradient of its
    size is made. An operator of its own: torch.compile would copy the whole gradient for each strip.
    """
    grad_rows = torch.zeros_like(rows, dtype=grad_weight.dtype)
    step = CPU_STRIP if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), step):
        strip = slice(start, start + step)
        part = product(grad[strip], rows)
        grad_weight[strip] = part if first else grad_weight[strip] + part
        grad_rows += product(grad[strip].mT, weight[strip])
    return grad_rows.to(rows.dtype)


@_logit_gradients.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, grad_weight: Tensor, first: bool) -> Tensor:
    return torch.empty_like(rows)


def _chunk(rows: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the rows' losses; the exponentials of their logits ``[V, n]`` and their totals ``[n]``.

    Transposed, so that the gradient of the weight finds its left operand in rows (see ``product``).
    """
    logits = at_least_fp32(product(weight, rows.mT))
    largest = logits.amax(dim=0)
    chosen = logits.gather(0, targets.unsqueeze(0)).squeeze(0) - largest
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(dim=0)
    return (total.log() - chosen).sum(), exponentials, total
