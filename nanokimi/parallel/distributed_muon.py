"""Muon's orthogonalisation where no rank holds whole matrices, or all ranks hold the same.

Newton-Schulz needs a whole matrix, and needs it once: every matrix has one owner, which is sent the rows, iterates,
and sends back what belongs to each rank. Expert stacks are cut between matrices, so whole ones lie on every rank
already. Replicas share the work and then the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanokimi.ops.newton_schulz import batches_of, best_dtype, newton_schulz_flops, orthogonalise
from nanokimi.parallel.layout import Layout


class Rows(Protocol):
    """Where rows of the parameters lie."""

    def shard_rows(self, parameter: Tensor, shard: int) -> slice:
        """The rows, of the first dimension, that shard rank ``shard`` of a replica holds of ``parameter``."""


class Piece(NamedTuple):
    """Whole matrices that one rank orthogonalises.

    Attributes:
        number: of the parameter.
        rows: of an expert stack those experts among the ones on its shard; None for all of a matrix.
        replica, shard: the owner.
    """

    number: int
    rows: slice | None
    replica: int
    shard: int


def deal(shapes: Sequence[torch.Size], rows: Sequence[Sequence[slice]], layout: Layout) -> list[Piece]:
    """Owners for the matrices of ``shapes``, the dearest first, each to the rank that has the least to do.

    Args:
        rows: of each parameter, what the shard ranks hold.
    """
    replicas, shards = layout.replicas, layout.shards
    loads = [[0] * shards for _ in range(replicas)]
    pieces = []
    costs = [newton_schulz_flops(*shape[-2:]) for shape in shapes]  # of one matrix
    order = sorted(range(len(shapes)), key=lambda i: (len(shapes[i]) == 2, -costs[i]))  # stacks have less choice
    for number in order:
        shape, cost = shapes[number], costs[number]
        if len(shape) == 2:
            load, replica, shard = min((loads[r][s], r, s) for r in range(replicas) for s in range(shards))
            loads[replica][shard] = load + cost
            pieces.append(Piece(number, None, replica, shard))
            continue
        for shard, held in enumerate(rows[number]):
            for part in _cut(held.stop - held.start, replicas):
                load, replica = min((loads[r][shard], r) for r in range(replicas))
                loads[replica][shard] = load + cost * (part.stop - part.start)
                pieces.append(Piece(number, part, replica, shard))
    return pieces


def _cut(n: int, parts: int) -> list[slice]:
    """n things in at most ``parts`` even slices."""
    count = min(n, parts)
    return [slice(a, b) for a, b in pairwise(n * i // count for i in range(count + 1))] if count else []


class Plan(NamedTuple):
    """What is done with one list of parameters.

    Attributes:
        mine: pieces of this rank.
        whole: pieces of this replica that are matrices, by the shard rank that owns them.
        shared: pieces whose results this shard rank holds rows of, by replica.
        held: of each parameter, what the shard ranks hold.
    """

    mine: list[Piece]
    whole: list[list[Piece]]
    shared: list[list[Piece]]
    held: list[list[slice]]


class DistributedMuon:
    """The ranks of a ``Layout``, among which the matrices are dealt out.

    Args:
        rows: what each shard rank holds.
        rank: of this process.
        shard_group, replica_group: the ranks of this replica; the ranks that hold the same as this one.
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
        self, declared: Sequence[Tensor], updates: Sequence[Tensor], *, dtype: torch.dtype | None
    ) -> list[Tensor]:
        """See ``optim.muonclip.Orthogonalise``."""
        plan = self._plan(declared)
        dtype = dtype or best_dtype(updates[0].device, updates[0].dtype)
        matrices = iter(self._to_owners(plan, declared, updates))
        work = [next(matrices) if p.rows is None else updates[p.number][p.rows] for p in plan.mine]
        done: list[Tensor] = [*work]
        for batch in batches_of(work):
            for i, result in zip(batch, orthogonalise([work[i] for i in batch], dtype=dtype), strict=True):
                done[i] = result
        out = [torch.zeros_like(update, dtype=dtype) for update in updates]
        for piece, result in zip(plan.mine, done, strict=True):
            if piece.rows is not None:
                out[piece.number][piece.rows] = result
        self._to_shards(plan, [d for p, d in zip(plan.mine, done, strict=True) if p.rows is None], out)
        self._to_replicas(plan, out)
        return out

    def _plan(self, declared: Sequence[Tensor]) -> Plan:
        key = tuple(map(id, declared))
        if key not in self._plans:
            shards = range(self.layout.shards)
            held = [[self.rows.shard_rows(p, s) for s in shards] for p in declared]
            pieces = deal([p.shape for p in declared], held, self.layout)
            own = [p for p in pieces if p.replica == self.replica]
            self._plans[key] = Plan(
                [p for p in own if p.shard == self.shard],
                [[p for p in own if p.shard == s and p.rows is None] for s in shards],
                [
                    [p for p in pieces if p.replica == r and (p.rows is None or p.shard == self.shard)]
                    for r in range(self.layout.replicas)
                ],
                held,
            )
        return self._plans[key]

    def _to_owners(self, plan: Plan, declared: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
        """The whole matrices that this rank owns, of rows from all shard ranks."""
        mine = plan.whole[self.shard]
        if self.layout.shards == 1:
            return [updates[p.number] for p in mine]
        sent = [[updates[p.number] for p in pieces] for pieces in plan.whole]
        received = [[self._rows_on(plan, declared, p, shard) for p in mine] for shard in range(self.layout.shards)]
        parts = self._exchange(sent, received, updates[0])
        return [torch.cat([parts[shard][i] for shard in range(self.layout.shards)]) for i in range(len(mine))]

    def _to_shards(self, plan: Plan, matrices: list[Tensor], out: list[Tensor]) -> None:
        """Writes into ``out`` the rows here of the matrices that this replica owns; ``matrices`` are this rank's."""
        if self.layout.shards == 1:
            for piece, matrix in zip(plan.whole[0], matrices, strict=True):
                out[piece.number].copy_(matrix)
            return
        mine = plan.whole[self.shard]
        sent = [
            [matrix[plan.held[piece.number][shard]] for piece, matrix in zip(mine, matrices, strict=True)]
            for shard in range(self.layout.shards)
        ]
        received = [[out[p.number].shape for p in pieces] for pieces in plan.whole]
        for pieces, parts in zip(plan.whole, self._exchange(sent, received, out[0]), strict=True):
            for piece, part in zip(pieces, parts, strict=True):
                out[piece.number].copy_(part)

    def _rows_on(self, plan: Plan, declared: Sequence[Tensor], piece: Piece, shard: int) -> torch.Size:
        held = plan.held[piece.number][shard]
        return torch.Size((held.stop - held.start, *declared[piece.number].shape[1:]))

    def _exchange(self, sent: list[list[Tensor]], received: list[list[torch.Size]], like: Tensor) -> list[list[Tensor]]:
        """One all-to-all in the shard group: ``sent[s]`` goes to shard rank s, ``received[s]`` comes (shapes)."""
        outgoing = [sum(t.numel() for t in tensors) for tensors in sent]
        incoming = [sum(shape.numel() for shape in shapes) for shapes in received]
        buffer = torch.cat([t.reshape(-1) for tensors in sent for t in tensors] or [like.new_empty(0)])
        arrived = like.new_empty(sum(incoming))
        dist.all_to_all_single(arrived, buffer, incoming, outgoing, group=self.shard_group)
        return [_split(part, shapes) for part, shapes in zip(arrived.split(incoming), received, strict=True)]

    def _to_replicas(self, plan: Plan, out: list[Tensor]) -> None:
        """Every replica's share of the results becomes that of all; one all-gather, padded to the longest share."""
        if self.layout.replicas == 1:
            return
        places = [[out[p.number] if p.rows is None else out[p.number][p.rows] for p in share] for share in plan.shared]
        longest = max(sum(t.numel() for t in share) for share in places)
        own = out[0].new_zeros(longest)
        flat = torch.cat([t.reshape(-1) for t in places[self.replica]] or [own[:0]])
        own[: len(flat)] = flat
        everyone = own.new_empty(self.layout.replicas, longest)
        dist.all_gather(list(everyone), own, group=self.replica_group)
        for replica, share in enumerate(places):
            if replica != self.replica:
                for place, part in zip(share, _split(everyone[replica], [t.shape for t in share]), strict=True):
                    place.copy_(part)


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Tensors of ``shapes`` that lie one behind the other at the beginning of ``flat``."""
    sizes = [shape.numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]
