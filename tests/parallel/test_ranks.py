"""What the processes of a run tell each other, and what they say when one is gone."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrun import Launch, run

from nanokimi.errors import RunError, UserError
from nanokimi.parallel import ranks
from nanokimi.parallel.process_group import contact_lost_explained, process_group
from nanokimi.parallel.ranks import HangWatch, Ranks, current_ranks, from_bytes, to_bytes

pytestmark = pytest.mark.serial


def tell(folder: Path) -> None:
    """What each of two ranks finds; called by torchrun's processes."""
    with process_group("cpu", 30) as group:
        (folder / f"found_{group.rank}").write_text(json.dumps(found_by(group, folder)))


def found_by(group: Ranks, folder: Path) -> dict[str, Any]:
    rank = group.rank
    with group.first_of_machine_first():
        there = in_cache(folder)
    return {
        "numbers": [rank, group.size, group.local, group.on_this_machine],
        "current": current_ranks().rank,
        "max": group.max([rank, -rank]),
        "sum": group.sum([1 + rank, 0.25]),
        "gather": [data.decode() for data in group.gather(b"longer" if rank else b"")],
        "broadcast": group.broadcast(b"mine" if rank else b"the main rank's").decode(),
        "cache": there,
    }


def in_cache(folder: Path) -> bool:
    """Whether it was there already."""
    path = folder / "cache"
    there = path.exists()
    time.sleep(0.1)
    path.touch()
    return there


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    code, job = run(Launch((), call="test_ranks:tell"), tmp_path_factory.mktemp("ranks"))
    assert code == 0, job.said()
    return [json.loads((job.folder / f"found_{rank}").read_text()) for rank in range(2)]


def test_ranks_know_each_other_and_reduce_numbers(found: list[dict[str, Any]]) -> None:
    assert [own["numbers"] for own in found] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    assert [own["current"] for own in found] == [0, 1]
    for own in found:
        assert own["max"] == [1, 0]
        assert own["sum"] == [3, 0.5]
        assert own["gather"] == ["", "longer"]
        assert own["broadcast"] == "the main rank's"


def test_one_rank_of_a_machine_goes_first_and_the_others_find_what_it_left(found: list[dict[str, Any]]) -> None:
    assert [own["cache"] for own in found] == [False, True]


# ---- failing together ---------------------------------------------------------------------------


def both_fail(folder: Path) -> None:
    with process_group("cpu", 30):
        raise UserError("--seed is odd")


def second_fails(folder: Path) -> None:
    with process_group("cpu", 30) as group:
        if group.rank:
            raise RunError("full")
        group.barrier()


def main_fails(folder: Path) -> None:
    with process_group("cpu", 30) as group:
        if group.is_main:
            raise RunError("full")
        group.barrier()


@pytest.mark.parametrize(
    ("act", "line", "code"),
    [
        (both_fail, "--seed is odd", 2),
        (second_fails, "nanokimi: rank 1: full", 1),
        (main_fails, "full", 1),
    ],
)
def test_a_failure_on_any_rank_ends_all_with_one_line_and_its_exit_code(
    act: Any, line: str, code: int, tmp_path: Path
) -> None:
    """Where all fail alike the main rank tells; where one fails the others, who wait for it, are silent."""
    ended, job = run(Launch((), call=f"test_ranks:{act.__name__}_told"), tmp_path)
    assert ended != 0
    assert [told for told in job.said().splitlines() if told.endswith(line)] == [line], job.said()
    assert f"exitcode  : {code}" in job.said()
    assert "lost contact" not in job.said()


def told(act: Any) -> Any:
    """What ``nanokimi`` does with a mistake that reaches it."""

    def acting(folder: Path) -> None:
        try:
            act(folder)
        except (UserError, RunError) as error:
            print(error, file=sys.stderr, flush=True)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from error

    return acting


both_fail_told, second_fails_told, main_fails_told = told(both_fail), told(second_fails), told(main_fails)


def test_one_process_shares_with_nobody() -> None:
    one = current_ranks()
    assert one.is_main
    assert one.max([3.0]) == one.sum([3.0]) == [3.0]
    assert one.gather(b"x") == [b"x"]
    with pytest.raises(UserError, match=r"^bad$"), one.first_of_machine_first(), process_group("cpu", 30):
        raise UserError("bad")


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


@pytest.mark.fault(51)
def test_a_hang_leaves_the_stack_of_every_thread_and_no_hang_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HangWatch(tmp_path / "one", timeout=600):
        assert not (tmp_path / "one").exists()
    monkeypatch.setattr(ranks, "current_ranks", lambda: Ranks(1, 2))
    stacks = tmp_path / "stacks_rank_1.txt"
    with HangWatch(tmp_path, timeout=600) as watch:
        watch.alive()
    assert not stacks.exists()
    with HangWatch(tmp_path, timeout=0.2):
        hang_until(stacks)
    assert "in hang_until" in stacks.read_text()


def hang_until(written: Path) -> None:
    while not written.stat().st_size:
        time.sleep(0.01)


def test_plain_values_and_tensors_travel_as_bytes() -> None:
    sent = {"position": [1, None, "x"], "buffer": torch.arange(3)}
    came = from_bytes(to_bytes(sent))
    assert came["position"] == sent["position"]
    assert torch.equal(came["buffer"], sent["buffer"])
