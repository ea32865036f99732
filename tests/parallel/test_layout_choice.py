"""What ``--parallel`` means on the ranks there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.errors import UserError
from nanokimi.parallel import build, memory_estimate, process_group
from nanokimi.parallel.build import about_layout, build_parallel_model, choose_layout, replica_fits
from nanokimi.parallel.layout import ONE, Layout
from nanokimi.parallel.process_group import rank_device
from nanokimi.parallel.ranks import Ranks

CPU = torch.device("cpu")
DEBUG = ModelConfig.preset("debug")


def ranks(size: int, on_this_machine: int = 1) -> Ranks:
    return Ranks(size=size, on_this_machine=on_this_machine, launched=True)


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 4, "gradient_accumulation": 2, **settings})


def unasked() -> bool:
    raise AssertionError("nobody needs to know")


def answer(fits: bool) -> Callable[[], bool]:
    return lambda: fits


@pytest.mark.parametrize(("fits", "mode"), [(True, "ddp"), (False, "fsdp")])
def test_auto_holds_replicas_where_one_fits_and_else_shards(fits: bool, mode: str) -> None:
    assert choose_layout(config(), DEBUG, ranks(4), answer(fits)) == Layout(mode, 4)


@pytest.mark.parametrize("alone", [Ranks(), ranks(1)], ids=["python", "torchrun"])
def test_auto_on_one_rank_shares_nothing(alone: Ranks) -> None:
    assert choose_layout(config(), DEBUG, alone, unasked) == ONE


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"parallel": "ddp"}, Layout("ddp", 4)),
        ({"parallel": "fsdp"}, Layout("fsdp", 4)),
        ({"parallel": "fsdp", "replicate": 2, "expert_parallel": 2}, Layout("fsdp", 4, 2, 2)),
        ({"replicate": 2}, Layout("fsdp", 4, 2)),
        ({"expert_parallel": 4}, Layout("fsdp", 4, 1, 4)),
    ],
)
def test_what_is_asked_for_is_done_whatever_fits(settings: dict[str, Any], layout: Layout) -> None:
    for fits in (True, False):
        assert choose_layout(config(**settings), DEBUG, ranks(4), answer(fits)) == layout


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_one_rank_under_torchrun_can_be_told_to_go_the_way_of_many(mode: str) -> None:
    assert choose_layout(config(parallel=mode), DEBUG, ranks(1), unasked) == Layout(mode, 1)


@pytest.mark.parametrize(
    "settings", [{"parallel": "ddp"}, {"parallel": "fsdp"}, {"replicate": 2}, {"expert_parallel": 1}]
)
def test_without_torchrun_there_is_nobody_to_share_with(settings: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"--parallel, --replicate and --expert_parallel .* torchrun --nproc_per_node=N"
    ):
        choose_layout(config(**settings), DEBUG, Ranks(), unasked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": "ddp", "replicate": 2}, "--replicate 2 belongs to --parallel fsdp"),
        ({"replicate": 3}, "--replicate 3 does not divide the 4 ranks"),
        ({"expert_parallel": 3}, "--expert_parallel 3 does not divide the 4 ranks"),
        ({"gradient_accumulation": 1, "batch_size": 6}, "a step of 6 sequences .* does not divide over 4 ranks"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_before_anything_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_layout(config(**settings), DEBUG, ranks(4), answer(True))


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=f"--expert_parallel 3 does not divide the {DEBUG.n_routed_experts} routed"):
        choose_layout(config(batch_size=3, expert_parallel=3), DEBUG, ranks(3), answer(True))


@pytest.mark.parametrize(
    ("free", "on_this_machine", "fits"),
    [(710.0, 8, True), (690.0, 8, False), (690.0, 4, True), (1.0, 1, False), (None, 8, True)],
)
def test_a_replica_fits_where_the_ranks_of_a_machine_leave_a_fifth_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, free: float | None, on_this_machine: int, fits: bool
) -> None:
    """Where memory cannot be looked at, nobody is kept from trying."""
    monkeypatch.setattr(build, "free_memory", lambda: free)
    monkeypatch.setattr(memory_estimate, "peak", lambda _: 70.0)
    assert replica_fits(config(), DEBUG, CPU, ranks(8, on_this_machine)) is fits


def test_what_a_replica_needs_is_that_of_a_pass_as_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[memory_estimate.Job] = []

    def memory(job: memory_estimate.Job) -> dict[str, float]:
        asked.append(job)
        return {}

    monkeypatch.setattr(memory_estimate, "memory", memory)
    monkeypatch.setattr(memory_estimate, "peak", lambda _: 0.0)
    replica_fits(config(batch_size=6), DEBUG, CPU, ranks(4))
    replica_fits(config(activation_checkpointing=True), DEBUG, CPU, ranks(2))
    assert [(job.config, job.sequences, job.checkpointing) for job in asked] == [(DEBUG, 3, False), (DEBUG, 4, True)]
    assert [job.layout for job in asked] == [Layout("ddp", 4), Layout("ddp", 2)]


def test_one_process_has_all_of_the_model_and_nothing_else() -> None:
    parallel = build_parallel_model(DEBUG, ONE, CPU)
    assert parallel.orthogonalise is None
    assert parallel.model.num_parameters() == sum(p.numel() for p in parallel.model.parameters())


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        (Layout("ddp", 4), ("4 ranks, ddp: ", "4 replicas", "8 sequences are 1 x 2 on each rank")),
        (Layout("fsdp", 1), ("1 rank, fsdp: ", "1 shard", "8 sequences are 2 x 4 on each rank")),
        (Layout("fsdp", 2), ("2 ranks, fsdp: ", "2 shards", "8 sequences are 1 x 4 on each rank")),
        (
            Layout("fsdp", 8, 2, 2),
            ("8 ranks, fsdp: ", "2 replicas", "4 shards", "experts distributed over 2 ranks", "1 x 1 on each rank"),
        ),
    ],
)
def test_the_user_is_told_in_one_line_how_the_model_lies(layout: Layout, parts: tuple[str, ...]) -> None:
    line = about_layout(layout, config())
    assert "\n" not in line
    assert [part for part in parts if part not in line] == []
    assert ("experts" in line) == (layout.expert_parallel > 0)


def test_one_process_has_nothing_to_be_told() -> None:
    assert about_layout(ONE, config()) == ""


# ---- devices ------------------------------------------------------------------------------------


def test_several_ranks_never_share_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2
    monkeypatch.setattr(process_group, "current_ranks", lambda: ranks(size))
    with pytest.raises(UserError, match="--device cuda:0 cannot be that of 2 ranks: use cuda"):
        rank_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device auto cannot be that of 2 ranks"):
        rank_device("auto")
    assert rank_device("cpu") == CPU
    size = 1
    assert rank_device("auto").type == "mps"
