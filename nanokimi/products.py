"""Matrix products that the model and the optimizer are made of, by the fastest library that torch carries.

On a CPU torch multiplies fp32 matrices with MKL, which uses half of the vector width of some processors. oneDNN, which
torch carries too, does not: it is up to 2.2 times as fast where AVX-512 is, 1.1 times with AVX2 (docs/results.md).
Results differ in the last bits only, as between any two libraries.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Below this many multiply-adds the call costs more than the product gains.
SMALL = 1 << 21
GRID = 16  # rows: see _window
HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ``: ``[..., in] -> [..., out]`` with ``weight`` ``[out, in]``; autocast applies, gradients flow."""
    if torch.is_autocast_enabled(x.device.type) or not _by_onednn(x.numel() * weight.shape[0], x, weight):
        return F.linear(x, weight)
    rows: Tensor = _Linear.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    out: Tensor = rows.unflatten(0, x.shape[:-1])
    return out


def as_multiplied(x: Tensor) -> Tensor:
    """``x`` in the type that autocast multiplies in, as it is where there is no autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of ``[m, k]`` and ``[k, n]`` in any strides; no gradient.

    oneDNN wants the rows of its left operand in one piece, and the right one either so or transposed: a part of a wider
    matrix costs it a thousand times as much. A product of a transposed left operand is computed transposed, and only
    what fits neither way is copied.
    """
    if not _by_onednn(a.numel() * b.shape[1], a, b):
        return a @ b
    if a.mT.is_contiguous() and b.mT.is_contiguous():
        transposed: Tensor = _onednn(b.mT, a)
        return transposed.mT
    dense = b if b.is_contiguous() or b.mT.is_contiguous() else b.contiguous()
    out: Tensor = _onednn(a.contiguous(), dense.mT)
    return out


def _by_onednn(multiply_adds: int, *operands: Tensor) -> bool:
    """Whether oneDNN is there and gains."""
    fits = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in operands)
    return fits and multiply_adds >= SMALL and HAS_ONEDNN


@torch.library.custom_op("nanokimi::onednn_product", mutates_args=())
def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ``. An operator of its own: torch.compile knows oneDNN's only with constant weights."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@_onednn.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


class _Linear(torch.autograd.Function):
    """``x Wᵀ`` with both its gradients through ``product``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        return product(grad, weight) if wants_x else None, product(grad.mT, x) if wants_weight else None


# ---- one product for each group of rows ---------------------------------------------------------


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
    if count > len(x) or not _by_onednn(count * weights[0].numel(), x, weights):
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
