"""AdamW (Loshchilov and Hutter, 2019) for lists of parameters, in the order of operations of ``torch.optim.AdamW``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CPU_PIECE = 1 << 17  # numbers of a parameter at a time on a CPU: its cache holds them from one operation to the next


class Lists(NamedTuple):
    """Parameters, their gradients and both moments, in the same order."""

    parameters: list[Tensor]
    grads: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]


class AdamW(NamedTuple):
    """What one update depends on beside the tensors; ``step`` counts from 1."""

    step: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def reference_adamw_(of: Lists, by: AdamW) -> None:
    """The update as the paper writes it, operation by operation."""
    beta1, beta2 = by.betas
    torch._foreach_mul_(of.parameters, 1 - by.lr * by.weight_decay)
    torch._foreach_lerp_(of.means, of.grads, 1 - beta1)
    torch._foreach_mul_(of.squares, beta2)
    torch._foreach_addcmul_(of.squares, of.grads, of.grads, 1 - beta2)
    denominators = torch._foreach_sqrt(of.squares)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**by.step))
    torch._foreach_add_(denominators, by.eps)
    torch._foreach_addcdiv_(of.parameters, of.means, denominators, -by.lr / (1 - beta1**by.step))


def adamw_(of: Lists, by: AdamW) -> None:
    """One update in place of parameters and moments; no host synchronisation."""
    device = of.parameters[0].device.type
    if device == "cuda":
        fused(of, by)
        return
    for part in _in_pieces(of) if device == "cpu" else [of]:
        reference_adamw_(part, by)


def fused(of: Lists, by: AdamW) -> None:
    """In one kernel, that of ``torch.optim.AdamW(fused=True)``; differs from ``reference_adamw_`` in the last bits."""
    step = torch.full((), by.step, dtype=torch.float32, device=of.parameters[0].device)
    torch._fused_adamw_(
        *of, [], [step] * len(of.parameters), lr=by.lr, beta1=by.betas[0], beta2=by.betas[1],
        weight_decay=by.weight_decay, eps=by.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _in_pieces(of: Lists) -> Iterator[Lists]:
    """A few rows of one parameter at a time, and the same rows of what belongs to it."""
    for tensors in zip(*of, strict=True):
        rows = [tensor if tensor.ndim else tensor[None] for tensor in tensors]
        count = max(1, CPU_PIECE // max(1, rows[0][0].numel()))
        for pieces in zip(*(r.split(count) for r in rows), strict=True):
            yield Lists(*([piece] for piece in pieces))
