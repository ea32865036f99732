"""Which ranks hold what: every row once in a replica, every sequence of a step once, and clear words where it fails."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from nanokimi.errors import UserError
from nanokimi.parallel.fsdp import Sharded
from nanokimi.parallel.layout import ONE, Layout, rows_of, share_of_step


@pytest.mark.parametrize(
    ("arguments", "flag", "remedy"),
    [
        (("ddp", 4, 2), "--replicate 2", "--parallel fsdp: add it, or leave it out"),
        (("one", 1, 2), "--replicate 2", "--parallel fsdp: add it, or leave it out"),
        (("ddp", 4, 1, 2), "--expert_parallel 2", "--parallel fsdp under torchrun: add it, or leave it out"),
        (("one", 1, 1, 1), "--expert_parallel 1", "--parallel fsdp under torchrun: add it, or leave it out"),
        (("fsdp", 4, 3), "--replicate 3", "the 4 ranks: choose a divisor of them"),
        (("fsdp", 4, 8), "--replicate 8", "the 4 ranks: choose a divisor of them"),
        (("fsdp", 4, 1, 3), "--expert_parallel 3", "the 4 ranks of a replica: choose a divisor of them"),
        (("fsdp", 8, 4, 4), "--expert_parallel 4", "the 2 ranks of a replica: choose a divisor of them"),
    ],
)
def test_a_layout_that_cannot_be_names_the_flag_and_the_remedy(
    arguments: tuple[str, int, int, int], flag: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=f"^{flag} .*{re.escape(remedy)}$"):
        Layout(*arguments)


def test_experts_that_cannot_be_dealt_out_evenly_are_refused() -> None:
    layout = Layout("fsdp", 6, expert_parallel=3)
    layout.check_experts(9)
    Layout("fsdp", 4).check_experts(7)
    with pytest.raises(UserError, match=r"^--expert_parallel 3 does not divide the 8 routed experts: choose a divisor"):
        layout.check_experts(8)


@pytest.mark.parametrize(
    ("layout", "replicas", "shards"),
    [
        (ONE, 1, 1),
        (Layout("ddp", 4), 4, 1),
        (Layout("fsdp", 1), 1, 1),
        (Layout("fsdp", 8), 1, 8),
        (Layout("fsdp", 8, 2), 2, 4),
        (Layout("fsdp", 8, 8), 8, 1),
    ],
)
def test_replicas_times_shards_are_the_ranks(layout: Layout, replicas: int, shards: int) -> None:
    assert (layout.replicas, layout.shards) == (replicas, shards)


def test_ranks_between_which_the_experts_are_dealt_out_are_neighbours() -> None:
    layout = Layout("fsdp", 16, 2, 4)
    held = [layout.shard_rows(8, shard, distributed=True) for shard in range(layout.shards)]
    assert [rows.start for rows in held] == [0, 2, 4, 6, 1, 3, 5, 7]
    assert {rows.stop - rows.start for rows in held} == {1}


def test_all_sequences_of_a_step_are_taken_in_the_fewest_even_passes() -> None:
    for batch, accumulation, ranks in itertools.product(range(1, 13), range(1, 13), range(1, 13)):
        sequences = batch * accumulation
        if sequences % ranks:
            with pytest.raises(UserError, match="does not divide over"):
                share_of_step(batch, accumulation, ranks)
            continue
        size, passes = share_of_step(batch, accumulation, ranks)
        assert size * passes * ranks == sequences
        assert 1 <= size <= batch
        own = sequences // ranks
        assert all(own % larger for larger in range(size + 1, min(batch, own) + 1)), "fewer passes would do"


def test_one_process_takes_its_step_as_it_was_told() -> None:
    for batch, accumulation in itertools.product(range(1, 20), range(1, 20)):
        assert share_of_step(batch, accumulation, 1) == (batch, accumulation)


def test_a_step_that_does_not_divide_says_which_would() -> None:
    with pytest.raises(UserError) as caught:
        share_of_step(5, 3, 4)
    message = str(caught.value)
    assert message.startswith(
        "a step of 15 sequences (--batch_size 5 x --gradient_accumulation 3) does not divide over"
    )
    batch, accumulation = map(int, re.findall(r"such as --batch_size (\d+) --gradient_accumulation (\d+)$", message)[0])
    parts = share_of_step(batch, accumulation, 4)
    assert parts.batch_size * parts.passes * 4 == 16


def test_rows_are_cut_as_torch_chunks_them() -> None:
    """``fully_shard`` cuts by ``torch.chunk``, which gives the last ranks fewer rows, or none."""
    for n, parts in itertools.product(range(30), range(1, 12)):
        chunks = [chunk.tolist() for chunk in torch.arange(n).chunk(parts)] if n else []
        chunks += [[]] * (parts - len(chunks))
        assert [list(range(n))[rows_of(n, parts, index)] for index in range(parts)] == chunks


def test_every_row_lies_on_exactly_one_shard() -> None:
    for ranks, replicate, experts in itertools.product((1, 2, 4, 6, 8, 12), (1, 2, 3), (0, 1, 2, 3, 4)):
        if ranks % replicate or (experts and ranks // replicate % experts):
            continue
        sharded = Sharded.__new__(Sharded)  # what it would hold; the ranks are not there
        sharded.layout = Layout("fsdp", ranks, replicate, experts)
        stacks = [experts * n for n in range(1, 7)] if experts else [1, 5, 12]
        sharded._shapes = {f"layers.1.mlp.experts.w{n}": torch.Size((n, 3, 2)) for n in stacks}
        sharded._shapes |= {f"layers.1.mlp.shared.w{n}": torch.Size((n, 2)) for n in (1, 2, 3, 7, 24)}
        for name, shape in sharded._shapes.items():
            held = [sharded._shard_rows(name, shard) for shard in range(sharded.layout.shards)]
            rows = [row for rows in held for row in range(shape[0])[rows]]
            assert sorted(rows) == list(range(shape[0])), (name, sharded.layout)


def test_a_rank_holds_the_experts_that_tokens_are_sent_to_it_for() -> None:
    sharded = Sharded.__new__(Sharded)
    sharded.layout = Layout("fsdp", 4, expert_parallel=2)
    sharded._shapes = {
        "layers.1.mlp.experts.w1": torch.Size((8, 3, 2)),
        "layers.1.mlp.router.weight": torch.Size((8, 2)),
    }
    held = {name: [sharded._shard_rows(name, shard) for shard in range(4)] for name in sharded._shapes}
    assert held["layers.1.mlp.experts.w1"] == [slice(0, 2), slice(4, 6), slice(2, 4), slice(6, 8)]
    assert held["layers.1.mlp.router.weight"] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
