"""AdamW (Loshchilov and Hutter, 2019) for lists of parameters, in the order of operations of ``torch.optim.AdamW``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU_CHUNK = 1 << 17  # numbers of a parameter at a time on a CPU: its cache holds them from one operation to the next


class TensorLists(NamedTuple):
    """Parameters, their gradients and both moments, in the same order."""

    parameters: list[Tensor]
    grads: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]


class AdamWStep(NamedTuple):
    """What one update depends on beside the tensors; ``step`` counts from 1."""

    step: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def reference_adamw_(lists: TensorLists, by: AdamWStep) -> None:
    """The update as the paper writes it, operation by operation."""
    beta1, beta2 = by.betas
    torch._foreach_mul_(lists.parameters, 1 - by.lr * by.weight_decay)
    torch._foreach_lerp_(lists.means, lists.grads, 1 - beta1)
    torch._foreach_mul_(lists.squares, beta2)
    torch._foreach_addcmul_(lists.squares, lists.grads, lists.grads, 1 - beta2)
    denominators = torch._foreach_sqrt(lists.squares)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**by.step))
    torch._foreach_add_(denominators, by.eps)
    torch._foreach_addcdiv_(lists.parameters, lists.means, denominators, -by.lr / (1 - beta1**by.step))


def adamw_(lists: TensorLists, by: AdamWStep) -> None:
    """One update in place of parameters and moments; no host synchronisation."""
    device = lists.parameters[0].device.type
    if device == "cuda":
        fused_adamw_(lists, by)
    elif device == "cpu":
        for chunk in _chunks(lists):
            reference_adamw_(chunk, by)
    else:
        reference_adamw_(lists, by)


def fused_adamw_(lists: TensorLists, by: AdamWStep) -> None:
    """In one kernel, that of ``torch.optim.AdamW(fused=True)``; differs from ``reference_adamw_`` in the last bits."""
    # A tensor, since the kernel reads the step from the device; a number would have to be copied there.
    step = torch.full((), by.step, dtype=torch.float32, device=lists.parameters[0].device)
    rates: dict[str, Any] = {"lr": by.lr, "beta1": by.betas[0], "beta2": by.betas[1]}
    rates |= {"weight_decay": by.weight_decay, "eps": by.eps, "amsgrad": False, "maximize": False}
    torch._fused_adamw_(*lists, [], [step] * len(lists.parameters), **rates)


def _chunks(lists: TensorLists) -> Iterator[TensorLists]:
    """A few rows of one parameter at a time, and the same rows of what belongs to it."""
    for tensors in zip(*lists, strict=True):
        rows = [tensor if tensor.ndim else tensor[None] for tensor in tensors]
        count = max(1, CPU_CHUNK // max(1, rows[0][0].numel()))
        for chunks in zip(*(r.split(count) for r in rows), strict=True):
            yield TensorLists(*([chunk] for chunk in chunks))
