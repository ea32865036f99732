"""What a model notes of a step (``max_logits``, ``expert_counts``): made one for all ranks, used, and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Noting(Protocol):
    """A model that notes what a step showed; ``nanokimi.Transformer`` does."""

    max_logits: Tensor
    expert_counts: Tensor

    def update_balance(self) -> None: ...

    def reset_stats(self) -> None: ...


@torch.no_grad()
def share_statistics(model: Noting, group: dist.ProcessGroup | None = None) -> None:
    """Gives every rank the largest logits and the summed counts of all of them; one process keeps its own.

    Args:
        group: the ranks that train the model together; None: all there are.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    model.max_logits.masked_fill_(model.max_logits.isnan(), torch.inf)  # a NaN may get lost in a MAX
    dist.all_reduce(model.max_logits, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(model.expert_counts, group=group)


def balance_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> Callable[..., None]:
    """What any optimizer but ``MuonClip`` has to do after its step, as ``optimizer.register_step_post_hook(...)``.

    It moves the balance biases by the load of the step, and starts the statistics anew.

    Args:
        model: a ``Transformer``, or what is wrapped around one.
        group: the ranks that train it together; None: all there are.
    """
    noting, own_group = cast(Noting, unwrapped(model)), group or group_of(model)

    def after_step(*_: Any) -> None:
        share_statistics(noting, own_group)
        noting.update_balance()
        noting.reset_stats()

    return after_step


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``'s and DistributedDataParallel's wrappers, and of modules around it.

    Raises:
        ValueError: there is none that declares its parameters, or more than one.
    """
    found = [module for module in model.modules() if hasattr(type(module), "param_roles")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} modules of the model declare their parameters: there must be one Transformer")
    return found[0]


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that a DistributedDataParallel spreads its batches over; None where there is none around the model."""
    found = [getattr(module, "process_group", None) for module in model.modules()]
    return next((group for group in found if isinstance(group, dist.ProcessGroup)), None)
