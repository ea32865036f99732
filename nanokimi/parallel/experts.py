"""Expert parallelism (GShard; Lepikhin et al., 2020): experts dealt out over ranks, tokens sent to them and back.

The model does not know: hooks around ``Experts`` swap its input for what all ranks have for the experts that live
here, and its output for what the experts of other ranks made of the tokens that came from here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanokimi.model.moe import Experts
from nanokimi.ops.products import as_multiplied, permute


class Exchange:
    """The way of one layer's tokens to the experts of a group of ranks, and back.

    Args:
        group: its ranks hold as many experts each, in their order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._way_back: tuple[list[int], list[int], Tensor, Tensor]  # of the forward pass that is under way

    def attach(self, experts: Experts) -> None:
        """From now on ``experts``, which holds those of this rank alone, takes and returns the rows of them all."""
        experts.register_forward_pre_hook(self.there)
        experts.register_forward_hook(self.back)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def there(self, module: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``[n, D]`` sorted by expert and counts ``[E]`` -> the rows for the experts here, sorted, and their counts."""
        rows, counts = inputs
        size = self.group.size()
        from_ranks = torch.empty_like(counts)  # [ranks, experts here]
        dist.all_to_all_single(from_ranks, counts.contiguous(), group=self.group)
        by_rank = torch.stack((counts, from_ranks)).view(2, size, -1).sum(dim=2)
        sent, received = by_rank.tolist()  # waits for the device, once
        rows = as_multiplied(rows)  # as the experts would: so fewer bytes travel
        arrived = _AllToAll.apply(rows, sent, received, self.group)  # type: ignore[no-untyped-call]
        here = from_ranks.view(size, -1)
        order, inverse = _by_expert(here, sum(received))
        self._way_back = received, sent, inverse, order
        return permute(arrived, order, inverse), here.sum(dim=0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def back(self, module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
        """What the experts here made, to where it came from: ``[n, D]`` in the order that ``there`` was given."""
        sent, received, order, inverse = self._way_back
        out: Tensor = _AllToAll.apply(permute(rows, order, inverse), sent, received, self.group)  # type: ignore[no-untyped-call]
        return out


def _by_expert(counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The order that sorts rows, which lie by rank and by expert within, by expert; and its inverse.

    Args:
        counts: ``[ranks, experts]``.
        rows: their sum, which the host knows.
    """
    numbers = torch.arange(counts.shape[1], device=counts.device).repeat(len(counts))
    order = numbers.repeat_interleave(counts.flatten(), output_size=rows).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, inverse


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group, ``sent[i]`` to the i-th; their gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = (sent, received, group)
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        return _all_to_all(grad, received, sent, group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
