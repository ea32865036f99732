"""``nanokimi train … --verify_resume N``: whether a command of the user's goes on from a checkpoint to the bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanokimi.checkpoint import file, shards
from nanokimi.checkpoint.run import holds_a_run
from nanokimi.config import TrainConfig
from nanokimi.console import counted, log, show
from nanokimi.errors import UserError
from nanokimi.parallel.process_group import process_group, restarts
from nanokimi.training.run import TrainArguments

NANOKIMI = [sys.executable, "-c", "from nanokimi.cli import entry; entry()"]
# What is compared, by its name in a checkpoint; ``shards`` holds the tensors of a model in shards.
PARTS = ("model", "optimizer", "shards", "data", "random", "tokenizer", "counters", "exact_logits", "history")
SHOWN = 5  # differences of each part
CLOCK = {"tokens_per_second": None}


def verify_resume(arguments: TrainArguments, steps: int) -> int:
    """Trains 2 ``steps`` at once, and ``steps`` twice, each in a fresh process, in a temporary folder; compares them.

    Under ``torchrun`` every rank starts its own part of each run, and the main rank compares.

    Returns:
        0 if all that a run leaves is equal to the bit, else 1; the exit code of a run that failed.

    Raises:
        UserError: ``steps`` is not positive, or the command is one that goes on.
    """
    if steps < 1:
        raise UserError(f"--verify_resume {steps}: name a number of steps, 1 or more")
    if arguments.resume or arguments.stop_after:
        raise UserError("--verify_resume begins runs of its own: leave out --resume and --stop_after")
    with process_group("cpu", TrainConfig.timeout) as ranks:
        made = tempfile.mkdtemp(prefix="nanokimi-verify-") if ranks.is_main else ""
        folder = Path(ranks.broadcast(made.encode() if made else None).decode())
    parts = (("whole", ()), ("halves", (f"--stop_after={steps}",)), ("halves", ("--resume",)))
    try:
        for number, (name, flags) in enumerate(parts, 1):
            if ranks.is_main:
                log(f"--verify_resume: run {number} of {len(parts)}: {' '.join(flags) or f'all {2 * steps} steps'}")
            command = [*NANOKIMI, "train", *_settings(arguments, steps, folder / name), *flags]
            if code := subprocess.run(command, env=_environment(number)).returncode:
                return code
        return _report(folder / "whole", folder / "halves", steps) if ranks.is_main else 0
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _settings(arguments: TrainArguments, steps: int, output: Path) -> list[str]:
    """The user's settings as flags, but for where, how long and to whom: neither a folder nor a service hears of it."""
    own = {"output_dir": output, "max_steps": 2 * steps, "max_seconds": 0, "save_interval": 0, "log": ""}
    return [f"--set={name}={value}" for name, value in {**arguments.train, **own, **arguments.model}.items()]


def _environment(number: int) -> dict[str, str]:
    """For run ``number``: to the store of ``torchrun`` a further start of the ranks, which meet under new names."""
    if "RANK" not in os.environ:
        return dict(os.environ)
    return {**os.environ, "TORCHELASTIC_RESTART_COUNT": str(restarts() + number)}


def _report(whole: Path, halves: Path, steps: int) -> int:
    """Prints what is equal and what is not; the exit code."""
    one, other = contents(whole), contents(halves)
    found = {part: list(differences(one.get(part), other.get(part), part)) for part in PARTS}
    lines = [f"{counted(2 * steps, 'step')} at once, and {steps} + {steps} in two processes:"]
    for part in (part for part in PARTS if part in one or part in other):
        apart = found[part]
        lines.append(f"  {part}: {counted(len(apart), 'difference') if apart else 'equal to the bit'}")
        lines += [f"    {line}" for line in apart[:SHOWN]] + ["    ..."] * (len(apart) > SHOWN)
    show("\n".join(lines))
    return int(any(found.values()))


# ---- what two runs left -------------------------------------------------------------------------


def contents(output: Path) -> dict[str, Any]:
    """What the finished run in ``output`` left, by ``PARTS``, without what the clock decides."""
    folder = output / "checkpoints"
    content = file.read(folder / "final.pt")
    found = {part: content[part] for part in PARTS if part in content}
    found["counters"] = content["counters"] | {"seconds": 0.0}
    found["history"] = [json.loads(line) | CLOCK for line in content["history"].splitlines()]
    if not holds_a_run(content):  # the weights alone of a model in shards
        newest = shards.step_folders(folder)[-1]
        found["shards"] = shards.read_tensors(newest, shards.shapes(newest))
    return found


def differences(one: Any, other: Any, where: str) -> Iterator[str]:
    """A line for each value of two trees of plain values and tensors that is not the same to the bit."""
    if type(one) is not type(other):
        yield f"{where}: {type(one).__name__} and {type(other).__name__}"
    elif isinstance(one, Tensor):
        yield from _of_tensors(one, other, where)
    elif isinstance(one, dict):
        for key in dict.fromkeys((*one, *other)):
            yield from differences(one.get(key), other.get(key), f"{where}.{key}")
    elif isinstance(one, (list, tuple)) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif one != other:
        yield f"{where}: {one!s:.100} and {other!s:.100}"


def _of_tensors(one: Tensor, other: Tensor, where: str) -> Iterator[str]:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        yield f"{where}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    elif not torch.equal(_bytes(one), _bytes(other)):
        unequal = (one != other) | (one != one)
        yield f"{where}: {int(unequal.sum()):,} of {one.numel():,} values differ"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
