"""Proof by enumeration that no saved checkpoint is lost: kills, power cuts, full disks, flipped bytes.

    python -m benchmarks.nothing_lost            # writes benchmarks/results/nothing-lost.json
    python -m benchmarks.nothing_lost --short    # a part of it, in seconds
    python -m benchmarks.nothing_lost --only files  # the flipped bytes of files that are no checkpoints of a resume

A run of the ``debug`` preset saves at every step. It is killed before every operation of ``disk_model``, in the middle
of every write, and at random moments; every state that a power cut can leave is made; the disk is full from every
operation on; a byte is flipped in every region of the checkpoint. After each, ``--resume`` must go on from a step that
is no older than the last that was said to be on the disk, and its end must equal the uninterrupted run's, to the bit.
A state of the disk that was checked before is not checked again. Folders of shards are written by one process here,
and compared with what was saved. Bytes are flipped in every other file that is read, too: see ``flipped_files``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # now, as an accident in the middle of this import would leave half of it

from benchmarks import flipped_files
from benchmarks.bench.results import ROOT, about
from benchmarks.disk_model import NEEDS_ROOM, Disk, PowerCuts, Tree, full_from, key_of, killed_at
from nanokimi import checkpoint
from nanokimi.checkpoint import shards
from nanokimi.checkpoint.run import SAVE_NUMBER, Checkpoints
from nanokimi.cli import main as nanokimi
from nanokimi.errors import RunError, UserError

RESULTS = ROOT / "benchmarks" / "results" / "nothing-lost.json"
STEPS = 4
SMALL = ("dim=16", "n_heads=1", "n_layers=2", "q_lora_rank=8", "kv_lora_rank=8", "moe_inter_dim=8", "inter_dim=16")
RESUMED = re.compile(r"resuming .* at step (\d+) of")


class Case:
    """One kind of saves: how it is made and how what is left of it is checked.

    Args:
        work: a folder for this.
    """

    name = "one file"
    flags: tuple[str, ...] = ()

    def __init__(self, work: Path) -> None:
        self.work, self.text = work, work / "train.txt"
        work.mkdir(parents=True)
        self.text.write_text(Path(shutil.__file__).read_text(encoding="utf-8")[:30_000], encoding="utf-8")
        self.checked: dict[str, int] = {}
        self.output(work / "whole")
        assert self.make(work / "whole") == 0
        self.expected = end_of(work / "whole")

    def output(self, path: Path) -> Path:
        (path / "checkpoints").mkdir(parents=True)
        return path

    def make(self, output: Path) -> int:
        """The run, from its beginning; its exit code."""
        more = [part for pair in SMALL for part in ("--set", pair)]
        fresh = ["--preset", "debug", "--data_path", str(self.text), "--max_steps", str(STEPS), *more]
        every = ["--save_interval", "1", "--eval_interval", "2", "--warmup_steps", "0"]
        return quiet(["train", *fresh, *every, "--device", "cpu", "--output_dir", str(output), *self.flags])[0]

    def check(self, output: Path, least: int) -> None:
        """Fails unless the run in ``output`` goes on from ``least`` steps or more, to the end that it had."""
        code, said = quiet(["train", "--resume", "--output_dir", str(output), *self.flags])
        found = RESUMED.search(said)
        step = int(found[1]) if found else 0
        assert "Traceback" not in said, said
        assert step >= least, said
        if step == 0:
            assert code == 2, said
            assert "no checkpoint" in said or "damaged" in said or "empty" in said, said
            return
        assert code == 0, said
        assert end_of(output) == self.expected, said

    def check_tree(self, tree: Tree, least: int) -> None:
        """``check`` of a state, unless it was checked for as many steps before."""
        key = key_of(tree)
        if self.checked.get(key, -1) >= least:
            return
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            for path in sorted(tree):
                target = Path(folder, "checkpoints", path)
                (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
                if not path.endswith("/"):
                    target.write_bytes(tree[path])
            self.check(Path(folder), least)
        self.checked[key] = least


class InBackground(Case):
    name, flags = "one file, while training goes on", ("--async_checkpoints",)


class Shards(Case):
    """Folders of shards, as ``Checkpoints`` has them written and removes the oldest."""

    name, asynchronous = "shards", False

    def make(self, output: Path) -> int:
        folder = output / "checkpoints"
        for number, step in enumerate((1, 2, 3, 3), 1):  # the last replaces one of the same name
            about_run = {"counters": {"step": step}, "optimizer_groups": [], SAVE_NUMBER: number}
            try:
                path = shards.step_folder(folder, step)
                shards.begin_save(path, self.tensors(step), about_run, None, asynchronous=self.asynchronous).result()
                shards.prune(shards.step_folders(folder), 2)
            except RunError:
                return 1
            told(step)
        return 0

    @staticmethod
    def tensors(step: int) -> dict[str, torch.Tensor]:
        return {name: torch.full((40, 30), step + 0.5) for name in ("model.a", "optimizer.exp_avg.a")}

    def check(self, output: Path, least: int) -> None:
        if not (output / "checkpoints").exists():
            assert least == 0
            return
        shards.tidy(output / "checkpoints")
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found = Checkpoints(output / "checkpoints").find()
        except UserError:
            if least:
                raise
            return
        step = found.content["counters"]["step"]
        assert step >= least, found.path
        for name, tensor in shards.read_tensors(found.path, ["model.a", "optimizer.exp_avg.a"]).items():
            assert torch.equal(tensor, self.tensors(step)[name])


class ShardsInBackground(Shards):
    name, asynchronous = "shards, while training goes on", True


CASES: tuple[type[Case], ...] = (Shards, ShardsInBackground, Case, InBackground)
told: Callable[[int], None] = lambda step: None  # noqa: E731


def quiet(arguments: list[str]) -> tuple[int, str]:
    """A command in this process: exit code, and what it said."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = nanokimi(arguments)
    return code, said.getvalue()


def end_of(output: Path) -> str:
    """All numbers of the run at its end."""
    found = Checkpoints(output / "checkpoints").candidates()
    if not found or found[0].is_dir():
        return ""
    content = checkpoint.read(found[0])
    state = {
        **content["model"],
        **{f"{i} {k}": v for i, s in content["optimizer"]["state"].items() for k, v in s.items()},
    }
    numbers = {name: tensor.numpy().tobytes() for name, tensor in sorted(state.items())}
    return key_of(numbers) + str(content["counters"]["step"]) + str(content["data"])


@contextlib.contextmanager
def telling(say: Callable[[int], None]) -> Any:
    """Has ``say`` called with the step of every checkpoint that is on the disk."""
    original = Checkpoints._write_file

    def write(self: Checkpoints, *arguments: Any) -> None:
        original(self, *arguments)
        say(self._saved[0] if self._saved else 0)

    with mock.patch.object(Checkpoints, "_write_file", write), mock.patch(f"{__name__}.told", say):
        yield


# ---- what is tried ------------------------------------------------------------------------------


def recorded(case: Case) -> Disk:
    output = case.output(case.work / "recorded")
    disk = Disk(output / "checkpoints")
    with disk.watched(), telling(disk.done):
        assert case.make(output) == 0
    return disk


def power_cuts(case: Case, disk: Disk, every: int) -> dict[str, int]:
    cuts = PowerCuts(disk.ops)
    for number, (said, tree) in enumerate(cuts):
        if number % every == 0:
            case.check_tree(tree, said)
    return {
        "operations": disk.count,
        "writes": disk.kinds.count("write"),
        "prefixes": cuts.prefixes,
        "dropped writes": cuts.dropped_writes,
        "dropped changes of names": cuts.dropped_names,
        "states": cuts.states,
        "different states resumed": len(case.checked),
    }


def killed(case: Case, act: Callable[[Disk], None], wait: float | None = None) -> None:
    """A child runs the case until it is killed: by itself, or after ``wait`` seconds; then it is gone on with."""
    with tempfile.TemporaryDirectory(dir=case.work) as folder:
        output = case.output(Path(folder) / "run")
        news = Path(folder) / "told"
        news.touch()
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            disk = Disk(output / "checkpoints")
            act(disk)
            descriptor = os.open(news, os.O_WRONLY | os.O_APPEND)
            with disk.watched(), telling(lambda step: void(os.write(descriptor, f"{step}\n".encode()))):
                case.make(output)
            os._exit(0)
        if wait is not None:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        case.check(output, max(map(int, news.read_text().split()), default=0))


def void(result: object) -> None:
    """Takes a result that nobody wants."""


def kills(case: Case, disk: Disk, every: int) -> dict[str, int]:
    """Before every operation, and in the middle of every write."""
    half = {2 * at for at, kind in enumerate(disk.kinds, 1) if kind == "write"}
    numbers = sorted({2 * at - 1 for at in range(1, disk.count + 1)} | half)[::every]
    for number in numbers:
        killed(case, lambda disk, n=number: setattr(disk, "before", killed_at(n)))  # type: ignore[misc]
    return {"kills at operations": len(numbers)}


def random_kills(case: Case, count: int) -> dict[str, int]:
    draw, began = random.Random(0), time.monotonic()
    killed(case, lambda disk: None)
    longest = time.monotonic() - began
    for _ in range(count):
        killed(case, lambda disk: None, draw.uniform(0, longest))
    return {"kills at random moments": count}


def full_disks(case: Case, disk: Disk, every: int) -> dict[str, int]:
    numbers = [at for at, kind in enumerate(disk.kinds, 1) if kind in NEEDS_ROOM][::every]
    for number in numbers:
        with tempfile.TemporaryDirectory(dir=case.work) as folder:
            output, said = case.output(Path(folder) / "run"), [0]
            full = Disk(output / "checkpoints", full_from(number))
            with full.watched(), telling(said.append):
                assert case.make(output) == 1, number
            case.check(output, max(said))
    return {"full disks": len(numbers)}


def flips(case: Case, every: int) -> dict[str, int]:
    """One byte in the newest checkpoint is another one: it is named, and the one before is taken."""
    folder, count = case.work / "whole" / "checkpoints", Counter[str]()
    newest = Checkpoints(folder).candidates()[0]
    for path in sorted(newest.iterdir()) if newest.is_dir() else [newest]:
        good = path.read_bytes()
        for position in [*range(0, len(good), every), len(good) - 1]:
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            path.unlink()  # the other names of the file keep the good contents
            path.write_bytes(bad)
            with contextlib.redirect_stderr(io.StringIO()) as said:
                found = Checkpoints(folder).find().path
            assert found != newest, (path, position)
            assert newest.name in said.getvalue(), (path, position)
            count[path.suffix] += 1
        path.write_bytes(good)
    return {f"bytes flipped in {suffix}": number for suffix, number in count.items()}


def proven(
    work: Path, *, short: bool, done: Callable[[dict[str, Any]], None] = lambda record: None
) -> dict[str, dict[str, int]]:
    """Tries everything (``short``: a part of it); AssertionError where something is lost.

    Args:
        done: is called with the counts of all cases so far after each of them.
    """
    torch.set_num_threads(1)
    plots: Any = ModuleType("nanokimi.training.plots")
    plots.plot_training = lambda *arguments, **options: None  # half a second for each save
    record = {}
    with mock.patch.dict(sys.modules, {"nanokimi.training.plots": plots}):
        for kind in CASES:
            case = kind(work / kind.__name__)
            every = {"cuts": 71, "kills": 83, "full": 61, "random": 1, "flips": 3989}
            every = every if short else {"cuts": 1, "kills": 1, "full": 1, "random": 50, "flips": 97}
            disk = recorded(case)
            found = power_cuts(case, disk, every["cuts"]) | kills(case, disk, every["kills"])
            found |= random_kills(case, every["random"]) | full_disks(case, disk, every["full"])
            found |= flips(case, every["flips"])
            record[kind.name] = found
            done(record)
            print(kind.name, json.dumps(found), file=sys.stderr, flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a part of it; writes nothing")
    parser.add_argument("--only", choices=("checkpoints", "files"), help="one part; the other's record is kept")
    options = parser.parse_args()

    def write(part: dict[str, Any]) -> None:
        if not options.short:
            kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps(kept | part, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as work:
        if options.only != "files":
            begun = about() | {"lost": 0, "tracebacks": 0}
            proven(Path(work), short=options.short, done=lambda record: write(begun | {"cases": record}))
        if options.only != "checkpoints":
            torch.set_num_threads(1)
            tried = {"every": 1999, "one_in": 40} if options.short else {"every": 397}
            found = flipped_files.proven(Path(work, "files"), **tried)
            write({"other files": about() | {"accepted in silence": 0, "kinds": found}})


if __name__ == "__main__":
    main()
