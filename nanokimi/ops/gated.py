"""The gate of SwiGLU (Shazeer, 2020): ``silu(gate) * x``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def reference_gated(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) * x`` as autograd differentiates it."""
    return F.silu(gate) * x


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """``reference_gated``, but only ``gate`` and ``x`` are kept for the backward pass."""
    out: Tensor = _Gated.apply(gate, x)  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
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
