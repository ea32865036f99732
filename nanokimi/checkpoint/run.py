"""What a run leaves in ``checkpoints/`` and goes on from.

One process, or replicas of a model, write all of the run into one file. A model in shards is written by all ranks at
once, into a folder ``step_N``; the files beside it then hold its weights alone, for readers who want no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanokimi.checkpoint import file, shards
from nanokimi.checkpoint.background import Background, Snapshot
from nanokimi.checkpoint.file import CheckpointError
from nanokimi.checkpoint.lock import LOCK, FolderLock
from nanokimi.checkpoint.weights import load_weights
from nanokimi.console import log
from nanokimi.errors import UserError
from nanokimi.files import put_aside
from nanokimi.optim.muonclip import STATE, MuonClip
from nanokimi.parallel.process_group import launcher, restarts
from nanokimi.parallel.ranks import ParallelModel, current_ranks

KEPT = 2  # folders ``step_N``: the newest and the one before it
SAVE_NUMBER = "save_number"  # in a checkpoint: one more than in any that lay in the folder before


class SavedRun(NamedTuple):
    """A checkpoint that was verified: ``content`` is all of it but, of a folder of shards, the tensors."""

    path: Path
    content: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. All ranks call its methods, but for those that only look at the folder.

    Args:
        folder: ``checkpoints/`` of the run.
        asynchronous: checkpoints are written while training goes on, from a copy in host memory.
        timeout: seconds in which the slowest rank writes its shards.
    """

    def __init__(self, folder: Path, *, asynchronous: bool = False, timeout: float = 600.0) -> None:
        self.folder, self.asynchronous, self.timeout = folder, asynchronous, timeout
        self.ranks = current_ranks()
        self._group: Any = None  # of all ranks, for shards alone
        self._lock: FolderLock | None = None  # of the main rank, while it is held
        self._saved: tuple[int, Path] | None = None  # step and name of the last file that was written here
        self._wrote_latest = False  # then it was read back, and need not be again
        self._number = 0  # of the last save, once there is one
        self._snapshot, self._background = Snapshot(), Background()
        self._pending: Future[None] | None = None  # of shards

    # ---- saving ---------------------------------------------------------------------------------

    def save(
        self,
        name: str,
        step: int,
        state: Mapping[str, Any],
        model: ParallelModel,
        optimizer: MuonClip,
        *,
        final: bool = False,
    ) -> None:
        """Writes the run after ``step`` steps as ``name``; what was ``latest.pt`` becomes ``previous.pt``.

        Args:
            state: all of the run but weights and optimizer state.
            final: gives it the name ``final.pt`` too.

        Raises:
            RunError: no room, or the disk does not give back what was written; earlier checkpoints are as they were.
        """
        sharded = model.layout.mode == "fsdp"
        again = self._is_saved(step)
        source = self._saved[1] if again and self._saved else None
        content: dict[str, Any] = {}
        if source is None:
            self._background.finish()  # it reads the copy that is taken now
            if self._lock is not None:
                self._lock.keep()
            self._number = (self._number or self._highest_number()) + 1
            content = {**state, SAVE_NUMBER: self._number, "model": model.full_tensors(model.model.state_dict())}
            content |= {} if sharded else {"optimizer": optimizer.state_dict()}
            self._saved = (step, self.folder / name)
        if self.ranks.is_main:
            self._write(self.folder / name, content, source, final)
        if sharded and name == "latest.pt":
            self._save_shards(step, {**state, SAVE_NUMBER: self._number}, model, optimizer, last=final)

    def _is_saved(self, step: int) -> bool:
        """Whether the run after ``step`` steps was written here, and is still there; all ranks say the same."""
        if self._saved is None or self._saved[0] != step:
            return False
        there = not self.ranks.is_main or self._background.busy or self._saved[1].exists()
        return not self.ranks.max([not there])[0]

    def _highest_number(self) -> int:
        return max(map(_number_of, self._found()), default=0) if self.ranks.is_main else 0

    @property
    def busy(self) -> bool:
        """Whether a file is still being written while training goes on."""
        return self._background.busy

    def raise_failure(self) -> None:
        """Raises RunError if a file that is written while training goes on could not be written."""
        self._background.raise_failure()

    def finish(self) -> None:
        """Waits for what is still being written; raises RunError if it could not be."""
        self._background.finish()
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            if self.ranks.is_main:
                shards.prune(sorted(shards.step_folders(self.folder), key=_number_of), KEPT)

    def _write(self, path: Path, content: Mapping[str, Any], source: Path | None, final: bool) -> None:
        if not self.asynchronous:
            self._write_file(path, content, source, final)
            return
        copied = self._snapshot.take(content)
        self._background.start(lambda: self._write_file(path, copied, source, final))

    def _write_file(self, path: Path, content: Mapping[str, Any], source: Path | None, final: bool) -> None:
        keep_as = None
        if path.name == "latest.pt":
            if self._wrote_latest or _is_whole(path):
                keep_as = self.folder / "previous.pt"
            self._wrote_latest = True
        if source is None:
            file.save(path, content, keep_as=keep_as)
        elif source != path:
            file.link(source, path, keep_as=keep_as)  # best.pt was written at this very step
        if final:
            file.link(path, self.folder / "final.pt")

    def _save_shards(
        self, step: int, state: Mapping[str, Any], model: ParallelModel, optimizer: MuonClip, *, last: bool
    ) -> None:
        self.finish()
        self._group = self._group or shards.new_group(timedelta(seconds=self.timeout))
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self._pending = shards.begin_save(
            shards.step_folder(self.folder, step),
            dict(tensors_of(model, optimizer)),
            {**state, "optimizer_groups": groups},
            self._group,
            asynchronous=self.asynchronous and not last,
        )
        if not self.asynchronous or last:
            self.finish()

    # ---- the folder -----------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it until this one ends.

        Raises:
            UserError: it cannot be written, or another run is writing there.
        """
        launchers = self._launchers()  # by all ranks
        self._lock = FolderLock(self.folder, launchers) if self.ranks.is_main else None
        with self._lock or nullcontext():
            self.ranks.barrier()  # until the folder is there
            try:
                yield
            except Exception:
                self._background.wait()  # what ends the run takes no checkpoint with it
                raise

    def started_again(self) -> bool:
        """Whether ``torchrun`` has started the run of this folder again, and there is something to go on from.

        It does so when a process has ended, which it counts, and when machines join or leave, which it does not.
        """
        if not self.ranks.launched:
            return False
        launchers = self._launchers()
        held = self.folder.parent / LOCK
        earlier = set(held.read_text().splitlines()) if self.ranks.is_main and held.is_file() else set()
        again = (restarts() > 0 or bool(earlier & launchers)) and self.has_run()
        return bool(self.ranks.max([self.ranks.is_main and again])[0])

    def _launchers(self) -> set[str]:
        """Every ``torchrun`` that takes part; none in a process that was started without it."""
        if not self.ranks.launched:
            return set()
        return {name.decode() for name in self.ranks.gather(launcher().encode())} - {""}

    def candidates(self) -> list[Path]:
        """The checkpoints, newest first, by the number of their save; of one save the shards first, then plainer names.

        Before them come those whose number cannot be read, so that their damage is told; after them those of earlier
        versions, which have none: ``latest.pt``, then by steps.
        """
        return sorted(self._found(), key=_age, reverse=True)

    def _found(self) -> list[Path]:
        names = ("latest.pt", "final.pt", "best.pt", "previous.pt")
        files = [path for name in names if (path := self.folder / name).is_file()]
        return files + shards.step_folders(self.folder)[::-1]

    def has_run(self) -> bool:
        """Whether a run was saved here, and not the weights of one alone; a damaged file counts as one."""
        return any(shards.is_sharded(path) or _is_more_than_weights(path) for path in self._found())

    def put_aside(self, *, unless_newest: Path | None = None) -> bool:
        """Renames the folder if it holds checkpoints, so that no run overwrites another's; whether it did.

        Args:
            unless_newest: leave the folder as it is if this is its newest checkpoint.
        """
        found = self.candidates()
        self.ranks.barrier()  # until all have looked
        if not found or (unless_newest is not None and found[0].samefile(unless_newest)):
            return False
        if self.ranks.is_main:
            kept = put_aside(self.folder)
            self.folder.mkdir()
            log(f"the earlier run's checkpoints are kept in {kept} (--resume goes on from them instead)")
        return True

    # ---- going on -------------------------------------------------------------------------------

    def find(self, named: str = "") -> SavedRun:
        """The checkpoint ``named``, or the newest that can be read and holds all of a run.

        Raises:
            UserError: there is none.
            CheckpointError: the one that is named, or each that there is, is damaged.
        """
        found = (self._read(Path(named)) if named else self._newest()) if self.ranks.is_main else None
        path = Path(self.ranks.broadcast(str(found.path).encode() if found else None).decode())
        return found or self._read(path, verify=False)

    def _newest(self) -> SavedRun:
        problems: list[str] = []
        for path in self.candidates():
            try:
                saved = self._read(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if holds_a_run(saved.content):
                for problem in problems:
                    log(f"warning: {problem}")
                return saved
        if problems:
            raise CheckpointError("; ".join(problems))
        raise UserError(f"--resume: no checkpoint in {self.folder}: check --output_dir, or start without --resume")

    def _read(self, path: Path, *, verify: bool = True) -> SavedRun:
        if not shards.is_sharded(path):
            return SavedRun(path, file.read(path))
        if verify:
            shards.verify(path)
        return SavedRun(path, shards.read_about(path))

    def load_state(self, saved: SavedRun, model: ParallelModel, optimizer: MuonClip) -> None:
        """Gives model and optimizer what was saved.

        Raises:
            CheckpointError: weights or optimizer state do not fit.
        """
        path, content = saved
        chosen = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]
        if shards.is_sharded(path):
            _load_shards(path, content, model, optimizer)
        else:
            file.require(path, content, "model", "optimizer")
            load_weights(path, model, content["model"])
            try:
                _load_optimizer(content["optimizer"], model, optimizer)
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: the optimizer state does not fit: {error}") from error
        for group, values in zip(optimizer.param_groups, chosen, strict=True):
            group.update(values)  # the config rules, which a resume may have overridden


def _peek(path: Path) -> Mapping[str, Any] | None:
    try:
        return shards.read_about(path) if shards.is_sharded(path) else file.peek(path)
    except CheckpointError:
        return None


def _number_of(path: Path) -> int:
    """The number of the save that wrote ``path``; 0 where there is none, or it cannot be read."""
    number = (_peek(path) or {}).get(SAVE_NUMBER, 0)
    return number if isinstance(number, int) else 0


def _age(path: Path) -> tuple[float, bool, int]:
    """What orders checkpoints, the newest last."""
    content = _peek(path)
    if content is None:
        return math.inf, False, 0
    if number := content.get(SAVE_NUMBER, 0):
        return number, path.is_dir(), 0
    return 0, path.name == "latest.pt", content.get("counters", {}).get("step", 0)


def _is_whole(path: Path) -> bool:
    with suppress(CheckpointError):
        file.verify(path)
        return True
    return False


def holds_a_run(content: Mapping[str, Any]) -> bool:
    """Whether there is optimizer state to go on with, and not weights alone."""
    return "optimizer" in content or "optimizer_groups" in content


def _is_more_than_weights(path: Path) -> bool:
    try:
        return holds_a_run(file.read(path))
    except CheckpointError:
        return True


def tensors_of(model: ParallelModel, optimizer: MuonClip) -> Iterator[tuple[str, Tensor]]:
    """Weights, buffers and optimizer state under the names they have in a folder of shards, each as stored there."""
    for name, tensor in model.model.state_dict().items():
        yield f"model.{name}", model.as_dtensor(name, tensor)
    for name, parameter, key in _optimizer_tensors(model, optimizer):
        yield f"optimizer.{key}.{name}", model.as_dtensor(name, optimizer.state[parameter][key])


def _optimizer_tensors(model: ParallelModel, optimizer: MuonClip) -> Iterator[tuple[str, Tensor, str]]:
    """Name, parameter and key of every tensor of optimizer state; one that does not exist yet is made, as zeros."""
    names = {id(p): name for name, p in model.model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key in STATE[group["kind"]]:
                if key not in optimizer.state[parameter]:
                    optimizer.state[parameter][key] = torch.zeros_like(parameter)
                yield names[id(parameter)], parameter, key


def _load_optimizer(saved: dict[str, Any], model: ParallelModel, optimizer: MuonClip) -> None:
    if model.layout.mode != "fsdp":
        optimizer.load_state_dict(saved)
        return
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wholes = {id(p): saved["state"].get(number, {}) for p, number in zip(parameters, numbers, strict=True)}
    for name, parameter, key in _optimizer_tensors(model, optimizer):
        if saved["state"]:
            model.copy_rows(name, optimizer.state[parameter][key], wholes[id(parameter)][key])
    _load_steps(saved["param_groups"], optimizer)


def _load_shards(path: Path, content: Mapping[str, Any], model: ParallelModel, optimizer: MuonClip) -> None:
    tensors = dict(tensors_of(model, optimizer))
    saved = {name: torch.empty(shape, device="meta") for name, (shape, _) in shards.shapes(path).items()}
    file.check_fits(path, saved, tensors)
    shards.load_into(path, tensors)
    _load_steps(content["optimizer_groups"], optimizer)


def _load_steps(groups: list[dict[str, Any]], optimizer: MuonClip) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        if "step" in saved:
            group["step"] = saved["step"]
