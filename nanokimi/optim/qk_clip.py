"""QK-Clip (Kimi K2 report, section 2.1): keeps attention logits below tau by shrinking the weights behind them.

The logit of a head is linear in each slice of weights scaled here, so for the same inputs a head
that reached S > tau lands on tau exactly, and no other head changes by one bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

ALPHA = 0.5  # how the factor of the position-free part is shared between query and key

QKViews: TypeAlias = tuple[Tensor, Tensor, Tensor]  # q_nope, q_rope, k_nope, each [H, rows, in]


def clip_factors(max_logits: Tensor, tau: float) -> Tensor:
    """``gamma = tau / max(S, tau)`` of each head: 1 where nothing is to be done, also for S <= 0 or -inf."""
    return tau / max_logits.clamp_min(tau)


@torch.no_grad()
def qk_clip_(layers: Sequence[QKViews], max_logits: Tensor, tau: float) -> None:
    """Scales the query and key weights of every head whose largest logit passed ``tau``, in place.

    The rotary key is shared by all heads, so the query takes the whole factor of the rotary part.
    No host synchronisation: heads within the limit are multiplied by exactly 1.

    Args:
        layers: per layer the weight views ``q_nope``, ``q_rope``, ``k_nope``, each ``[H, rows, in]``.
        max_logits: ``[L, H]``, the largest scaled logits of the step.
        tau: the limit, positive.
    """
    gamma = clip_factors(max_logits, tau)[:, :, None, None]
    powers = (gamma**ALPHA, gamma, gamma ** (1 - ALPHA))
    for part, factors in enumerate(powers):
        views = [layer[part] for layer in layers]
        torch._foreach_mul_(views, [factor.type_as(view) for factor, view in zip(factors, views, strict=True)])
