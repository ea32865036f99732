"""Matrix products where each group of rows has a weight of its own, and the permutation that sorts rows into groups.

A mixture of experts is made of them: tokens sorted by expert, one dense block for each expert, nothing padded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nanokimi.ops.products import as_multiplied, by_onednn, product

GRID = 16  # rows: see _window


def reference_grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``grouped_linear`` written out, one product for each group."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ weight.mT for a, b, weight in zip(starts, ends.tolist(), weights, strict=True)])


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``x Wᵀ`` where each group of consecutive rows has a weight of its own; nothing is padded.

    Args:
        x: ``[n, in]``.
        weights: ``[groups, out, in]``.
        ends: int32 ``[groups]``, the row behind the last one of each group; ascending, the last is n.

    Returns:
        ``[n, out]``; autocast applies, gradients flow.
    """
    x, weights = as_multiplied(x), as_multiplied(weights)
    if _has_grouped_kernel(x, weights):
        return F.grouped_mm(x, weights.mT, offs=ends)
    out: Tensor = torch.ops.nanokimi.grouped_linear(x, weights, ends)
    return out


def _has_grouped_kernel(x: Tensor, weights: Tensor) -> bool:
    """Whether the device multiplies groups in one kernel, which never tells the host how long they are."""
    aligned = weights.shape[1] % 8 == 0 and weights.shape[2] % 8 == 0  # rows begin at multiples of 16 bytes
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and aligned and len(x) > 0


# Operators of their own: torch.compile does not look inside, where the host has to know how long the groups are.


@torch.library.custom_op("nanokimi::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(len(x), weights.shape[1])
    for start, end, group in _groups(ends):
        rows = _window(start, end, x, weights)
        out[start:end] = product(x[rows], weights[group].mT)[start - rows.start : end - rows.start]
    return out


@torch.library.custom_op("nanokimi::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(grad: Tensor, x: Tensor, weights: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weights = torch.empty_like(x), torch.empty_like(weights)
    busy = _groups(ends)
    for start, end, group in busy:
        rows = _window(start, end, x, weights)
        own = slice(start - rows.start, end - rows.start)
        grad_x[start:end] = product(grad[rows], weights[group])[own]
        by_column = grad.new_zeros(grad.shape[1], rows.stop - rows.start)  # neighbours' columns stay zero
        by_column[:, own] = grad[start:end].mT
        grad_weights[group] = product(by_column, x[rows])
    for group in set(range(len(weights))).difference(group for _, _, group in busy):
        grad_weights[group] = 0
    return grad_x, grad_weights


def _groups(ends: Tensor) -> list[tuple[int, int, int]]:
    """First row, row behind the last, and number of each group that is not empty."""
    rows = [0, *ends.tolist()]
    return [(start, end, group) for group, (start, end) in enumerate(pairwise(rows)) if end > start]


def _window(start: int, end: int, x: Tensor, weights: Tensor) -> slice:
    """The rows to multiply for those from ``start`` to ``end``: for oneDNN a few of their neighbours too.

    It compiles a kernel for each number of rows that it meets, in a millisecond, and keeps it. So numbers are rounded
    up to multiples of ``GRID``, and what comes of the neighbours is left unread.
    """
    count = -(-(end - start) // GRID) * GRID
    if count > len(x) or not by_onednn(count * weights[0].numel(), x, weights):
        return slice(start, end)
    first = min(start, len(x) - count)
    return slice(first, first + count)


@_grouped_linear.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.shape[1])


@_grouped_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weights, ends = ctx.saved_tensors
    grad_x, grad_weights = torch.ops.nanokimi.grouped_linear_backward(grad.contiguous(), x, weights, ends)
    return grad_x, grad_weights, None


_grouped_linear.register_autograd(_backward, setup_context=_save)


# ---- sorting rows into groups -------------------------------------------------------------------


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` of rows, whose gradient is gathered by ``inverse``: nothing is filled with zeros and added to."""
    out: Tensor = _Permutation.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


class _Permutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
