"""Batches drawn from several sources by weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nanokimi.data.loader import Loader

# B batch, T sequence length


class MixLoader:
    """Batches, int64 [B, T + 1], whose sequences come from several loaders in fixed shares.

    The next sequence comes from the source that is furthest behind its share, so after k sequences each has given
    its weight times k, less than one more or less, on every rank: shares without chance need no state but counts.

    Args:
        sources: by name the weight, above 0, and the loader, which gives batches of one sequence.
        batch_size: B.
    """

    def __init__(self, sources: Mapping[str, tuple[float, Loader]], batch_size: int) -> None:
        total = sum(weight for weight, _ in sources.values())
        self.shares = {name: weight / total for name, (weight, _) in sources.items()}
        self.loaders = {name: loader for name, (_, loader) in sources.items()}
        self.batch_size = batch_size
        self._counts = dict.fromkeys(sources, 0)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches from the present position on."""
        sources = {name: iter(loader) for name, loader in self.loaders.items()}
        while True:
            yield torch.cat([next(sources[self._next()]) for _ in range(self.batch_size)])

    def _next(self) -> str:
        reached = sum(self._counts.values()) + 1
        name = max(self.shares, key=lambda name: self.shares[name] * reached - self._counts[name])
        self._counts[name] += 1
        return name

    def state_dict(self) -> dict[str, Any]:
        """The counts and the position in every source."""
        return {
            "counts": dict(self._counts),
            "sources": {name: loader.state_dict() for name, loader in self.loaders.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            UserError: in one of the sources.
        """
        for name, loader in self.loaders.items():
            loader.load_state_dict(state["sources"][name])
        self._counts = dict(state["counts"])

    def go_near(self, state: dict[str, Any]) -> None:
        """Goes near the place in those sources that were there."""
        for name, loader in self.loaders.items():
            if name in state.get("sources", {}):
                loader.go_near(state["sources"][name])
