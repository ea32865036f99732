"""A loop that knows nothing of nanokimi's layouts, on one process and on two ranks with PyTorch's own wrappers.

``plain_worker.py FOLDER`` leaves FOLDER/WAY.pt for each of ``WAYS``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import forked
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from nanokimi.config import ModelConfig
from nanokimi.model.layers import Linear
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import MuonClip
from nanokimi.optim.qk_clip import balance_experts

STEPS, SEQUENCES, LENGTH, TAU = 20, 8, 32, 3.3


def replicated(model: Transformer) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: Transformer) -> nn.Module:
    for block in model.blocks():
        fully_shard(block)
    return summing(fully_shard(model))


def sharded_everywhere(model: Transformer) -> nn.Module:
    """Every linear layer is a group of its own: who reads a weight without a call finds a part of it."""
    for module in model.modules():
        if isinstance(module, Linear):
            fully_shard(module)
    return sharded(model)


def summing(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    return model


WAYS: dict[str, tuple[int, int, Callable[[Transformer], nn.Module]]] = {  # ranks, passes of a step, wrapper
    "one": (1, 1, lambda model: model),
    "one, sgd": (1, 1, lambda model: model),
    "one, accumulated": (1, 4, lambda model: model),
    "ddp": (2, 1, replicated),
    "ddp, sgd": (2, 1, replicated),
    "ddp, accumulated": (2, 2, replicated),
    "fsdp": (2, 1, sharded),
    "fsdp, accumulated": (2, 2, sharded),
    "fsdp, every layer": (2, 1, sharded_everywhere),
}


def step_of(number: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of all ranks, ``[SEQUENCES, LENGTH]``: the first half has far more labels than the second."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(257, (SEQUENCES, LENGTH + 1), generator=generator)
    labels = rows[:, 1:].clone()
    share = torch.tensor([0.1] * (SEQUENCES // 2) + [0.8] * (SEQUENCES // 2))[:, None]
    labels[torch.rand(labels.shape, generator=generator) < share] = -100
    if number == 3:
        labels[-2:] = -100  # the last pass has none
    return rows[:, :-1], labels


def train(way: str, rank: int) -> dict[str, Any]:
    ranks, passes, wrap = WAYS[way]
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    model = Transformer(ModelConfig.preset("debug", max_seq_length=LENGTH, aux_loss_coeff=0.01)).train()
    called = wrap(model)
    sgd = way.endswith("sgd")
    if sgd:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(called.parameters(), lr=0.5)
        optimizer.register_step_post_hook(balance_experts(called))
    else:
        optimizer = MuonClip(called if way == "ddp, accumulated" else model, 0.05, tau=TAU, ns_dtype=torch.float64)
        model.exact_logits = False  # it is the bound that passes TAU in some heads
    losses, clipped = [], 0
    for number in range(STEPS):
        tokens, labels = step_of(number)
        count = (labels != -100).sum() / ranks
        own = slice(rank * SEQUENCES // ranks, (rank + 1) * SEQUENCES // ranks)
        loss = torch.zeros(())
        parts = zip(tokens[own].chunk(passes), labels[own].chunk(passes), strict=True)
        for part, (inputs, targets) in enumerate(parts, start=1):
            waits = part < passes and isinstance(called, DistributedDataParallel)
            with called.no_sync() if waits else nullcontext():
                found = called(inputs, targets, label_count=count)
                found.loss.backward()
            loss += found.loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(loss)
        if not sgd:
            optimizer.share_statistics()
            clipped += int((model.max_logits > TAU).sum())
        torch.nn.utils.clip_grad_norm_(called.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in model.state_dict().items()}
    return {"losses": losses, "clipped": clipped, "weights": state}


def rank_of(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    for way in (way for way, (ranks, *_) in WAYS.items() if ranks == size):
        found = train(way, rank)
        if rank == 0:
            torch.save(found, folder / f"{way}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    sys.exit(sum(forked(lambda rank, size=size: rank_of(target, rank, size), size) for size in (1, 2)))
