"""Batches drawn from several sources by weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from nanokimi.data.batch import Batch
from nanokimi.data.loader import Loader

# B batch, T sequence length


class MixLoader:
    """Batches whose sequences come from several loaders in fixed shares.

    The next sequence comes from the source, of those behind their share, that would first be a whole sequence behind
    it. So after k sequences each has given its weight times k, less than one more or less, on every rank (Baruah et
    al. 1996, Proportionate progress): shares without chance need no state but counts.

    Args:
        sources: by name the weight, above 0, and the loader, which gives batches of one sequence.
        batch_size: B.
        pin_memory: page-locked batches, for copies to a GPU that overlap with computing.
    """

    def __init__(
        self, sources: Mapping[str, tuple[float, Loader]], batch_size: int, *, pin_memory: bool = False
    ) -> None:
        weights = {name: Fraction(str(weight)) for name, (weight, _) in sources.items()}  # 0.7 is meant as 7/10
        self.shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self.loaders = {name: loader for name, (_, loader) in sources.items()}
        self.batch_size, self.pin_memory = batch_size, pin_memory
        self._counts = dict.fromkeys(sources, 0)

    @property
    def warnings(self) -> Counter[str]:
        """Those of all sources."""
        return sum((loader.warnings for loader in self.loaders.values()), Counter())

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on."""
        sources = {name: iter(loader) for name, loader in self.loaders.items()}
        while True:
            batch = Batch.joined([next(sources[self._next()]) for _ in range(self.batch_size)])
            yield batch.pin_memory() if self.pin_memory else batch

    def _next(self) -> str:
        reached = sum(self._counts.values()) + 1
        behind = [name for name, share in self.shares.items() if share * reached > self._counts[name]]
        name = min(behind, key=lambda name: (self._counts[name] + 1) / self.shares[name])
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
