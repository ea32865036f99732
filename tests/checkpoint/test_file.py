"""The file format: what was saved is never lost, what is damaged is noticed, what is foreign is refused."""

from __future__ import annotations

import errno
import os
import random
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

from nanokimi import checkpoint
from nanokimi.checkpoint import CheckpointError, file
from nanokimi.checkpoint.weights import load_weights
from nanokimi.cli import main
from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import RunError
from nanokimi.interop.loading import load
from nanokimi.model.transformer import Transformer
from nanokimi.parallel.ranks import SingleDevice

CONTENT: dict[str, Any] = {"weights": {"a": torch.arange(300.0)}, "step": 7, "name": "x", "list": [1, 2.5, None]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "latest.pt"
    checkpoint.save(path, CONTENT)
    return path


def test_what_is_saved_is_read_back(saved: Path) -> None:
    content = checkpoint.read(saved)
    assert torch.equal(content["weights"]["a"], CONTENT["weights"]["a"])
    assert (content["step"], content["name"], content["list"], content["version"]) == (7, "x", [1, 2.5, None], 2)


def test_any_torch_reads_it_with_weights_only(saved: Path) -> None:
    assert torch.load(saved, weights_only=True)["step"] == 7


@pytest.mark.fault(56)
def test_every_single_flipped_byte_is_noticed(saved: Path) -> None:
    """Wherever it is, padding and checksum included."""
    good = saved.read_bytes()
    for position in [*random.Random(0).sample(range(len(good)), 300), 0, 1, *range(len(good) - 100, len(good))]:
        bad = bytearray(good)
        bad[position] ^= 0x10
        saved.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"latest\.pt"):
            checkpoint.read(saved)


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is empty"),
        (b"garbage" * 100, "not a checkpoint"),
        (b"PK" + b"garbage" * 100, "truncated, or not saved by nanokimi"),
    ],
)
def test_empty_and_foreign_files_are_named_for_what_they_are(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "latest.pt"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path)


@pytest.mark.fault(55)
def test_a_truncated_file_is_noticed(saved: Path) -> None:
    good = saved.read_bytes()
    for length in (3, len(good) // 2, len(good) - 1):
        saved.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"truncated|damaged"):
            checkpoint.read(saved)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.read(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="is a directory"):
        checkpoint.read(tmp_path)


class Payload:
    """What a malicious pickle would do: run a command of its own while it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.fault(61)
@pytest.mark.parametrize("through_our_format", [False, True])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, through_our_format: bool) -> None:
    """Also with a checksum that is right."""
    path, marker = tmp_path / "evil.pt", tmp_path / "ran"
    if through_our_format:
        checkpoint.save(path, {"payload": Payload(marker)})
    else:
        torch.save({"payload": Payload(marker)}, path)
    with pytest.raises(CheckpointError, match=r"refused|not saved by nanokimi"):
        checkpoint.read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload was a live one


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "new.pt", {"version": 99})
    with pytest.raises(CheckpointError, match="newer nanokimi"):
        checkpoint.read(tmp_path / "new.pt")


@pytest.mark.fault(63)
def test_a_full_disk_is_noticed_before_anything_is_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(RunError, match="needs 16 MiB, the disk has 0 MiB left"):
        checkpoint.save(saved, {"step": 8})
    assert checkpoint.read(saved)["step"] == 7


@pytest.mark.fault(63)
def test_a_disk_that_fills_up_in_mid_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    original = file.HashingFile.write

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            nonlocal written
            written += len(data)
            if written > 10_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

    def write(self: Any, data: bytes) -> int:
        self.file = self.file if isinstance(self.file, Full) else Full(self.file)
        return original(self, data)

    monkeypatch.setattr(file.HashingFile, "write", write)
    with pytest.raises(RunError, match="the disk is full; the earlier checkpoint is intact"):
        checkpoint.save(saved, {"x": torch.randn(100_000)})
    monkeypatch.undo()
    assert checkpoint.read(saved)["step"] == 7
    assert os.listdir(saved.parent) == ["latest.pt"]


def test_what_the_disk_garbles_never_replaces_a_good_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_digest", lambda path: "0" * 64)
    with pytest.raises(RunError, match="read back differs"):
        checkpoint.save(saved, {"step": 8})
    monkeypatch.undo()
    assert checkpoint.read(saved)["step"] == 7


ENDLESS_SAVES = """
import sys, torch
from pathlib import Path
from nanokimi import checkpoint
path = Path(sys.argv[1])
for step in range(1, 10**6):
    if path.exists():
        checkpoint.link(path, path.with_name("previous.pt"))
    checkpoint.save(path, {"step": step, "x": torch.full((300_000,), float(step))})
    print(step, flush=True)
"""


@pytest.mark.fault(62)
def test_kill_9_during_saves_always_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS_SAVES, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.03 * attempt)
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.communicate()[0].split()]
        content = checkpoint.read(path)
        assert content["step"] >= (reported[-1] if reported else 1)
        assert torch.equal(content["x"], torch.full((300_000,), float(content["step"])))


def test_a_checkpoint_that_lacks_a_part_says_which(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model_config and no model and no tokenizer"):
        load(saved)


def model_file(path: Path, *, prefix: str = "") -> Transformer:
    torch.manual_seed(3)
    model = Transformer(ModelConfig.preset("debug"))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    content = {"model_config": vars(model.config), "tokenizer": load_tokenizer("byte").to_state(), "model": state}
    checkpoint.save(path, content)
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_models_saved_compiled_or_not_are_loaded(tmp_path: Path, prefix: str) -> None:
    model = model_file(tmp_path / "m.pt", prefix=prefix)
    loaded, tokenizer = load(tmp_path / "m.pt")
    tokens = torch.tensor([tokenizer.encode("hello")])
    assert torch.equal(loaded(tokens), model(tokens))
    assert not loaded.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"layers.0.extra": torch.zeros(1)}, "has the unknown layers.0.extra"),  # fault 58
        (lambda s: {k: v for k, v in s.items() if k != "embed.weight"}, r"lacks embed\.weight"),
        (lambda s: s | {"embed.weight": torch.zeros(3, 2)}, r"embed\.weight is \[3, 2\], the model's is \[257, 32\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, message: str) -> None:
    model = Transformer(ModelConfig.preset("debug"))
    with pytest.raises(CheckpointError, match=message):
        load_weights(Path("some.pt"), SingleDevice(model), change(model.state_dict()))


def as_version_1(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites a checkpoint with the name that the embedding had."""
    content = checkpoint.read(path)
    content["model"] = {{"embed.weight": "embed"}.get(name, name): t.clone() for name, t in content["model"].items()}
    with monkeypatch.context() as earlier:
        earlier.setattr(file, "VERSION", 1)
        content.pop("version")
        checkpoint.save(path, content)


def test_files_of_version_1_load_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(Path(shutil.__file__).read_text(encoding="utf-8"), encoding="utf-8")

    def train(output: str, *more: str) -> Path:
        common = ["--output_dir", str(tmp_path / output), "--eval_interval", "0", "--device", "cpu"]
        assert main(["train", *common, *more]) == 0
        return tmp_path / output / "checkpoints" / "latest.pt"

    begin = ["--preset", "debug", "--data_path", str(tmp_path / "text.txt"), "--schedule", "constant"]
    whole, parts = train("whole", *begin, "--max_steps", "4"), train("parts", *begin, "--max_steps", "2")
    before = load(parts)[0]
    as_version_1(parts, monkeypatch)
    assert "embed" in checkpoint.read(parts)["model"]
    assert torch.equal(load(parts)[0].embed.weight, before.embed.weight)
    train("parts", "--resume", "--checkpoint_path", str(parts), "--max_steps", "4")
    for ours, theirs in zip(load(parts)[0].parameters(), load(whole)[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
