"""Matrix products that the model and the optimizer are made of, by the fastest library that torch carries.

On a CPU torch multiplies fp32 matrices with MKL, which uses half of the vector width of some processors. oneDNN, which
torch carries too, does not: it is up to 2.2 times as fast where AVX-512 is, 1.1 times with AVX2 (docs/results.md).
Results differ in the last bits only, as between any two libraries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Below this many multiply-adds the call costs more than the product gains.
SMALL = 1 << 21
HAS_ONEDNN = torch.backends.mkldnn.is_available()


def reference_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` written out: ``[..., in] -> [..., out]`` with ``weight`` ``[out, in]``."""
    return x @ weight.mT


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``reference_linear`` by the fastest library; autocast applies, gradients flow."""
    if torch.is_autocast_enabled(x.device.type) or not by_onednn(x.numel() * weight.shape[0], x, weight):
        return F.linear(x, weight)
    rows: Tensor = _Linear.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    out: Tensor = rows.unflatten(0, x.shape[:-1])
    return out


def as_multiplied(x: Tensor) -> Tensor:
    """``x`` in the type that autocast multiplies in, as it is where there is no autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 where it already is: for what must not be computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of ``[m, k]`` and ``[k, n]`` in any strides; no gradient.

    oneDNN wants the rows of its left operand in one piece, and the right one either so or transposed: a part of a wider
    matrix costs it a thousand times as much. A product of a transposed left operand is computed transposed, and only
    what fits neither way is copied.
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
