"""Who orthogonalises what: the shares that ``parallel.owners.deal`` gives the ranks, for any number of matrices.

The same rule, for one kind of matrices after the other, without torch and without looking at every rank for each.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from nanokimi.config import ModelConfig
from nanokimi.flops import newton_schulz_flops
from nanokimi.insight.plan_layouts import MUON_ROLES, Matrix, parameters, rows_held, total_local
from nanokimi.parallel.layout import Layout


@dataclass(frozen=True)
class Shares:
    """Newton-Schulz of one role.

    Attributes:
        flops: of each rank, replica after replica.
        owned: elements of whole matrices that are sent to the rank that owns most.
        batch: elements that a rank multiplies in one batch at most, all of one shape; ``largest`` of one parameter.
        sides: of a matrix of that batch.
        longest: elements of the longest share of a replica, on each shard rank: what the others are padded to.
        sent: elements of all matrices that owners are sent; 0 where nobody holds rows only.
        local: elements of updates on a rank.
    """

    flops: list[int]
    owned: int
    batch: int
    largest: int
    sides: tuple[int, int]
    longest: list[int]
    sent: int
    local: int


@lru_cache
def shares(config: ModelConfig, layout: Layout) -> tuple[Shares, ...]:
    """Of each of Muon's roles that the model has."""
    by_role = {role: [m for m in parameters(config) if m.role == role] for role in MUON_ROLES}
    return tuple((_of_stacks if role == "experts" else _of_matrices)(m, layout) for role, m in by_role.items() if m)


def busiest(config: ModelConfig, layout: Layout) -> int:
    """FLOPs of Newton-Schulz on the rank that has most of them."""
    return max(map(sum, zip(*(share.flops for share in shares(config, layout)), strict=True)))


def _of_matrices(matrices: Sequence[Matrix], layout: Layout) -> Shares:
    """The dearest first, each to the rank that has the least to do."""
    ranks = [(0, rank) for rank in range(layout.ranks)]
    owned: list[list[Matrix]] = [[] for _ in ranks]
    for matrix in sorted(matrices, key=lambda m: -_cost(m)):
        load, rank = ranks[0]
        owned[rank].append(matrix)
        heapq.heapreplace(ranks, (load + _cost(matrix), rank))
    flops = [sum(map(_cost, mine)) for mine in owned]
    most = owned[flops.index(max(flops))]
    shapes = Counter(tuple(sorted(m.shape)) for m in most)
    (short, long), count = max(shapes.items(), key=lambda item: math.prod(item[0]) * item[1])
    travels = layout.shards > 1
    return Shares(
        flops=flops,
        owned=max(sum(m.numel for m in mine) for mine in owned) if travels else 0,
        batch=short * long * count,
        largest=max(m.numel for m in most),
        sides=(short, long),
        longest=_longest(owned, layout),
        sent=sum(m.numel for m in matrices) if travels else 0,
        local=total_local(matrices, layout),
    )


def _longest(owned: Sequence[Sequence[Matrix]], layout: Layout) -> list[int]:
    """Of what the ranks of a replica own, the elements that lie on each shard rank; of the replica with most there."""
    if layout.replicas == 1:
        return []
    by_replica = [owned[first : first + layout.shards] for first in range(0, layout.ranks, layout.shards)]
    # Matrices of one shape lie alike, and there are few shapes.
    counts = [Counter(replace(m, name="", block=0) for mine in replica for m in mine) for replica in by_replica]
    held = {m: rows_held(m, layout) for m in set().union(*counts)}
    return [
        max(sum(count * held[m][shard] * m.shape[1] for m, count in alike.items()) for alike in counts)
        for shard in range(layout.shards)
    ]


def _of_stacks(stacks: Sequence[Matrix], layout: Layout) -> Shares:
    """Experts stay where they are; those on a shard rank are dealt to its replicas, stack by stack, in even parts."""
    held = rows_held(stacks[0], layout)
    loads = {count: _experts_by_replica(count, len(stacks), layout.replicas) for count in set(held)}
    short, long = sorted(stacks[0].shape[1:])
    size, flops, most = short * long, _cost(stacks[0]), max(map(max, loads.values()))
    return Shares(
        flops=[loads[count][replica] * flops for replica in range(layout.replicas) for count in held],
        owned=0,
        batch=most * size,
        largest=-(-max(held) // layout.replicas) * size,
        sides=(short, long),
        longest=[max(loads[count]) * size for count in held] if layout.replicas > 1 else [],
        sent=0,
        local=total_local(stacks, layout),
    )


def _experts_by_replica(count: int, stacks: int, replicas: int) -> list[int]:
    """Of ``count`` experts in each of so many stacks, how many matrices every replica gets."""
    loads = [(0, replica) for replica in range(replicas)]
    parts = min(count, replicas)
    for _ in range(stacks):
        for part in range(parts):
            size = count * (part + 1) // parts - count * part // parts
            load, replica = loads[0]
            heapq.heapreplace(loads, (load + size, replica))
    return [load for load, _ in sorted(loads, key=lambda pair: pair[1])]


def _cost(matrix: Matrix) -> int:
    return newton_schulz_flops(*matrix.shape[-2:])
