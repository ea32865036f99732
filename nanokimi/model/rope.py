"""Rotary positions (Su et al., 2021), and YaRN (Peng et al., 2023), which stretches them to longer contexts.

YaRN as DeepSeek-V3 uses it (its report, section 4.3): pairs that turn often within the original context stay as
they are, pairs that hardly turn are slowed down by ``rope_factor``, those between are blended; and because longer
contexts flatten the attention, its logits grow by a factor that depends on ``rope_factor``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanokimi.config import ModelConfig


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[max_seq_length, P / 2]`` in fp32 for every position of the context and every pair."""
    angles = torch.outer(torch.arange(config.max_seq_length, dtype=torch.float32), frequencies(config))
    scale = _table_scale(config)
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
    """What attention logits are multiplied by: ``(N + P) ** -0.5``, corrected for YaRN over all dimensions."""
    return float(config.qk_head_dim**-0.5 * _growth(config, config.mscale_all_dim) ** 2)


def _table_scale(config: ModelConfig) -> float:
    """Factor of cosine and sine: what the correction of the rotary dimensions differs from that of all."""
    if config.mscale and config.mscale_all_dim:
        return _growth(config, config.mscale) / _growth(config, config.mscale_all_dim)
    return _growth(config, 1.0)  # neither is told apart: as in the paper, section 3.4


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
