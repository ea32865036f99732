"""Where the weights of a model lie when several ranks train it: any size, as a model on the meta device costs nothing.

Letters: W ranks, R replicas, S = W / R ranks that one replica is sharded over, N ranks that the routed experts are
dealt out to; those of a model as in ``model.layers``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nanokimi.config import ModelConfig
from nanokimi.parallel.layout import Layout, rows_of

MUON_ROLES = ("query_key", "matrix", "experts")


@dataclass(frozen=True)
class Matrix:
    """A parameter: its name in the model, ``[rows, ...]``, its role (see ``model.roles``) and its block.

    Attributes:
        block: None: with the root (embedding, last norm, head).
    """

    name: str
    shape: tuple[int, ...]
    role: str
    block: int | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def muon(self) -> bool:
        """Whether Muon updates it, not AdamW."""
        return self.role in MUON_ROLES


@lru_cache
def parameters(config: ModelConfig) -> tuple[Matrix, ...]:
    """Every parameter of ``Transformer(config)``, in the order of ``named_parameters``."""
    import torch  # here: the command line asks for no more than help

    from nanokimi.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config)
    roles = {id(parameter): role for role, parameter in model.param_roles()}
    return tuple(Matrix(name, tuple(p.shape), roles[id(p)], _block(name)) for name, p in model.named_parameters())


def _block(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


# ---- on the ranks of a layout -------------------------------------------------------------------


def is_dealt(matrix: Matrix, layout: Layout) -> bool:
    """Whether it is a stack of experts that are dealt out, an FSDP group of its own."""
    return layout.expert_parallel > 0 and matrix.role == "experts"


def sharers(matrix: Matrix, layout: Layout) -> int:
    """Ranks over which FSDP cuts a parameter: S, of dealt experts S / N."""
    return layout.shards // layout.expert_parallel if is_dealt(matrix, layout) else layout.shards


def own_shape(matrix: Matrix, layout: Layout) -> tuple[int, ...]:
    """``[rows, ...]`` of a parameter as FSDP sees it: of dealt experts those of one group of ``sharers``."""
    rows, *rest = matrix.shape
    return (rows // layout.expert_parallel if is_dealt(matrix, layout) else rows, *rest)


def rows_held(matrix: Matrix, layout: Layout) -> list[int]:
    """The rows that each shard rank holds, as ``parallel.fsdp`` cuts them."""
    ranks, rows = sharers(matrix, layout), own_shape(matrix, layout)[0]
    cut = [rows_of(rows, ranks, part) for part in range(ranks)]
    held = [part.stop - part.start for part in cut]
    return [n for n in held for _ in range(layout.expert_parallel)] if is_dealt(matrix, layout) else held


def local(matrix: Matrix, layout: Layout) -> int:
    """Elements of a parameter on one rank: those of the rank with most; FSDP pads the others'."""
    rows, *rest = own_shape(matrix, layout)
    return -(-rows // sharers(matrix, layout)) * math.prod(rest)


def gathered(matrix: Matrix, layout: Layout) -> int:
    """Elements, padding among them, that a rank holds while it computes with a parameter that FSDP cut."""
    return local(matrix, layout) * sharers(matrix, layout)


def total_local(matrices: Sequence[Matrix], layout: Layout) -> int:
    """``local`` of all."""
    return sum(local(matrix, layout) for matrix in matrices)
