"""Data parallelism (Li et al., 2020): every rank holds the model, gradients are averaged while they are made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanokimi.model.transformer import Transformer
from nanokimi.parallel.distributed_muon import DistributedMuon
from nanokimi.parallel.layout import Layout
from nanokimi.parallel.ranks import Ranks, SingleDevice


class Replicated(SingleDevice):
    """The same model on every rank; begins with the same weights on all of them."""

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        super().__init__(model, ranks, Layout("ddp", ranks.size))
        self.orthogonalise = DistributedMuon(self.layout, self, ranks.rank, None, dist.group.WORLD).orthogonalise
        with warnings.catch_warnings():  # torch 2.13 has another name for what 2.11 calls broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            self._watched = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def training_module(self, compiled: bool) -> nn.Module:
        if compiled:
            compile_blocks(self.model)
        return self._watched

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._watched.no_sync()

    def all_reduce(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers)
        return numbers

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors) if self.ranks.is_main else {}


def compile_blocks(model: Transformer) -> None:
    """Compiles block by block: between blocks, what travels overlaps with what is computed."""
    for block in model.blocks():
        block.compile()
