"""What the processes of a run tell each other, and what they say when one is gone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrun import Launch, run

from nanokimi.errors import RunError, UserError
from nanokimi.parallel.ranks import ALONE, HangWatch, Ranks, contact_lost_explained, from_bytes, joined, to_bytes

pytestmark = pytest.mark.serial


def tell(folder: Path) -> None:
    """What each of two ranks finds; called by torchrun's processes."""
    with joined("cpu", 30) as ranks:
        rank = ranks.rank
        (folder / f"found_{rank}").write_text(json.dumps(found_by(ranks, folder)))


def found_by(ranks: Ranks, folder: Path) -> dict[str, Any]:
    rank = ranks.rank
    return {
        "numbers": [ranks.rank, ranks.size, ranks.local, ranks.on_this_machine],
        "largest": ranks.largest([rank, -rank]),
        "total": ranks.total([1 + rank, 0.25]),
        "gather": [data.decode() for data in ranks.gather(b"longer" if rank else b"")],
        "given": ranks.given(b"mine" if rank else b"the leader's").decode(),
        "agreed": ranks.run_or_fail_together(lambda: rank + 10),
        "in_turn": ranks.in_turn(lambda: in_cache(folder)),
        "mistake of both": ended(lambda: ranks.run_or_fail_together(lambda: fail(UserError("--seed is odd")))),
        "mistake of one": ended(lambda: ranks.run_or_fail_together(lambda: fail(RunError("full")) if rank else 0)),
        "first in turn": ended(lambda: ranks.in_turn(lambda: fail(UserError("bad")) if not rank else 0)),
        "afterwards": ranks.total([1.0]),
    }


def in_cache(folder: Path) -> bool:
    """Whether it was there already."""
    path = folder / "cache"
    there = path.exists()
    time.sleep(0.1)
    path.touch()
    return there


def fail(error: Exception) -> int:
    raise error


def ended(act: Any) -> str:
    try:
        act()
    except (UserError, RunError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing happened"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    code, job = run(Launch((), call="test_ranks:tell"), tmp_path_factory.mktemp("ranks"))
    assert code == 0, job.said()
    return [json.loads((job.folder / f"found_{rank}").read_text()) for rank in range(2)]


def test_ranks_know_each_other_and_reduce_numbers(found: list[dict[str, Any]]) -> None:
    assert [own["numbers"] for own in found] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    for own in found:
        assert own["largest"] == [1, 0]
        assert own["total"] == [3, 0.5]
        assert own["gather"] == ["", "longer"]
        assert own["given"] == "the leader's"


def test_one_rank_of_a_machine_goes_first_and_the_others_find_what_it_left(found: list[dict[str, Any]]) -> None:
    assert [own["agreed"] for own in found] == [10, 11]
    assert [own["in_turn"] for own in found] == [False, True]


def test_a_mistake_on_any_rank_ends_all_and_only_the_leader_speaks(found: list[dict[str, Any]]) -> None:
    assert [own["mistake of both"] for own in found] == ["UserError: --seed is odd", "SystemExit: 2"]
    assert [own["mistake of one"] for own in found] == ["RunError: rank 1: full", "SystemExit: 1"]
    assert [own["first in turn"] for own in found] == ["UserError: bad", "SystemExit: 2"]
    assert found[0]["afterwards"] == found[1]["afterwards"] == [2.0]


def test_one_process_shares_with_nobody() -> None:
    assert ALONE.is_main
    assert ALONE.largest([3.0]) == ALONE.total([3.0]) == [3.0]
    assert ALONE.gather(b"x") == [b"x"]
    assert ALONE.in_turn(lambda: 5) == 5
    with pytest.raises(UserError, match=r"^bad$"):
        ALONE.run_or_fail_together(lambda: fail(UserError("bad")))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41234"),
        RuntimeError("\nRead error [::1]:5: Connection reset by peer"),
        dist.DistBackendError("NCCL communicator was aborted"),
        dist.DistStoreError("wait timeout after 6000ms"),
    ],
)
def test_a_lost_rank_is_one_line_that_says_how_to_go_on(error: Exception) -> None:
    with (
        pytest.raises(RunError, match=r"lost contact with another rank .*--resume.*--max-restarts") as told,
        contact_lost_explained(),
    ):
        raise error
    assert "\n" not in str(told.value)
    assert "/pytorch" not in str(told.value)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), torch.OutOfMemoryError("timed out"), KeyError("x")])
def test_another_error_is_left_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as told, contact_lost_explained():
        raise error
    assert told.value is error


def test_a_hang_leaves_the_stack_of_every_thread_and_no_hang_leaves_nothing(tmp_path: Path) -> None:
    """Fault 51."""
    stacks = tmp_path / "stacks_rank_1.txt"
    with HangWatch(tmp_path, Ranks(1, 2), timeout=600) as watch:
        watch.alive()
    assert not stacks.exists()
    with HangWatch(tmp_path, Ranks(1, 2), timeout=0.2):
        hang_until(stacks)
    assert "in hang_until" in stacks.read_text()
    with HangWatch(tmp_path / "alone", ALONE, timeout=600):
        assert not (tmp_path / "alone").exists()


def hang_until(written: Path) -> None:
    while not written.stat().st_size:
        time.sleep(0.01)


def test_plain_values_and_tensors_travel_as_bytes() -> None:
    sent = {"position": [1, None, "x"], "buffer": torch.arange(3)}
    came = from_bytes(to_bytes(sent))
    assert came["position"] == sent["position"]
    assert torch.equal(came["buffer"], sent["buffer"])
