"""The small parts that every layer is made of: Linear, Embedding, RMSNorm, SwiGLU, rotary positions.

The modules are PyTorch's own with two differences: they draw no random numbers when they are made
(``Transformer.reset_parameters`` does), and ``param_role`` tells an optimizer what their parameters are.

Letters, the same in every file of the package: B batch, T sequence, S cached sequence, D model width,
H heads, N position-free, P rotary and V value head width, R latent rank, Q query rank,
E experts, K experts per token, F expert width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nanokimi.config import ModelConfig
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


# ---- rotary positions ---------------------------------------------------------------------------
#
# RoPE (Su et al., 2021), and YaRN (Peng et al., 2023), which stretches it to longer contexts. YaRN as DeepSeek-V3 uses
# it (its report, section 4.3): pairs that turn often within the original context stay as they are, pairs that hardly
# turn are slowed down by ``rope_factor``, those between are blended; and because longer contexts flatten the attention,
# its logits grow by a factor that depends on ``rope_factor``.


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[max_seq_length, P / 2]`` in fp32 for every position of the context and every pair."""
    angles = torch.outer(torch.arange(config.max_seq_length, dtype=torch.float32), frequencies(config))
    scale = _growth(config, 1.0)  # where mscale and mscale_all_dim are not told apart: as in the paper, section 3.4
    if config.mscale and config.mscale_all_dim:
        scale = _growth(config, config.mscale) / _growth(config, config.mscale_all_dim)
    return angles.cos() * scale, angles.sin() * scale


def frequencies(config: ModelConfig) -> Tensor:
    """Radians per token of each pair ``[P / 2]``: ``theta ** (-2 i / P)``, stretched by YaRN (its section 3.2)."""
    width = config.qk_rope_head_dim
    powers = config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if config.rope_factor == 1:
        return 1.0 / powers
    first = max(math.floor(_pair_that_turns(config, config.beta_fast)), 0)
    last = min(math.ceil(_pair_that_turns(config, config.beta_slow)), width - 1)
    pairs = torch.arange(len(powers), dtype=torch.float32)
    kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return 1.0 / (config.rope_factor * powers) * (1 - kept) + 1.0 / powers * kept


def _pair_that_turns(config: ModelConfig, turns: float) -> float:
    """Index, not a whole number, of the pair that makes so many full turns over the original context."""
    length, width = config.original_seq_len, config.qk_rope_head_dim
    return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def softmax_scale(config: ModelConfig) -> float:
    """The factor of attention logits: ``(N + P) ** -0.5``, corrected for YaRN over all dimensions."""
    return float(config.qk_head_dim**-0.5 * _growth(config, config.mscale_all_dim) ** 2)


def _growth(config: ModelConfig, mscale: float) -> float:
    """Square root of the factor by which logits grow when the context does; 1 without YaRN."""
    return 0.1 * mscale * math.log(config.rope_factor) + 1.0


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the interleaved pairs (0, 1), (2, 3), ... of ``x``.

    Args:
        x: ``[B, T, heads, P]``.
        cos, sin: ``[T, P / 2]`` in fp32, the positions of the T tokens; ``[B, T, P / 2]``: of each row's own.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)
