"""Weights that lie on several ranks: which rows are here, and Muon's orthogonalisation of matrices that are cut.

Most of an optimizer's work is elementwise, on the rows here. What needs more than these is in this file, and the same
with the work shared between the ranks in ``parallel.owners``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nanokimi.ops.newton_schulz import newton_schulz


class Orthogonalise(Protocol):
    """``newton_schulz`` of whole matrices, given and returned as the rows of this rank."""

    def __call__(
        self, declared: Sequence[Tensor], updates: Sequence[Tensor], *, dtype: torch.dtype | None
    ) -> list[Tensor]:
        """All ranks call it with the same parameters.

        Args:
            declared: the parameters.
            updates: of each, the rows here.
            dtype: of the products; None chooses by hardware.
        """


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The rows of ``tensor`` that lie on this rank, without a copy: all of them, unless it is a DTensor."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def held_rows(tensor: Tensor) -> slice:
    """Which rows of the whole ``tensor`` lie on this rank.

    Raises:
        ValueError: a DTensor that is cut otherwise than along its rows.
    """
    first, last = 0, len(tensor)
    if is_sharded(tensor):
        mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
        for dimension, placement in enumerate(placements):
            if placement.is_replicate():
                continue
            if not placement.is_shard(0):
                raise ValueError(f"a parameter of shape {list(tensor.shape)} is cut as {placements}: only rows may be")
            size = -(-(last - first) // mesh.size(dimension))  # as chunks are cut
            first = min(first + mesh.get_local_rank(dimension) * size, last)
            last = min(first + size, last)
    return slice(first, last)


def orthogonalise_gathered(
    declared: Sequence[Tensor], updates: Sequence[Tensor], *, dtype: torch.dtype | None
) -> list[Tensor]:
    """See ``Orthogonalise``: every rank gathers every matrix that is cut. Stacks are cut between their matrices."""
    done = []
    for parameter, update in zip(declared, updates, strict=True):
        if parameter.ndim > 2 or not is_sharded(parameter):
            done.append(newton_schulz(update, dtype=dtype) if update.numel() else update)
        else:
            done.append(newton_schulz(_whole(parameter, update), dtype=dtype)[held_rows(parameter)])
    return done


def _whole(like: Any, rows: Tensor) -> Tensor:
    """The tensor whose ``rows`` lie here, cut as ``like`` is."""
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.full_tensor()
