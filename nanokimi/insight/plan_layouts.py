"""Where the weights of a model lie when several ranks train it: shapes by formulas, so that any size costs nothing.

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
    blocks = [matrix for layer in range(config.n_layers) for matrix in _block(config, layer)]
    embed = Matrix("embed", (config.vocab_size, config.dim), "embedding")
    head = Matrix("head.weight", (config.vocab_size, config.dim), "head")
    return (embed, *blocks, Matrix("norm.weight", (config.dim,), "norm"), head)


def _block(config: ModelConfig, layer: int) -> list[Matrix]:
    dim = config.dim
    mlp = _mlp("mlp", dim, config.inter_dim) if layer < config.n_dense_layers else _moe(config)
    norms = [(f"{part}_norm.weight", (dim,), "norm") for part in ("attention", "mlp")]
    parts: list[tuple[str, tuple[int, ...], str]] = [norms[0], *_attention(config), norms[1], *mlp]
    return [Matrix(f"layers.{layer}.{name}", shape, role, layer) for name, shape, role in parts]


def _attention(config: ModelConfig) -> list[tuple[str, tuple[int, ...], str]]:
    dim, heads, rank, query = config.dim, config.n_heads, config.kv_lora_rank, config.q_lora_rank
    out = heads * config.qk_head_dim
    queries: list[tuple[str, tuple[int, ...], str]] = [("attention.wq.weight", (out, dim), "query_key")]
    if query:
        queries = [
            ("attention.wq_a.weight", (query, dim), "query_key"),
            ("attention.q_norm.weight", (query,), "norm"),
            ("attention.wq_b.weight", (out, query), "query_key"),
        ]
    return [
        *queries,
        ("attention.wkv_a.weight", (rank + config.qk_rope_head_dim, dim), "query_key"),
        ("attention.kv_norm.weight", (rank,), "norm"),
        ("attention.wkv_b.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), rank), "query_key"),
        ("attention.wo.weight", (dim, heads * config.v_head_dim), "matrix"),
    ]


def _moe(config: ModelConfig) -> list[tuple[str, tuple[int, ...], str]]:
    experts, dim, width = config.n_routed_experts, config.dim, config.moe_inter_dim
    routed = [
        (f"mlp.experts.{name}", (experts, *shape), "experts")
        for name, shape in (("w1", (width, dim)), ("w2", (dim, width)), ("w3", (width, dim)))
    ]
    shared = _mlp("mlp.shared", dim, config.n_shared_experts * width) if config.n_shared_experts else []
    return [("mlp.router.weight", (experts, dim), "matrix"), *routed, *shared]


def _mlp(name: str, dim: int, width: int) -> list[tuple[str, tuple[int, ...], str]]:
    shapes = {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}
    return [(f"{name}.{part}.weight", shape, "matrix") for part, shape in shapes.items()]


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
