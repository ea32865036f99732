"""QK-Clip (Kimi K2 report, section 2.1): keeps attention logits below tau by shrinking the weights behind them.

The logit of a head is linear in each slice of weights scaled here, so for the same inputs a head
that reached S > tau lands on tau exactly, and no other head changes by one bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nanokimi.optim.shards import held_rows, is_sharded, local


class ScaledRows(Protocol):
    """Rows of a weight that the logits of each head are linear in; ``model.attention.QKRows`` is one."""

    @property
    def weight(self) -> Any: ...

    @property
    def power(self) -> float: ...

    def of(self, tensor: Tensor) -> Tensor: ...


def clip_factors(max_logits: Tensor, tau: float) -> Tensor:
    """``gamma = tau / max(S, tau)`` of each head: 1 where nothing is to be done, also for S <= 0 or not finite."""
    return torch.where(max_logits < torch.inf, tau / max_logits.clamp_min(tau), 1.0)


@torch.no_grad()
def qk_clip_(layers: Sequence[Sequence[ScaledRows]], max_logits: Tensor, tau: float) -> None:
    """Scales the query and key weights of every head whose largest logit passed ``tau``, in place.

    No host synchronisation: heads within the limit are multiplied by exactly 1. Frozen weights stay as they are.

    Args:
        layers: of each layer the rows that its logits depend on.
        max_logits: ``[L, H]``, the largest scaled logits of the step.
        tau: the limit, positive.
    """
    gamma = clip_factors(max_logits, tau)[:, :, None, None]
    trained = [(i, rows) for i, layer in enumerate(layers) for rows in layer if rows.weight.requires_grad]
    powers = {power: gamma**power for power in {rows.power for _, rows in trained}}
    whole = [(i, rows) for i, rows in trained if not is_sharded(rows.weight)]
    if whole:
        views = [rows.of(rows.weight) for _, rows in whole]
        torch._foreach_mul_(
            views, [powers[rows.power][i].type_as(v) for (i, rows), v in zip(whole, views, strict=True)]
        )
    for i, rows in trained:
        if is_sharded(rows.weight):
            _scale_shard(rows, powers[rows.power][i])


def _scale_shard(rows: ScaledRows, factors: Tensor) -> None:
    """Scales what lies on this rank: a column as long as the whole weight says by what each of its rows is scaled."""
    column = factors.new_ones(rows.weight.shape[0], 1)
    rows.of(column).mul_(factors)
    here = local(rows.weight)
    here.mul_(column[held_rows(rows.weight)].type_as(here))
