"""Distributed Muon (Liu et al., 2025, section 2.3): the ranks share the work of orthogonalisation.

Newton-Schulz needs whole matrices, and sharded ranks hold rows. So each matrix gets one rank as its owner: the others
send their rows there, the owner iterates, and sends each rank its rows of the result. Stacks of experts are sharded
between experts, so each rank has whole matrices already. Replicas hold the same: each does a part, then they gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanokimi.ops.newton_schulz import batches_of, best_dtype, newton_schulz_flops, orthogonalise
from nanokimi.parallel.layout import Layout


class Rows(Protocol):
    """Tells which rows of the parameters lie where."""

    def shard_rows(self, parameter: Tensor, shard: int) -> slice:
        """The rows, of the first dimension, that shard rank ``shard`` of a replica holds of ``parameter``."""


class Assignment(NamedTuple):
    """Matrices and the rank that orthogonalises them.

    Attributes:
        number: of the parameter.
        rows: of a stack, these of the experts on the owner's shard; None for a whole matrix.
        replica, shard: the owner.
    """

    number: int
    rows: slice | None
    replica: int
    shard: int


def assign(shapes: Sequence[torch.Size], rows: Sequence[Sequence[slice]], layout: Layout) -> list[Assignment]:
    """Gives every matrix an owner: the most expensive first, each to the rank that has the least work so far.

    Args:
        rows: of each parameter, the rows of each shard rank.
    """
    costs = [newton_schulz_flops(*shape[-2:]) for shape in shapes]  # of one matrix
    order = sorted(range(len(shapes)), key=lambda i: -costs[i])
    assignments = []
    # Heaps, whose first entry is the rank that has the least work so far.
    by_shard = [[(0, replica) for replica in range(layout.replicas)] for _ in range(layout.shards)]
    for number in (i for i in order if len(shapes[i]) != 2):  # stacks first: they have less choice
        for shard, held in enumerate(rows[number]):
            for part in _cut(held.stop - held.start, layout.replicas):
                load, replica = by_shard[shard][0]
                heapreplace(by_shard[shard], (load + costs[number] * (part.stop - part.start), replica))
                assignments.append(Assignment(number, part, replica, shard))
    ranks = [(load, replica, shard) for shard, loads in enumerate(by_shard) for load, replica in loads]
    heapify(ranks)
    for number in (i for i in order if len(shapes[i]) == 2):
        load, replica, shard = ranks[0]
        heapreplace(ranks, (load + costs[number], replica, shard))
        assignments.append(Assignment(number, None, replica, shard))
    return assignments


def _cut(n: int, parts: int) -> list[slice]:
    """Cuts n things into at most ``parts`` even slices."""
    count = min(n, parts)
    return [slice(a, b) for a, b in pairwise(n * i // count for i in range(count + 1))] if count else []


class Plan(NamedTuple):
    """Who orthogonalises what, of one list of parameters.

    Attributes:
        mine: what this rank does.
        whole: matrices of this replica, by the shard rank that owns them.
        shared: what this shard rank gets rows of, by the replica that computes it.
        held: of each parameter, the rows of each shard rank.
    """

    mine: list[Assignment]
    whole: list[list[Assignment]]
    shared: list[list[Assignment]]
    held: list[list[slice]]


class DistributedMuon:
    """Orthogonalises on the ranks of a ``Layout`` together.

    Args:
        rows: which rows each shard rank holds.
        rank: of this process.
        shard_group: the ranks of this replica.
        replica_group: the ranks that hold the same rows as this one.
    """

    def __init__(
        self,
        layout: Layout,
        rows: Rows,
        rank: int,
        shard_group: dist.ProcessGroup | None,
        replica_group: dist.ProcessGroup | None,
    ) -> None:
        self.layout, self.rows = layout, rows
        self.replica, self.shard = divmod(rank, layout.shards)
        self.shard_group, self.replica_group = shard_group, replica_group
        self._plans: dict[tuple[int, ...], Plan] = {}

    def orthogonalise(
        self, parameters: Sequence[Tensor], updates: Sequence[Tensor], *, dtype: torch.dtype | None
    ) -> list[Tensor]:
        """See ``optim.muonclip.Orthogonalise``."""
        plan = self._plan(parameters)
        dtype = dtype or best_dtype(updates[0].device, updates[0].dtype)
        matrices = iter(self._to_owners(plan, parameters, updates))
        work = [next(matrices) if p.rows is None else updates[p.number][p.rows] for p in plan.mine]
        done: list[Tensor] = [*work]
        for batch in batches_of(work):
            for i, result in zip(batch, orthogonalise([work[i] for i in batch], dtype=dtype), strict=True):
                done[i] = result
        out = [torch.zeros_like(update, dtype=dtype) for update in updates]
        for owned, result in zip(plan.mine, done, strict=True):
            if owned.rows is not None:
                out[owned.number][owned.rows] = result
        self._to_shards(plan, [d for p, d in zip(plan.mine, done, strict=True) if p.rows is None], out)
        self._to_replicas(plan, out)
        return out

    def _plan(self, parameters: Sequence[Tensor]) -> Plan:
        key = tuple(map(id, parameters))
        if key not in self._plans:
            shards = range(self.layout.shards)
            held = [[self.rows.shard_rows(p, s) for s in shards] for p in parameters]
            assignments = assign([p.shape for p in parameters], held, self.layout)
            own = [p for p in assignments if p.replica == self.replica]
            self._plans[key] = Plan(
                [p for p in own if p.shard == self.shard],
                [[p for p in own if p.shard == s and p.rows is None] for s in shards],
                [
                    [p for p in assignments if p.replica == r and (p.rows is None or p.shard == self.shard)]
                    for r in range(self.layout.replicas)
                ],
                held,
            )
        return self._plans[key]

    def _to_owners(self, plan: Plan, parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
        """Collects the whole matrices that this rank owns from the rows of all shard ranks."""
        mine = plan.whole[self.shard]
        if self.layout.shards == 1:
            return [updates[p.number] for p in mine]
        sent = [[updates[p.number] for p in assignments] for assignments in plan.whole]
        received = [[self._rows_on(plan, parameters, p, shard) for p in mine] for shard in range(self.layout.shards)]
        parts = self._exchange(sent, received, updates[0])
        return [torch.cat([parts[shard][i] for shard in range(self.layout.shards)]) for i in range(len(mine))]

    def _to_shards(self, plan: Plan, matrices: list[Tensor], out: list[Tensor]) -> None:
        """Sends the results ``matrices`` of this rank; writes into ``out`` this rank's rows of all that come."""
        if self.layout.shards == 1:
            for owned, matrix in zip(plan.whole[0], matrices, strict=True):
                out[owned.number].copy_(matrix)
            return
        mine = plan.whole[self.shard]
        sent = [
            [matrix[plan.held[owned.number][shard]] for owned, matrix in zip(mine, matrices, strict=True)]
            for shard in range(self.layout.shards)
        ]
        received = [[out[p.number].shape for p in assignments] for assignments in plan.whole]
        for assignments, parts in zip(plan.whole, self._exchange(sent, received, out[0]), strict=True):
            for owned, part in zip(assignments, parts, strict=True):
                out[owned.number].copy_(part)

    def _rows_on(self, plan: Plan, parameters: Sequence[Tensor], owned: Assignment, shard: int) -> torch.Size:
        held = plan.held[owned.number][shard]
        return torch.Size((held.stop - held.start, *parameters[owned.number].shape[1:]))

    def _exchange(self, sent: list[list[Tensor]], received: list[list[torch.Size]], like: Tensor) -> list[list[Tensor]]:
        """One all-to-all in the shard group: ``sent[s]`` goes to shard rank s, tensors of ``received[s]`` come back."""
        outgoing = [sum(t.numel() for t in tensors) for tensors in sent]
        incoming = [sum(shape.numel() for shape in shapes) for shapes in received]
        buffer = torch.cat([t.reshape(-1) for tensors in sent for t in tensors] or [like.new_empty(0)])
        arrived = like.new_empty(sum(incoming))
        dist.all_to_all_single(arrived, buffer, incoming, outgoing, group=self.shard_group)
        return [_split(part, shapes) for part, shapes in zip(arrived.split(incoming), received, strict=True)]

    def _to_replicas(self, plan: Plan, out: list[Tensor]) -> None:
        """Gathers the results of all replicas, in one all-gather, padded to the longest share."""
        if self.layout.replicas == 1:
            return
        targets = [[out[p.number] if p.rows is None else out[p.number][p.rows] for p in share] for share in plan.shared]
        longest = max(sum(t.numel() for t in share) for share in targets)
        own = out[0].new_zeros(longest)
        flat = torch.cat([t.reshape(-1) for t in targets[self.replica]] or [own[:0]])
        own[: len(flat)] = flat
        everyone = own.new_empty(self.layout.replicas, longest)
        dist.all_gather(list(everyone), own, group=self.replica_group)
        for replica, share in enumerate(targets):
            if replica != self.replica:
                for target, part in zip(share, _split(everyone[replica], [t.shape for t in share]), strict=True):
                    target.copy_(part)


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors of ``shapes`` that lie one after the other at the beginning of ``flat``."""
    sizes = [shape.numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]
