"""What training asks of the way a model is spread over ranks; and the answers of one process, which shares nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import Orthogonalise
from nanokimi.parallel.layout import ONE, Layout
from nanokimi.parallel.ranks import ALONE, Ranks


class Spread(Protocol):
    """A model on the ranks of a run.

    Attributes:
        model: its module on this rank.
    """

    ranks: Ranks
    layout: Layout
    model: Transformer

    @property
    def orthogonalise(self) -> Orthogonalise | None:
        """For ``MuonClip``."""

    def called(self, compiled: bool) -> nn.Module:
        """``model`` as it is called for this rank's sequences; its gradients become the mean over the ranks."""

    def passing(self, *, last: bool) -> AbstractContextManager[object]:
        """Around one forward and backward pass of a step; ``last``: no other follows in this step."""

    def clip_gradients(self, limit: float) -> Tensor:
        """Scales the gradients down to the norm ``limit``; returns the norm they had over all ranks, a scalar."""

    def sum(self, numbers: Tensor) -> Tensor:
        """``numbers`` of all ranks, added up, in place; without waiting for the device."""

    def held_by(self, parameter: Tensor, shard: int) -> slice:
        """The rows, of the first dimension, that shard rank ``shard`` of a replica holds of ``parameter``."""

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``, of the rows here of the parameter or buffer ``name``, as a part of the whole (a DTensor)."""

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of rows on all ranks the whole ones, in the leader's host memory; elsewhere nothing. All ranks call it."""

    def place(self, name: str, here: Tensor, whole: Tensor) -> None:
        """Copies into ``here`` its rows of ``whole``, a value for all of the parameter or buffer ``name``."""


class Alone:
    """One process."""

    orthogonalise: Orthogonalise | None = None

    def __init__(self, model: Transformer, ranks: Ranks = ALONE, layout: Layout = ONE) -> None:
        self.model, self.ranks, self.layout = model, ranks, layout

    def called(self, compiled: bool) -> nn.Module:
        return cast(nn.Module, torch.compile(self.model)) if compiled else self.model

    def passing(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def clip_gradients(self, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=True)

    def sum(self, numbers: Tensor) -> Tensor:
        return numbers

    def held_by(self, parameter: Tensor, shard: int) -> slice:
        return slice(0, len(parameter))

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def place(self, name: str, here: Tensor, whole: Tensor) -> None:
        here.copy_(whole)
