"""Who orthogonalises which matrix: each has one owner, all ranks agree on it, and none has much more to do."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

from nanokimi.config import ModelConfig
from nanokimi.model.transformer import Transformer
from nanokimi.ops.newton_schulz import newton_schulz_flops
from nanokimi.optim.muonclip import MUON_ROLES, parameters_by_role
from nanokimi.parallel.distributed_muon import Assignment, DistributedMuon, assign
from nanokimi.parallel.layout import Layout, rows_of

LAYOUTS = [Layout("ddp", 4), *(Layout("fsdp", ranks, n) for ranks, n in ((1, 1), (2, 1), (4, 2), (6, 3), (8, 1)))]


class Cut:
    """Rows as ``fully_shard`` cuts them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def shard_rows(self, parameter: torch.Tensor, shard: int) -> slice:
        return rows_of(len(parameter), self.layout.shards, shard)


def random_shapes(seed: int) -> list[torch.Size]:
    """Up to a dozen matrices and stacks of matrices; the fewest have less rows than there are ranks."""
    pick = torch.Generator().manual_seed(seed)
    draws = torch.randint(1, 12, (int(torch.randint(1, 13, (), generator=pick)), 3), generator=pick).tolist()
    return [torch.Size(draw if draw[0] % 3 == 0 else draw[1:]) for draw in draws]


def assigned(shapes: Sequence[torch.Size], layout: Layout) -> tuple[list[Assignment], list[list[slice]]]:
    rows = [[rows_of(shape[0], layout.shards, shard) for shard in range(layout.shards)] for shape in shapes]
    return assign(shapes, rows, layout), rows


def cost(shape: torch.Size) -> int:
    return newton_schulz_flops(*shape[-2:])


def price(owned: Assignment, shapes: Sequence[torch.Size]) -> int:
    return cost(shapes[owned.number]) * (1 if owned.rows is None else owned.rows.stop - owned.rows.start)


def loads(assignments: list[Assignment], shapes: Sequence[torch.Size], layout: Layout) -> dict[tuple[int, int], int]:
    """What each rank has to do, those with nothing included."""
    found = dict.fromkeys(itertools.product(range(layout.replicas), range(layout.shards)), 0)
    for owned in assignments:
        found[owned.replica, owned.shard] += price(owned, shapes)
    return found


def cases() -> Iterator[tuple[list[torch.Size], Layout]]:
    return itertools.product(map(random_shapes, range(40)), LAYOUTS)


def test_every_matrix_and_every_expert_has_exactly_one_owner() -> None:
    for shapes, layout in cases():
        assignments, rows = assigned(shapes, layout)
        owned = Counter(owned.number for owned in assignments if owned.rows is None)
        assert owned == Counter(i for i, shape in enumerate(shapes) if len(shape) == 2)
        experts = Counter(
            (owned.number, rows[owned.number][owned.shard].start + expert)
            for owned in assignments
            if owned.rows is not None
            for expert in range(owned.rows.start, owned.rows.stop)
        )
        assert experts == Counter((i, n) for i, shape in enumerate(shapes) if len(shape) == 3 for n in range(shape[0]))


def test_experts_are_orthogonalised_on_the_shard_that_holds_them() -> None:
    for shapes, layout in cases():
        assignments, rows = assigned(shapes, layout)
        for owned in assignments:
            if owned.rows is not None:
                held = rows[owned.number][owned.shard]
                assert 0 <= owned.rows.start < owned.rows.stop <= held.stop - held.start


def test_no_rank_would_be_less_busy_had_it_passed_on_its_last_matrix() -> None:
    for shapes, layout in cases():
        assignments, _ = assigned(shapes, layout)
        busy = loads(assignments, shapes, layout)
        last = {(p.replica, p.shard): price(p, shapes) for p in assignments if p.rows is None}
        assert all(busy[rank] - own <= min(busy.values()) for rank, own in last.items())


def test_the_busiest_rank_is_as_near_to_the_optimum_as_graham_proved() -> None:
    """Graham (1969): longest first ends within 4/3 - 1/(3 m) of the best that m ranks could do."""
    for seed in range(30):
        pick = torch.Generator().manual_seed(seed)
        shapes = [torch.Size(shape) for shape in torch.randint(1, 9, (7, 2), generator=pick).tolist()]
        for m in (2, 3):
            layout = Layout("fsdp", m)
            costs = [cost(shape) for shape in shapes]
            best = min(
                max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(m))
                for owners in itertools.product(range(m), repeat=len(shapes))
            )
            assert max(loads(assigned(shapes, layout)[0], shapes, layout).values()) <= best * (4 / 3 - 1 / (3 * m))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_busiest_rank_of_nano_243m_does_hardly_more_than_it_must(ranks: int, mode: str) -> None:
    """Of n matrices that cost c or more, some rank must take n / ranks, rounded up: no dealing is better than that."""
    with torch.device("meta"):
        roles = parameters_by_role(Transformer(ModelConfig.preset("nano-243m")))
    layout = Layout(mode, ranks)
    for role in MUON_ROLES:
        shapes = [p.shape for p in roles[role]]
        busy = loads(assigned(shapes, layout)[0], shapes, layout)
        costs = sorted(
            (cost(shape) for shape in shapes for _ in range(shape[0] if len(shape) == 3 else 1)), reverse=True
        )
        pigeonhole = max(-(-(i + 1) // ranks) * c for i, c in enumerate(costs))
        assert max(busy.values()) <= 1.05 * max(pigeonhole, sum(busy.values()) / ranks), role


def test_ranks_without_a_row_and_without_a_matrix_are_left_in_peace() -> None:
    assignments, _ = assigned([torch.Size((2, 5, 3)), torch.Size((1, 7))], Layout("fsdp", 4))
    assert sorted((p.number, p.rows, p.shard) for p in assignments if p.rows is not None) == [
        (0, slice(0, 1), 0), (0, slice(0, 1), 1),
    ]  # fmt: skip
    assert [p.shard for p in assignments if p.rows is None] == [2]
    assert assign([], [], Layout("fsdp", 4)) == []


def test_all_ranks_plan_the_same() -> None:
    """What is sent to a rank, and how it is laid out there, is decided on both sides without a word."""
    for shapes, layout in cases():
        parameters = [torch.empty(shape, device="meta") for shape in shapes]
        assignments, rows = assigned(shapes, layout)
        plans = [
            DistributedMuon(layout, Cut(layout), rank, None, None)._plan(parameters) for rank in range(layout.ranks)
        ]
        assert [p for plan in plans for p in plan.mine] == sorted(assignments, key=lambda p: (p.replica, p.shard))
        for rank, plan in enumerate(plans):
            replica, shard = divmod(rank, layout.shards)
            assert plan.held == rows
            peers = plans[replica * layout.shards : (replica + 1) * layout.shards]
            assert plan.whole == [[p for p in peer.mine if p.rows is None] for peer in peers]
            copies = plans[shard :: layout.shards]
            assert all(plan.shared == other.shared for other in copies)
            assert Counter(map(str, itertools.chain(*plan.shared))) == Counter(
                str(p) for p in assignments if p.rows is None or p.shard == shard
            )
