"""Products that the model and the optimizer are made of: matrices, groups of rows with a weight each, SwiGLU's gate.

On a CPU torch multiplies fp32 matrices with MKL, which uses half of the vector width of some processors. oneDNN, which
torch carries too, uses all of it: it is up to 2.2 times as fast with AVX-512, 1.1 times with AVX2 (docs/results.md).
On a few processors MKL is the faster: ``multiply_fp32_by`` says which of the two this process takes. Results differ in
the last bits only, as between any two libraries.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Library = Literal["onednn", "mkl"]  # what a CPU multiplies fp32 matrices with; mkl stands for torch's own, whichever

HAS_ONEDNN = torch.backends.mkldnn.is_available()
SMALL = 1 << 21  # multiply-adds: below, calling oneDNN costs more than its product gains
GRID = 16  # rows: see _window

_library: Library = "onednn" if HAS_ONEDNN else "mkl"


def multiply_fp32_by(library: Library) -> None:
    """Sets, for the whole process, what multiplies large fp32 matrices on a CPU from here on.

    Set it before the first step: torch.compile takes it for a constant, and compiles again if it has changed. Without
    oneDNN it stays ``mkl``.

    Raises:
        ValueError: an unknown library.
    """
    global _library
    if library not in get_args(Library):
        raise ValueError(f"{library!r}: choose one of {', '.join(get_args(Library))}")
    _library = library if HAS_ONEDNN else "mkl"


def fp32_library() -> Library:
    """What ``multiply_fp32_by`` has set; oneDNN where nothing has."""
    return _library


# ---- reference ----------------------------------------------------------------------------------


def reference_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` written out: ``[..., in] -> [..., out]`` with ``weight`` ``[out, in]``."""
    return x @ weight.mT


def reference_grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``grouped_linear`` written out, one product for each group."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ weight.mT for a, b, weight in zip(starts, ends.tolist(), weights, strict=True)])


def reference_gated(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) * x`` as autograd differentiates it."""
    return F.silu(gate) * x


# ---- linear layers, and the gate between them ---------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``reference_linear`` by the fastest library; autocast applies, gradients flow."""
    if torch.is_autocast_enabled(x.device.type) or not by_onednn(x.numel() * weight.shape[0], x, weight):
        return F.linear(x, weight)
    rows: Tensor = _Linear.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    out: Tensor = rows.unflatten(0, x.shape[:-1])
    return out


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


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of ``[m, k]`` and ``[k, n]`` in any strides; no gradient.

    oneDNN wants its left operand contiguous, and the right one contiguous or transposed: a view of a wider matrix takes
    it a thousand times as long. So a product whose operands are both transposed is computed transposed, and any other
    operand that does not fit is copied.
    """
    if not by_onednn(a.numel() * b.shape[1], a, b):
        return a @ b
    if a.mT.is_contiguous() and b.mT.is_contiguous():
        transposed: Tensor = _onednn(b.mT, a)
        return transposed.mT
    dense = b if b.is_contiguous() or b.mT.is_contiguous() else b.contiguous()
    out: Tensor = _onednn(a.contiguous(), dense.mT)
    return out


def by_onednn(multiply_adds: int, *operands: Tensor) -> bool:
    """Whether oneDNN is the library of this process, and these fp32 operands are large enough for it to be faster."""
    fits = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in operands)
    return fits and multiply_adds >= SMALL and _library == "onednn"


@torch.library.custom_op("nanokimi::onednn_product", mutates_args=())
def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ``; an operator of its own, as torch.compile knows oneDNN's product only with constant weights."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@_onednn.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


def as_multiplied(x: Tensor) -> Tensor:
    """``x`` in the type that autocast multiplies in, as it is where there is no autocast."""
    return x.to(multiplied_dtype(x))


def multiplied_dtype(x: Tensor) -> torch.dtype:
    """The type in which linear layers multiply ``x``: autocast's, or its own where there is no autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 where it already is: for what must not be computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """``reference_gated``, but only ``gate`` and ``x`` are kept for the backward pass."""
    out: Tensor = _Gated.apply(gate, x)  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    """Computes sigmoid and silu again in the backward pass: that is cheaper than to keep two tensors of their size."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return F.silu(gate) * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        return grad * x * (sigmoid + silu * (1 - sigmoid)), grad * silu


# ---- a weight for each group of rows ------------------------------------------------------------


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``x Wᵀ`` where each group of consecutive rows has a weight of its own; nothing is padded.

    Args:
        x: ``[n, in]``.
        weights: ``[groups, out, in]``.
        ends: int32 ``[groups]``, the row after the last one of each group; ascending, the last is n.

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


# These are operators of their own because the host has to know how long the groups are: torch.compile would break its
# graph there, but it does not look into an operator.


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
    """First row, row after the last, and number of each group that is not empty."""
    rows = [0, *ends.tolist()]
    return [(start, end, group) for group, (start, end) in enumerate(pairwise(rows)) if end > start]


def _window(start: int, end: int, x: Tensor, weights: Tensor) -> slice:
    """The rows to multiply for those from ``start`` to ``end``: for oneDNN some of their neighbours too.

    oneDNN compiles a kernel for each number of rows that it meets, in a millisecond, and keeps it. So numbers are
    rounded up to multiples of ``GRID``, and the results of the neighbours are left unread.
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


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` of rows, where ``order`` is a permutation and ``inverse`` its inverse; gradients flow."""
    out: Tensor = _Permutation.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


class _Permutation(torch.autograd.Function):
    """The gradient of ``index_select`` would add into zeros, since an index may name a row twice; this one does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
