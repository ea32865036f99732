"""QK-Clip (Kimi K2 report, section 2.1), and the statistics of a step that it and the balance of experts need.

QK-Clip keeps attention logits below tau by shrinking query and key weights. The logit of a head is linear in each slice
of weights that is scaled, so for the same inputs a head that reached S > tau lands on tau exactly, and no other head
changes by one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # at run time any model will do that has these members of a Transformer
    from nanokimi.model.attention import QKRows
    from nanokimi.model.transformer import Transformer


def clip_factors(max_logits: Tensor, tau: float) -> Tensor:
    """``gamma = tau / max(S, tau)`` of each head: 1 where nothing is to be done, also for S <= 0 or not finite."""
    return torch.where(max_logits < torch.inf, tau / max_logits.clamp_min(tau), 1.0)


def bound_is_loose(tau: float, excess: float) -> bool:
    """Whether logits measured from above may pass the true ones, by up to ``excess``, by more than a quarter of tau."""
    return 0 < tau < 4 * excess


@torch.no_grad()
def qk_clip_(layers: Sequence[Sequence[QKRows]], max_logits: Tensor, tau: float) -> None:
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
    views, factors = [], []
    for i, rows in trained:
        factor = powers[rows.power][i]
        if is_sharded(rows.weight):  # a column as long as the whole weight says by what each of its rows is scaled
            column = factor.new_ones(rows.weight.shape[0], 1)
            rows.of(column).mul_(factor)
            views.append(local(rows.weight))
            factors.append(column[local_rows(rows.weight)].type_as(views[-1]))
        else:
            views.append(rows.of(rows.weight))
            factors.append(factor.type_as(views[-1]))
    if views:
        torch._foreach_mul_(views, factors)


# ---- statistics of a step -----------------------------------------------------------------------


@torch.no_grad()
def share_statistics(model: Transformer, group: dist.ProcessGroup | None = None) -> None:
    """Gives every rank the largest logits and the summed expert counts of all of them; one process keeps its own.

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
    inner, own_group = unwrapped(model), group or group_of(model)

    def after_step(*_: Any) -> None:
        share_statistics(inner, own_group)
        inner.update_balance()
        inner.reset_stats()

    return after_step


def unwrapped(model: nn.Module) -> Transformer:
    """The model inside of ``torch.compile``'s and DistributedDataParallel's wrappers, and of modules around it.

    Raises:
        ValueError: no module tells the roles of its parameters, or more than one does.
    """
    found = [module for module in model.modules() if hasattr(type(module), "param_roles")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} modules of the model have param_roles(): there must be one Transformer")
    return cast("Transformer", found[0])


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The process group of the DistributedDataParallel around the model; None where there is none."""
    found = [getattr(module, "process_group", None) for module in model.modules()]
    return next((group for group in found if isinstance(group, dist.ProcessGroup)), None)


# ---- sharded parameters -------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The rows of ``tensor`` that lie on this rank, without a copy: all of them, unless it is a DTensor."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def local_rows(tensor: Tensor) -> slice:
    """Which rows of the whole ``tensor`` lie on this rank.

    Raises:
        ValueError: a DTensor that is sharded otherwise than along its rows.
    """
    first, last = 0, len(tensor)
    if is_sharded(tensor):
        mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
        for dimension, placement in enumerate(placements):
            if placement.is_replicate():
                continue
            if not placement.is_shard(0):
                shape = list(tensor.shape)
                raise ValueError(f"a parameter of shape {shape} is sharded as {placements}: only rows may be")
            size = -(-(last - first) // mesh.size(dimension))  # as torch.chunk cuts
            first = min(first + mesh.get_local_rank(dimension) * size, last)
            last = min(first + size, last)
    return slice(first, last)
