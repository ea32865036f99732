"""What a run leaves in ``checkpoints/``, and what a run goes on from.

One process and replicas write all of the run into one file. A model that is sharded over ranks is written by all of
them at once, into a folder ``step_N``; the files beside it then hold its weights, for everyone who wants no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanokimi import checkpoint
from nanokimi.errors import UserError
from nanokimi.optim.muonclip import STATE, MuonClip
from nanokimi.parallel import sharded_checkpoint
from nanokimi.parallel.spread import Spread

KEPT = 2  # folders ``step_N``: the newest and the one before it


class Checkpoints:
    """Writes the checkpoints of a run; every method is called by all ranks.

    Args:
        folder: ``checkpoints/`` of the run.
        asynchronous: sharded folders are written while training goes on.
        timeout: seconds in which the slowest rank writes its part.
    """

    def __init__(
        self, folder: Path, spread: Spread, optimizer: MuonClip, *, asynchronous: bool, timeout: float
    ) -> None:
        self.folder, self.spread, self.optimizer, self.asynchronous = folder, spread, optimizer, asynchronous
        self._sharded = spread.layout.mode == "fsdp"
        self._group = sharded_checkpoint.new_group(timedelta(seconds=timeout)) if self._sharded else None
        self._saved: tuple[int, Path] | None = None  # step and name of the last file written here
        self._pending: sharded_checkpoint.Pending | None = None

    @property
    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return any(self.folder.glob("*.pt"))

    def save(self, name: str, step: int, about: Mapping[str, Any], *, final: bool = False) -> None:
        """Writes the run after ``step`` steps as ``name``; ``latest.pt`` leaves its forerunner as ``previous.pt``.

        Args:
            about: all of the run but weights and optimizer state.
            final: gives it the name ``final.pt`` too.

        Raises:
            RunError: no room, or the disk does not give back what was written; earlier checkpoints are as they were.
        """
        again = self._saved is not None and self._saved[0] == step
        content = {} if again else {**about, **(self._weights() if self._sharded else self._everything())}
        self.spread.ranks.run_or_fail_together(
            lambda: self._write(name, content, final) if self.spread.ranks.is_main else None
        )
        if not again:
            self._saved = (step, self.folder / name)
        if self._sharded and name == "latest.pt":
            self._save_shards(step, about, last=final)

    def finish(self) -> None:
        """Waits for what is still being written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.spread.ranks.run_or_fail_together(pending.wait)
            if self.spread.ranks.is_main:
                sharded_checkpoint.prune(self.folder, KEPT)

    def _write(self, name: str, content: Mapping[str, Any], final: bool) -> None:
        path = self.folder / name
        if name == "latest.pt":
            checkpoint.keep(path, self.folder / "previous.pt")
        if content:
            checkpoint.save(path, content)
        else:
            assert self._saved is not None
            checkpoint.link(self._saved[1], path)  # best.pt was written at this very step
        if final:
            checkpoint.link(path, self.folder / "final.pt")

    def _everything(self) -> dict[str, Any]:
        return {"model": self.spread.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _weights(self) -> dict[str, Any]:
        return {"model": self.spread.whole(self.spread.model.state_dict())}

    def _save_shards(self, step: int, about: Mapping[str, Any], *, last: bool) -> None:
        self.finish()
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self._pending = sharded_checkpoint.begin_save(
            sharded_checkpoint.step_folder(self.folder, step), dict(tensors_of(self.spread, self.optimizer)),
            {**about, "optimizer_groups": groups}, self._group, asynchronous=self.asynchronous and not last,
        )  # fmt: skip
        if not self.asynchronous or last:
            self.finish()


def tensors_of(spread: Spread, optimizer: MuonClip) -> Iterator[tuple[str, Tensor]]:
    """Weights, buffers and optimizer state under the names they have in a sharded checkpoint, each as stored."""
    for name, tensor in spread.model.state_dict().items():
        yield f"model.{name}", spread.stored(name, tensor)
    for name, parameter, key in _state_of(spread, optimizer):
        yield f"optimizer.{key}.{name}", spread.stored(name, optimizer.state[parameter][key])


def _state_of(spread: Spread, optimizer: MuonClip) -> Iterator[tuple[str, Tensor, str]]:
    """Name, parameter and key of every tensor of optimizer state; what there is none of yet is made, as zeros."""
    names = {id(p): name for name, p in spread.model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key in STATE[group["kind"]]:
                if key not in optimizer.state[parameter]:
                    optimizer.state[parameter][key] = torch.zeros_like(parameter)
                yield names[id(parameter)], parameter, key


# ---- going on -----------------------------------------------------------------------------------


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first; of two names for one file the plainer one first."""
    names = ("latest.pt", "final.pt", "best.pt", "previous.pt")
    found = [path for name in names if (path := folder / name).is_file()]
    found += sharded_checkpoint.step_folders(folder)
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def read_run(path: Path) -> dict[str, Any]:
    """All of the run at ``path``, a file or a sharded folder, but for the folder's tensors; verified."""
    if sharded_checkpoint.is_sharded(path):
        sharded_checkpoint.verify(path)
        return sharded_checkpoint.read_about(path)
    return checkpoint.read(path)


def newest_run(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest readable checkpoint in ``folder`` that holds all of a run, and what was wrong with newer ones.

    Raises:
        UserError: there is none.
    """
    problems: list[str] = []
    for path in candidates(folder):
        try:
            content = read_run(path)
        except checkpoint.CheckpointError as error:
            problems.append(str(error))
            continue
        if holds_a_run(content):
            return path, content, problems
    if problems:
        raise checkpoint.CheckpointError("; ".join(problems))
    raise UserError(f"--resume: no checkpoint in {folder}: check --output_dir, or start without --resume")


def has_run(folder: Path) -> bool:
    """Whether a run was saved in ``folder``, and not the weights of one alone; a damaged file counts as one."""
    files = [path for path in candidates(folder) if not sharded_checkpoint.is_sharded(path)]
    return any(sharded_checkpoint.step_folders(folder)) or any(map(_is_more_than_weights, files))


def _is_more_than_weights(path: Path) -> bool:
    try:
        return holds_a_run(checkpoint.read(path))
    except checkpoint.CheckpointError:
        return True


def holds_a_run(content: Mapping[str, Any]) -> bool:
    """Whether there is optimizer state to go on with, and not weights alone."""
    return "optimizer" in content or "optimizer_groups" in content


def take_back(path: Path, content: Mapping[str, Any], spread: Spread, optimizer: MuonClip) -> None:
    """Gives model and optimizer what was saved at ``path``; ``content`` is what ``read_run`` made of it.

    Raises:
        CheckpointError: weights or optimizer state do not fit.
    """
    chosen = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]
    if sharded_checkpoint.is_sharded(path):
        _take_shards(path, content, spread, optimizer)
    else:
        checkpoint.require(path, content, "model", "optimizer")
        place_weights(path, content["model"], spread)
        try:
            _take_state(content["optimizer"], spread, optimizer)
        except (ValueError, KeyError, TypeError) as error:
            raise checkpoint.CheckpointError(f"{path}: the optimizer state does not fit: {error}") from error
    for group, values in zip(optimizer.param_groups, chosen, strict=True):
        group.update(values)  # the config rules, which a resume may have overridden


def place_weights(path: Path, saved: Mapping[str, Tensor], spread: Spread) -> None:
    """Gives the model its rows of the weights ``saved``, read from ``path``; CheckpointError unless all fit."""
    saved = checkpoint.plain_state(saved)
    here = spread.model.state_dict()
    checkpoint.check_fits(path, saved, {name: spread.stored(name, tensor) for name, tensor in here.items()})
    with torch.no_grad():
        for name, tensor in here.items():
            spread.place(name, tensor, saved[name])


def _take_state(saved: dict[str, Any], spread: Spread, optimizer: MuonClip) -> None:
    if spread.layout.mode != "fsdp":
        optimizer.load_state_dict(saved)
        return
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wholes = {id(p): saved["state"].get(number, {}) for p, number in zip(parameters, numbers, strict=True)}
    for name, parameter, key in _state_of(spread, optimizer):
        if saved["state"]:
            spread.place(name, optimizer.state[parameter][key], wholes[id(parameter)][key])
    _take_steps(saved["param_groups"], optimizer)


def _take_shards(path: Path, content: Mapping[str, Any], spread: Spread, optimizer: MuonClip) -> None:
    tensors = dict(tensors_of(spread, optimizer))
    saved = {name: torch.empty(shape, device="meta") for name, (shape, _) in sharded_checkpoint.shapes(path).items()}
    checkpoint.check_fits(path, saved, tensors)
    sharded_checkpoint.load_into(path, tensors)
    _take_steps(content["optimizer_groups"], optimizer)


def _take_steps(groups: list[dict[str, Any]], optimizer: MuonClip) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        if "step" in saved:
            group["step"] = saved["step"]
