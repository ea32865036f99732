"""The small parts every layer is made of: Linear, RMSNorm, SwiGLU.

Letters, the same in every file of the package: B batch, T sequence, S cached sequence, D model width,
H heads, N position-free, P rotary and V value head width, R latent rank, Q query rank,
E experts, K experts per token, F expert width, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nanokimi.products import linear

LATENT_EPS = 1e-6  # of the norms inside attention: every engine that reads these weights hard-wires it


class Linear(nn.Module):
    """``x Wᵀ`` with weight ``[out, in]``, no bias; the weight is left for ``Transformer`` to initialise."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps).type_as(x)


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` (Shazeer, 2020)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, width)
        self.w2 = Linear(width, dim)
        self.w3 = Linear(dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.w1.weight, self.w2.weight, self.w3.weight)


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """``[..., D] -> [..., D]`` with ``w1``, ``w3`` ``[F, D]`` and ``w2`` ``[D, F]``."""
    return linear(gated(linear(x, w1), linear(x, w3)), w2)


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) * x``; keeps its operands for the backward pass and nothing else."""
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


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 where it already is: for what must not be computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
