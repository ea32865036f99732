"""What happens to folders and disks while a run saves into them, and checkpoints written while training goes on."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.checkpoint import file, shards
from nanokimi.checkpoint.background import Background, Snapshot
from nanokimi.checkpoint.run import SAVE_NUMBER, Checkpoints
from nanokimi.cli import main
from nanokimi.config import ModelConfig
from nanokimi.errors import RunError
from nanokimi.files import link, lock, sync_folder
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import MuonClip
from nanokimi.parallel.ranks import SingleDevice
from nanokimi.training.trainer import Trainer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(Path(shutil.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def train(text: Path, output: Path, *more: str) -> int:
    common = ["--output_dir", str(output), "--data_path", str(text), "--device", "cpu", "--eval_interval", "0"]
    return main(["train", *common, "--preset", "debug", "--schedule", "constant", "--save_interval", "2", *more])


def weights(output: Path, name: str = "final.pt") -> dict[str, Any]:
    content = checkpoint.read(output / "checkpoints" / name)
    return {
        **content["model"],
        **{f"{i}.{k}": v for i, s in content["optimizer"]["state"].items() for k, v in s.items()},
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# ---- which one is the newest --------------------------------------------------------------------


@pytest.mark.fault("A3")
def test_a_copied_folder_goes_on_from_its_newest_save_and_not_from_the_file_copied_last(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "a", "--max_steps", "6") == 0
    copied = tmp_path / "b" / "checkpoints"
    copied.mkdir(parents=True)
    for at, name in enumerate(("final.pt", "latest.pt", "previous.pt")):
        shutil.copyfile(tmp_path / "a" / "checkpoints" / name, copied / name)
        os.utime(copied / name, (1_000_000_000 + at,) * 2)
    assert train(text, tmp_path / "b", "--resume", "--max_steps", "7") == 0
    assert f"resuming {copied / 'latest.pt'} at step 6 of 7" in capsys.readouterr().err


def numbered(path: Path, number: int, step: int) -> None:
    number_of = {SAVE_NUMBER: number} if number else {}
    checkpoint.save(path, {"model": {"w": torch.ones(999)}, "optimizer": {}, "counters": {"step": step}, **number_of})


@pytest.mark.fault("A3")
def test_of_an_abandoned_branch_and_a_later_save_the_later_save_is_taken(tmp_path: Path) -> None:
    numbered(tmp_path / "best.pt", 3, 30)
    numbered(tmp_path / "latest.pt", 4, 25)
    about = {"optimizer_groups": [], SAVE_NUMBER: 5, "counters": {"step": 20}}
    shards.begin_save(tmp_path / "step_00000020", {"x": torch.ones(2)}, about, None, asynchronous=False).result()
    assert [path.name for path in Checkpoints(tmp_path).candidates()] == ["step_00000020", "latest.pt", "best.pt"]


@pytest.mark.fault("A3")
def test_files_of_earlier_versions_without_a_number_begin_with_latest(tmp_path: Path) -> None:
    for at, (name, step) in enumerate({"latest.pt": 30, "previous.pt": 20, "best.pt": 10}.items()):
        numbered(tmp_path / name, 0, step)
        os.utime(tmp_path / name, (1_000_000_000 + at,) * 2)
    assert [path.name for path in Checkpoints(tmp_path).candidates()] == ["latest.pt", "previous.pt", "best.pt"]


@pytest.mark.fault("A3")
def test_a_save_number_with_a_flipped_byte_is_noticed_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbered(tmp_path / "latest.pt", 0x5A, 3)
    numbered(tmp_path / "previous.pt", 0x59, 2)
    data = bytearray((tmp_path / "latest.pt").read_bytes())
    at = data.index(b"K\x5a", data.index(SAVE_NUMBER.encode())) + 1
    data[at] = 1
    (tmp_path / "latest.pt").write_bytes(data)
    assert Checkpoints(tmp_path).find().path.name == "previous.pt"
    assert "latest.pt: damaged" in capsys.readouterr().err


def test_the_number_is_read_without_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(tmp_path / "latest.pt", 7, 3)
    monkeypatch.setattr(file, "_digest", lambda path: pytest.fail("the whole file was read"))
    assert [path.name for path in Checkpoints(tmp_path).candidates()] == ["latest.pt"]


# ---- folders that are gone ----------------------------------------------------------------------


@pytest.mark.fault("A7")
@pytest.mark.parametrize("gone", ["checkpoints", "logs", "."])
@pytest.mark.parametrize("flags", [[], ["--async_checkpoints"]])
def test_a_folder_that_is_removed_while_a_run_goes_on_is_made_again(
    text: Path, tmp_path: Path, gone: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, output = Trainer._train_step, tmp_path / "run"

    def removing(self: Trainer, batches: Any) -> dict[str, Any]:
        if self.counters.step == 3:
            self.checkpoints.finish()
            shutil.rmtree(output / gone)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", removing)
    assert train(text, output, "--max_steps", "6", *flags) == 0
    assert checkpoint.read(output / "checkpoints" / "final.pt")["counters"]["step"] == 6
    assert len((output / "logs" / "training_metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.fault("A7")
def test_shards_make_their_folder_again(tmp_path: Path) -> None:
    folder = tmp_path / "gone" / "step_00000001"
    shards.begin_save(folder, {"x": torch.ones(2)}, {}, None, asynchronous=True).result()
    shards.verify(folder)


# ---- file systems that cannot do everything -----------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int, module: Any = os) -> None:
    def refused(*arguments: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, refused)


@pytest.mark.fault("A10")
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_links_keeps_the_one_before(
    text: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "link", number)
    assert train(text, tmp_path, "--max_steps", "6") == 0
    steps = {path.name: checkpoint.read(path)["counters"]["step"] for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {"latest.pt": 6, "final.pt": 6, "previous.pt": 4}


@pytest.mark.fault("A10")
def test_without_links_and_without_room_a_run_ends_in_one_line_and_leaves_nothing_partial(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was ``latest.pt`` is renamed; the copy for ``final.pt`` has no room."""
    usage, room = namedtuple("usage", "total used free"), iter([1 << 30] * 3 + [100] * 9)
    refuse(monkeypatch, "link", errno.EPERM)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, next(room)))
    assert train(text, tmp_path, "--max_steps", "6") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanokimi: ")]
    assert len(lines) == 1
    assert "final.pt: the disk is full" in lines[0]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest.pt", "previous.pt"]
    assert checkpoint.read(tmp_path / "checkpoints" / "latest.pt")["counters"]["step"] == 6


@pytest.mark.fault("A10")
def test_a_copy_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    (tmp_path / "b").write_bytes(b"earlier")
    refuse(monkeypatch, "link", errno.EPERM)
    refuse(monkeypatch, "copyfile", errno.ENOSPC, shutil)
    with pytest.raises(OSError, match="No space"):
        link(tmp_path / "a", tmp_path / "b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"whole", "b": b"earlier"}


def test_a_second_link_of_one_file_leaves_no_third_name(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for _ in range(2):
        link(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.fault("A10")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_and_folder_syncs_can_be_trained_on(
    text: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    for name in ("flock", "lockf"):
        refuse(monkeypatch, name, number, fcntl)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: refused_for_folders(fsync, fd))
    assert train(text, tmp_path, "--max_steps", "2") == 0


def refused_for_folders(fsync: Any, descriptor: int) -> None:
    if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        raise OSError(errno.EINVAL, "Invalid argument")
    fsync(descriptor)


def test_a_lock_of_another_and_a_failing_disk_are_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "x").open("w") as one, (tmp_path / "x").open("w") as two:
        lock(one.fileno())
        with pytest.raises(BlockingIOError):
            lock(two.fileno())
    refuse(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


# ---- written while training goes on -------------------------------------------------------------


def test_a_snapshot_keeps_its_values_and_its_place() -> None:
    tensor, numbers = torch.arange(4.0), [1]
    snapshot = Snapshot()
    taken = snapshot.take({"a": {0: tensor}, "n": numbers})
    tensor.zero_()
    numbers.append(2)
    assert taken["a"][0].tolist() == [0, 1, 2, 3]
    assert taken["n"] == [1]
    again = snapshot.take({"a": {0: tensor}, "n": numbers})
    assert again["a"][0].data_ptr() == taken["a"][0].data_ptr()


def test_background_work_is_done_in_order_and_a_failure_is_told_once() -> None:
    seen: list[int] = []
    background = Background()
    for number in range(5):
        background.start(lambda n=number: seen.append(n))
    background.finish()
    assert seen == list(range(5))
    background.start(lambda: (_ for _ in ()).throw(RunError("full")))
    background.start(lambda: seen.append(9))
    with pytest.raises(RunError, match="full"):
        background.finish()
    background.finish()
    assert seen == list(range(5))


@pytest.mark.fault(68)
def test_an_asynchronous_run_leaves_what_a_synchronous_one_leaves_and_resumes_to_the_bit(
    text: Path, tmp_path: Path
) -> None:
    assert train(text, tmp_path / "sync", "--max_steps", "6") == 0
    assert train(text, tmp_path / "async", "--max_steps", "4", "--async_checkpoints") == 0
    assert train(text, tmp_path / "async", "--max_steps", "6", "--async_checkpoints", "--resume") == 0
    for name in ("final.pt", "previous.pt"):
        assert_same(weights(tmp_path / "sync", name), weights(tmp_path / "async", name))
    assert sorted(os.listdir(tmp_path / "sync" / "checkpoints")) == sorted(
        os.listdir(tmp_path / "async" / "checkpoints")
    )


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, may_write, save = SingleDevice(Transformer(ModelConfig.preset("debug"))), threading.Event(), file.save

    def waiting(path: Path, content: Any, **more: Any) -> None:
        assert may_write.wait(60)
        save(path, content, **more)

    monkeypatch.setattr(file, "save", waiting)
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    before = model.model.embed.weight.detach().clone()
    checkpoints.save("latest.pt", 1, {}, model, MuonClip(model.model))
    with torch.no_grad():
        model.model.embed.weight.zero_()
    assert not os.listdir(tmp_path)
    may_write.set()
    checkpoints.finish()
    assert torch.equal(checkpoint.read(tmp_path / "latest.pt")["model"]["embed.weight"], before)


@pytest.mark.fault(63)
@pytest.mark.parametrize("flags", [[], ["--async_checkpoints"]])
def test_a_disk_that_is_full_ends_the_run_in_one_line_and_space_freed_it_goes_on(
    text: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(text, tmp_path / "whole", "--max_steps", "8") == 0
    assert train(text, tmp_path / "run", "--max_steps", "4") == 0
    with monkeypatch.context() as full:
        refuse(full, "write", errno.ENOSPC, file.HashingFile)
        assert train(text, tmp_path / "run", "--max_steps", "8", "--resume", *flags) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanokimi: ")]
    assert len(lines) == 1
    assert train(text, tmp_path / "run", "--max_steps", "8", "--resume", *flags) == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
