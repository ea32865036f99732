"""Data parallelism (Li et al., 2020): every rank holds the model, gradients are averaged while they are made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanokimi.model.transformer import Losses, Transformer
from nanokimi.parallel.layout import Layout
from nanokimi.parallel.owners import Owners
from nanokimi.parallel.ranks import Ranks
from nanokimi.parallel.spread import Alone


class Replicated(Alone):
    """The same model on every rank; begins with the same weights on all of them."""

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        super().__init__(model, ranks, Layout("ddp", ranks.size))
        attentions = [block.attention for block in model.blocks()]
        self.shards = Owners(self.layout, self, attentions, ranks.rank, None, dist.group.WORLD)
        with warnings.catch_warnings():  # torch 2.13 has another name for what 2.11 calls broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            self._losses = DistributedDataParallel(
                _Losses(model), broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def loss(self, compiled: bool) -> Callable[..., Losses]:
        if compiled:
            compile_blocks(self.model)
        return self._losses

    def passing(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._losses.no_sync()

    def share(self, losses: Tensor) -> Tensor:
        return share(self.model, losses, self.ranks.size)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors) if self.ranks.leads else {}


class _Losses(nn.Module):
    """``model.loss`` as the forward pass of a module: DistributedDataParallel watches over nothing else."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Losses:
        return self.model.loss(*arguments)


def compile_blocks(model: Transformer) -> None:
    """Compiles block by block: between blocks, what travels overlaps with what is computed."""
    for block in model.blocks():
        block.compile()


def share(model: Transformer, losses: Tensor, ranks: int) -> Tensor:
    """See ``Spread.share``; one MAX and one SUM over all ranks."""
    dist.all_reduce(model.max_logits, dist.ReduceOp.MAX)
    numbers = torch.cat([losses.double() / ranks, model.expert_counts.flatten().double()])
    dist.all_reduce(numbers)
    model.expert_counts.copy_(numbers[len(losses) :].view_as(model.expert_counts))
    return numbers[: len(losses)]
