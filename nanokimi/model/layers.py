"""The small modules that every layer is made of: Linear, Embedding, RMSNorm, SwiGLU.

They are PyTorch's own with two differences: they draw no random numbers when they are made
(``Transformer.reset_parameters`` does), and ``param_role`` tells an optimizer what their parameters are.

Letters, the same in every file of the package: B batch, T sequence, S cached sequence, D model width,
H heads, N position-free, P rotary and V value head width, R latent rank, Q query rank,
E experts, K experts per token, F expert width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nanokimi.ops.products import gated, linear

LATENT_EPS = 1e-6  # of the norms inside attention: every engine that reads these weights hard-wires it

ParamRole: TypeAlias = Literal[
    "query_key",  # a matrix that attention logits depend on
    "matrix",  # any other hidden matrix, [out, in]
    "experts",  # a stack of matrices, [E, out, in]
    "embedding",
    "head",
    "norm",
]


class Linear(nn.Linear):
    """``x Wᵀ`` with weight ``[out, in]``, no bias; multiplied by the fastest library."""

    weight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, param_role: ParamRole = "matrix") -> None:
        super().__init__(in_features, out_features, bias=False)
        self.param_role = param_role

    def reset_parameters(self) -> None:
        """Leaves the weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` does no more than ``x Wᵀ``, so that its ``weight`` may be read instead of a call.

    A module with hooks or with an adapter around it has to be called: they would be passed over.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return isinstance(module, Linear) and not any(hooks)


class Embedding(nn.Embedding):
    """A row of width D for each of the vocabulary's entries."""

    param_role: ParamRole = "embedding"

    def reset_parameters(self) -> None:
        """Leaves the weight as it is."""


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich, 2019), in the type of ``x``."""

    param_role: ParamRole = "norm"

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).type_as(x)


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` (Shazeer, 2020)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, width)
        self.w2 = Linear(width, dim)
        self.w3 = Linear(dim, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(gated(self.w1(x), self.w3(x)))
        return out


class PreciseBuffers(nn.Module):
    """A module whose own buffers stay in fp32 or better: ``model.to(torch.bfloat16)`` casts weights alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            if buffer is not None:
                self._buffers[name] = precise(fn, buffer)
        return self


def precise(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn(tensor)``, where ``fn`` moves or casts, without the loss of any digit that fp32 holds."""
    after = fn(tensor)
    wanted = torch.promote_types(after.dtype, torch.float32) if after.is_floating_point() else after.dtype
    return after if after.dtype == wanted else tensor.to(after.device, wanted)
