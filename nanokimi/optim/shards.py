"""What the optimizer needs of weights that lie on several ranks; most of its work is elementwise, on the rows here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor


class Shards(Protocol):
    """The two things for which the rows of one rank are not enough; ``parallel.owners`` does them."""

    def orthogonalise(
        self, declared: Sequence[Tensor], updates: Sequence[Tensor], *, dtype: torch.dtype | None
    ) -> list[Tensor]:
        """``newton_schulz`` of whole matrices, given and returned as the rows of this rank.

        Args:
            declared: the parameters.
            updates: of each, the rows here.
            dtype: of the products; None chooses by hardware.
        """

    def qk_clip_(self, max_logits: Tensor, tau: float) -> None:
        """``qk_clip_`` by the largest logits of all ranks ``[L, H]``, on the rows here."""


def local(tensor: Tensor) -> Tensor:
    """The rows of ``tensor`` that lie on this rank, without a copy: all of them, unless it is a DTensor."""
    to_local = getattr(tensor, "to_local", None)
    return cast(Tensor, to_local()) if to_local is not None else tensor
