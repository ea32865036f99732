"""Expert parallelism (GShard; Lepikhin et al., 2020): each rank holds some experts, tokens are sent to them and back.

The model knows nothing of it. Hooks around ``Experts`` replace its input by the tokens of all ranks for the experts of
this rank, and its output by what the experts of all ranks made of the tokens of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanokimi.model.moe import Experts
from nanokimi.ops.products import as_multiplied, permute


class ExpertExchange:
    """Sends the tokens of one layer to the experts of a group of ranks, and back.

    Args:
        group: each of its ranks holds equally many experts, in the order of the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._return: tuple[list[int], list[int], Tensor, Tensor]  # how this forward pass sends its results back

    def attach(self, experts: Experts) -> None:
        """Makes ``experts``, which are those of this rank, take and return this rank's tokens for all experts."""
        experts.register_forward_pre_hook(self.dispatch)
        experts.register_forward_hook(self.combine)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def dispatch(self, module: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``[n, D]`` sorted by expert and counts ``[E]`` -> the rows for the experts here, sorted, and their counts."""
        rows, counts = inputs
        size = self.group.size()
        from_ranks = torch.empty_like(counts)  # [ranks, experts here]
        dist.all_to_all_single(from_ranks, counts.contiguous(), group=self.group)
        by_rank = torch.stack((counts, from_ranks)).view(2, size, -1).sum(dim=2)
        sent, received = by_rank.tolist()  # the only wait for the device
        rows = as_multiplied(rows)  # in the experts' own precision, so that fewer bytes travel
        arrived = _AllToAll.apply(rows, sent, received, self.group)  # type: ignore[no-untyped-call]
        here = from_ranks.view(size, -1)
        order, inverse = _by_expert(here, sum(received))
        self._return = received, sent, inverse, order
        return permute(arrived, order, inverse), here.sum(dim=0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def combine(self, module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
        """Results of the experts here -> ``[n, D]``, the results for this rank, in the order that ``dispatch`` got."""
        sent, received, order, inverse = self._return
        out: Tensor = _AllToAll.apply(permute(rows, order, inverse), sent, received, self.group)  # type: ignore[no-untyped-call]
        return out


def _by_expert(counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The permutation that sorts rows by expert, which lie by rank and then by expert; and its inverse.

    Args:
        counts: ``[ranks, experts]``.
        rows: their sum, which the host knows.
    """
    numbers = torch.arange(counts.shape[1], device=counts.device).repeat(len(counts))
    order = numbers.repeat_interleave(counts.flatten(), output_size=rows).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, inverse


class _AllToAll(torch.autograd.Function):
    """Sends ``sent[i]`` rows to the i-th rank of a group; the gradients take the way back."""

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
