"""Checkpoints that ranks write together: read by any number of others, never half there, damage noticed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_worker import ABOUT, whole

from nanokimi import checkpoint
from nanokimi.checkpoint import CheckpointError
from nanokimi.checkpoint import shards as sharded
from nanokimi.errors import RunError

WORKER = Path(__file__).with_name("sharded_worker.py")


def start(mode: str, size: int, folder: Path) -> subprocess.Popen[str]:
    """``size`` ranks that do ``mode``, in a process group of their own."""
    command = [sys.executable, str(WORKER), mode, str(size), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def run(mode: str, size: int, folder: Path) -> list[int]:
    """How each of the ranks ended."""
    return [int(code) for code in start(mode, size, folder).communicate(timeout=60)[0].split()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left, of which the second was killed in mid-save in the end."""
    folder = tmp_path_factory.mktemp("checkpoints")
    assert run("write", 2, folder) == [0, -signal.SIGKILL]
    return folder


@pytest.fixture
def step(written: Path, tmp_path: Path) -> Path:
    """A copy of one of these checkpoints, to be damaged."""
    return Path(shutil.copytree(written / "step_00000010", tmp_path / "step_00000010"))


def save(folder: Path, value: float = 1.0, about: Any = None) -> None:
    sharded.begin_save(folder, {"x": torch.full((3,), value)}, about or {}, None, asynchronous=False).result()


def is_whole(folder: Path, seed: int) -> bool:
    expected = whole(seed)
    found = sharded.read_tensors(folder, expected)
    return all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)


def test_one_process_reads_what_two_ranks_wrote(written: Path) -> None:
    sharded.verify(written / "step_00000010")
    assert is_whole(written / "step_00000010", 0)
    assert sharded.shapes(written / "step_00000010")["three_rows"] == (torch.Size([3, 5]), torch.float32)
    about = sharded.read_about(written / "step_00000010")
    assert torch.equal(about["position"]["order"], torch.arange(3))
    assert {name: about[name] for name in ("step", "name", "losses")} == {
        "step": 10,
        "name": "run",
        "losses": [2.5, None],
    }


def test_names_of_version_1_are_read_as_the_present_ones(tmp_path: Path) -> None:
    folder, names = tmp_path / "step_00000001", ("model.embed", "optimizer.exp_avg.embed", "model.norm.weight")
    values = {name: torch.full((3, 2), float(i)) for i, name in enumerate(names)}
    sharded.begin_save(folder, values, {}, None, asynchronous=False).result()
    present = ("model.embed.weight", "optimizer.exp_avg.embed.weight", "model.norm.weight")
    assert tuple(sharded.shapes(folder)) == present
    found = sharded.read_tensors(folder, present)
    assert [found[name].mean().item() for name in present] == [0.0, 1.0, 2.0]


@pytest.mark.fault(69)
def test_four_ranks_on_another_mesh_read_what_two_wrote_and_write_it_anew(written: Path) -> None:
    """Each holds but its rows, some none; each verifies its share of the files."""
    assert run("go_on", 4, written) == [0] * 4
    anew = written / "step_00000050"
    sharded.verify(anew)
    assert is_whole(anew, 0)
    shutil.rmtree(anew)


def test_each_part_is_written_once(written: Path) -> None:
    step = written / "step_00000010"
    numbers = sum(tensor.nbytes for tensor in whole(0).values())
    files = {path.name: path.stat().st_size for path in step.glob("*.safetensors")}
    headers = sum(8 + int.from_bytes((step / name).open("rb").read(8), "little") for name in files)
    assert (len(files), sum(files.values()) - headers) == (2, numbers)


def test_what_training_changes_while_it_is_saved_is_saved_as_it_was(written: Path) -> None:
    sharded.verify(written / "step_00000020")
    assert is_whole(written / "step_00000020", 1)
    assert sharded.read_about(written / "step_00000020")["losses"] == ABOUT["losses"]
    assert sharded.read_about(written / "step_00000020")["position"]["order"].tolist() == [0, 1, 2]


@pytest.mark.fault(63)
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_earlier_ones(written: Path) -> None:
    for rank in (0, 1):
        assert "step_00000030 cannot be written: the disk is full" in (written / f"full_{rank}").read_text()
    assert [path.name for path in sharded.step_folders(written)] == ["step_00000010", "step_00000020"]


@pytest.mark.fault(62)
def test_a_rank_that_is_killed_in_mid_save_is_missed_by_the_other_and_leaves_nothing_half_done(written: Path) -> None:
    assert "lost contact with another rank" in (written / "lost_0").read_text()
    assert not list(written.glob("*step_00000040*"))
    assert not list(written.glob(".*"))


@pytest.mark.fault(62)
def test_kill_9_of_all_ranks_during_saves_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """They replace the one of the same name again and again."""
    ranks = start("endlessly", 2, tmp_path)
    assert ranks.stdout is not None
    reported = [int(ranks.stdout.readline()) for _ in range(3)]
    time.sleep(0.02)
    os.killpg(ranks.pid, signal.SIGKILL)
    reported += [int(line) for line in ranks.communicate()[0].split()]
    sharded.tidy(tmp_path)
    (folder,) = sharded.step_folders(tmp_path)
    sharded.verify(folder)
    about = sharded.read_about(folder)
    assert about["step"] >= reported[-1]
    assert torch.equal(sharded.read_tensors(folder, ["x"])["x"], torch.full((400, 300), float(about["step"])))
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "meet_endlessly"}


@pytest.mark.fault(56)
@pytest.mark.parametrize("position", [0, 0.3, 0.99])
@pytest.mark.parametrize("name", ["run.pt", "shard-00001*", "shard-00002*"])
def test_a_flipped_byte_in_any_file_is_noticed(step: Path, name: str, position: float) -> None:
    (path,) = step.glob(name)
    contents = bytearray(path.read_bytes())
    contents[int(position * len(contents))] ^= 0x10
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=path.name):
        sharded.verify(step)


@pytest.mark.fault(55)
def test_missing_truncated_and_foreign_files_are_named(step: Path) -> None:
    shard = next(step.glob("shard-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"shard-00002.*: truncated"):
        sharded.read_about(step)
    shard.rename(step / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks shard-00002.* \(1 in all\)"):
        sharded.read_tensors(step, ["fp64"])
    shutil.copy(next(step.glob("shard-00001*")), shard)
    with pytest.raises(CheckpointError, match=r"other\.safetensors does not belong there"):
        sharded.verify(step)
    (step / "run.pt").unlink()
    assert not sharded.is_sharded(step)
    with pytest.raises(CheckpointError, match=r"run\.pt: no such checkpoint"):
        sharded.verify(step)


def test_a_newer_folder_asks_for_an_update_and_another_file_of_ours_is_refused(step: Path) -> None:
    content = checkpoint.read(step / "run.pt")
    checkpoint.save(step / "run.pt", content | {"sharded": 99})
    with pytest.raises(CheckpointError, match="newer nanokimi"):
        sharded.read_about(step)
    checkpoint.save(step / "run.pt", {"model": {}})
    with pytest.raises(CheckpointError, match="holds no sharded"):
        sharded.read_about(step)


@pytest.mark.fault(61)
def test_there_is_no_pickle_beside_the_plain_values(step: Path) -> None:
    assert {path.suffix for path in step.iterdir()} == {".safetensors", ".pt"}
    assert torch.load(step / "run.pt", weights_only=True)["about"]["step"] == 10


@pytest.mark.fault(58, 59)
def test_tensors_that_do_not_fit_are_named(written: Path) -> None:
    step = written / "step_00000010"
    with pytest.raises(CheckpointError, match=r"fp64 is \[5, 3\], the model's is \[3, 5\]"):
        sharded.load_into(step, {"fp64": torch.zeros(3, 5)})
    with pytest.raises(CheckpointError, match="lacks unknown"):
        sharded.load_into(step, {"unknown": torch.zeros(3, 5)})
    with pytest.raises(CheckpointError, match="lacks unknown"):
        sharded.read_tensors(step, ["unknown"])


@pytest.mark.fault(63)
def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "step_00000001")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(RunError, match="step_00000002 cannot be written: the disk is full"):
        save(tmp_path / "step_00000002")
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_a_failed_save_leaves_the_one_that_it_was_to_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step_00000001"
    save(folder, 1.0)

    def full(path: Path, content: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(sharded, "save", full)
    with pytest.raises(RunError, match="Read-only file system"):
        save(folder, 2.0)
    assert sharded.read_tensors(folder, ["x"])["x"].tolist() == [1.0] * 3
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_what_killed_saves_left_is_tidied_by_the_next(tmp_path: Path) -> None:
    save(tmp_path / "step_00000001")
    save(tmp_path / "step_00000002")
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.old")  # killed before the new one had its name
    shutil.copytree(tmp_path / "step_00000002", tmp_path / ".step_00000002.old")  # killed after that
    (tmp_path / ".step_00000003.partial" / "step_00000003").mkdir(parents=True)
    save(tmp_path / "step_00000004")
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002", "step_00000004"]


@pytest.mark.parametrize(("keep", "left"), [(0, []), (2, ["step_00000200", "step_00001000"]), (9, None)])
def test_all_but_the_last_are_pruned(tmp_path: Path, keep: int, left: list[str] | None) -> None:
    names = ["step_00000030", "step_00000200", "step_00001000"]
    for name in reversed(names):
        save(tmp_path / name)
    (tmp_path / "latest.pt").touch()
    sharded.prune(sharded.step_folders(tmp_path), keep)
    assert sorted(os.listdir(tmp_path)) == ["latest.pt", *(names if left is None else left)]
