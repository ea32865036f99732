"""A checkpoint that many ranks write together, through ``torch.distributed.checkpoint`` (DCP): one folder.

``step_00000040/`` holds a safetensors file of every rank that has something to write, with its parts of tensors and
where they belong, and ``run.pt``, a file of ``checkpoint.file``: the plain values of the run, the shape of each tensor,
and the size and SHA-256 of every other file. Nothing in the folder can execute code.

A folder is written as ``.step_00000040.partial`` and gets its name when it is complete, flushed and read back: a kill
leaves all of it or nothing of that name. Any number of ranks can read it, into any sharding; so can one process
without a process group.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanokimi.checkpoint.file import RENAMED, CheckpointError, HashingFile, check_fits, read, require, save
from nanokimi.errors import RunError
from nanokimi.files import disk_errors_explained, move_into, sha256_of
from nanokimi.parallel.process_group import contact_lost_explained
from nanokimi.parallel.ranks import gather

VERSION = 2
SIDECAR = "run.pt"

_SPARE_BYTES = 16 << 20

T = TypeVar("T")
Shape = tuple[torch.Size, torch.dtype]


def new_group(timeout: timedelta) -> dist.ProcessGroup | None:
    """A group of all ranks for ``begin_save`` alone; None where there is no process group. All ranks call it, once.

    Args:
        timeout: must exceed the time in which the slowest rank writes its part.
    """
    return dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None


def begin_save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    group: dist.ProcessGroup | None,
    *,
    asynchronous: bool,
) -> Future[None]:
    """Writes ``tensors`` and ``about`` as the folder ``folder``. All ranks call it, after the save before has ended.

    Args:
        folder: ``step_folder(...)``, on a disk that all ranks share; one of the same name is replaced.
        tensors: the same names on all ranks; DTensors, of which each part is written once, and plain ones,
            equal on all ranks.
        about: on rank 0 numbers, strings, lists, dicts and small tensors; what other ranks give is ignored.
        group: of ``new_group``.
        asynchronous: return once all is copied to host memory, and write while training goes on.

    Returns:
        a future that is done when the folder has its name. It raises RunError, the same on all ranks, if the folder
        could not be written; earlier folders are as they were.
    """
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if asynchronous:
        kept = {name: tensor.to("cpu", copy=True) for name, tensor in kept.items()}
        about = copy.deepcopy(about)
    device = torch.cuda.current_device() if asynchronous and torch.cuda.is_initialized() else None
    saved: Future[None] = Future()

    def save_all() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own
            _save(folder, kept, about, group)
            saved.set_result(None)
        except BaseException as error:
            saved.set_exception(error)

    if asynchronous:
        Thread(target=save_all, daemon=True).start()  # a daemon, so that a run that fails need not wait for other ranks
    else:
        save_all()
    return saved


def step_folder(checkpoints: Path, step: int) -> Path:
    """The name of the checkpoint of ``step``."""
    return checkpoints / f"step_{step:08d}"


def step_folders(checkpoints: Path) -> list[Path]:
    """The checkpoints there, by steps."""
    return sorted(path for path in checkpoints.glob("step_*") if is_sharded(path))


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a folder that ``begin_save`` wrote."""
    return (path / SIDECAR).is_file()


def prune(folders: Sequence[Path], keep: int) -> None:
    """Removes all but the last ``keep`` of ``folders``. One rank calls it."""
    for folder in folders[: max(0, len(folders) - keep)]:
        with disk_errors_explained("folder", folder.parent):
            os.rename(folder, _partial(folder))
            shutil.rmtree(_partial(folder), ignore_errors=True)


def tidy(checkpoints: Path) -> None:
    """Removes what killed saves left, and gives back its name to a folder that was to be replaced.

    One rank calls it before it looks for the newest; every save does.
    """
    for left in checkpoints.glob(".step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    for old in checkpoints.glob(".step_*.old"):
        folder = old.with_name(old.name[1 : -len(".old")])
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, folder)


def read_about(folder: Path) -> dict[str, Any]:
    """What ``begin_save`` was told of the run.

    Raises:
        CheckpointError: as ``verify``, but for damage inside of files other than the sidecar.
    """
    about: dict[str, Any] = _record(folder)["about"]
    return about


def shapes(folder: Path) -> dict[str, Shape]:
    """The whole shape and the type of every tensor; raises CheckpointError as ``read_about`` does."""
    tensors: dict[str, Shape] = _record(folder)["tensors"]
    return {_present_name(name): shape for name, shape in tensors.items()}


def _present_name(name: str) -> str:
    """What a tensor is called now that an earlier version may have called ``name``."""
    for old, new in RENAMED.items():
        name = f"{name.removesuffix(old)}{new}" if name.endswith(f".{old}") else name
    return name


def verify(folder: Path) -> None:
    """Checks that every byte is as it was saved.

    Raises:
        CheckpointError: a file is missing, unknown, truncated or damaged; a foreign folder, or a newer version.
    """
    files = _record(folder)["files"]
    for name in sorted(files):
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror}") from error
        if found != files[name][1]:
            raise CheckpointError(
                f"{folder / name}: damaged (its contents do not match their checksum): use another checkpoint"
            )


def load_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copies what was saved into ``tensors``, in place; no rank waits for another.

    Args:
        tensors: any of those saved, DTensors of any sharding or plain ones. Types are converted.

    Raises:
        CheckpointError: names or shapes do not fit, or as ``read_about``.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = {name: torch.empty(shape, device="meta") for name, (shape, _) in shapes(folder).items() if name in tensors}
    check_fits(folder, saved, tensors)
    in_files = {_present_name(name): name for name in _record(folder)["tensors"]}
    tensors = {in_files[name]: tensor for name, tensor in tensors.items()}
    try:
        with _as_one_error(alone=True):
            load(_with_dimensions(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error


def read_tensors(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The whole tensors ``names``, in host memory, for one process; raises CheckpointError as ``load_into`` does."""
    saved = shapes(folder)
    if missing := [name for name in names if name not in saved]:
        raise CheckpointError(f"{folder}: lacks {missing[0]}: use another checkpoint")
    tensors = {name: torch.empty(saved[name][0], dtype=saved[name][1]) for name in names}
    load_into(folder, tensors)
    return tensors


def _record(folder: Path) -> dict[str, Any]:
    """What the sidecar holds, once it fits the files beside it, whose contents are not read."""
    content = read(folder / SIDECAR)
    require(folder / SIDECAR, content, "sharded", "about", "tensors", "files")
    if content["sharded"] > VERSION:
        raise CheckpointError(
            f"{folder}: written by a newer nanokimi (version {content['sharded']}, this one reads {VERSION}): update"
        )
    there = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    if missing := sorted(content["files"].keys() - there.keys()):
        raise CheckpointError(f"{folder}: lacks {missing[0]} ({len(missing)} in all): use another checkpoint")
    if unknown := sorted(there.keys() - content["files"].keys()):
        raise CheckpointError(f"{folder}: {unknown[0]} does not belong there: remove it")
    for name, (size, _) in content["files"].items():
        if there[name] != size:
            raise CheckpointError(f"{folder / name}: truncated, {there[name]} of {size} bytes: use another checkpoint")
    return content


def _save(
    folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], group: dist.ProcessGroup | None
) -> None:
    is_main = group is None or group.rank() == 0
    together = partial(_together, group, folder)
    inside = _partial(folder) / folder.name
    try:
        with contact_lost_explained():
            together(lambda: _prepare(inside, tensors) if is_main else None)
            parts = together(lambda: _write_part(inside, tensors, group))
            together(lambda: _publish(inside, tensors, about, parts) if is_main else None)
    finally:
        if is_main:
            shutil.rmtree(_partial(folder), ignore_errors=True)


def _prepare(inside: Path, tensors: Mapping[str, Tensor]) -> None:
    checkpoints = inside.parent.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    tidy(checkpoints)
    if sum(tensor.nbytes for tensor in tensors.values()) + _SPARE_BYTES > shutil.disk_usage(checkpoints).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    inside.mkdir(parents=True)


def _write_part(
    inside: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, list[int | str]]:
    """Writes this rank's part and reads it back; returns size and SHA-256 of its files.

    The ranks agree, within DCP, on who writes which part of a tensor that several of them hold.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _as_one_error(alone=group is None):
        writer = HuggingFaceStorageWriter(str(inside), save_distributed=True)
        writer.fs = files = _hashing_file_system()
        save(_with_dimensions(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    for name, written in files.sha256.items():
        if sha256_of(inside / name) != written:
            raise RunError(f"{inside / name}: what was read back differs from what was written: check the disk")
    return {name: [(inside / name).stat().st_size, written] for name, written in files.sha256.items()}


def _hashing_file_system() -> Any:
    """DCP's file system, with an attribute ``sha256`` by file name of what was written through it."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    class HashingFileSystem(FileSystem):
        def __init__(self) -> None:
            self.sha256: dict[str, str] = {}

        @contextmanager
        def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
            with super().create_stream(path, mode) as stream:
                hashing = HashingFile(stream)  # type: ignore[arg-type]
                yield hashing
            self.sha256[Path(path).name] = hashing.sha256.hexdigest()

    return HashingFileSystem()


def _publish(
    inside: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], parts: list[dict[str, list[int | str]]]
) -> None:
    files = {name: found for part in parts for name, found in part.items()}
    if files.keys() != {path.name for path in inside.iterdir()}:
        raise RunError(
            f"{inside.parent}: lacks files of other ranks: --output_dir must be on a disk that all nodes share"
        )
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    content = {"sharded": VERSION, "about": dict(about), "tensors": shapes, "files": files}
    save(inside / SIDECAR, content)
    folder = inside.parent.with_name(inside.name)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        os.rename(folder, old)
    move_into(folder.parent, inside)
    shutil.rmtree(old, ignore_errors=True)


def _together(group: dist.ProcessGroup | None, folder: Path, work: Callable[[], T]) -> list[T]:
    """``work()`` of every rank, as JSON knows it; RunError on all of them when it failed on one."""
    done, failure = None, None
    try:
        with disk_errors_explained("checkpoint", folder):
            done = work()
    except RunError as error:
        failure = error
    except Exception as error:
        failure = RunError(f"the checkpoint {folder} cannot be written: {error}")
    own = json.dumps([done, failure and str(failure)]).encode()
    told = [json.loads(data) for data in (gather(own, group) if group is not None else [own])]
    for _, problem in told:
        if problem:
            raise RunError(problem) from failure
    return [result for result, _ in told]


def _with_dimensions(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Views of ``tensors``, scalars as one row: DCP plans by offsets, of which a scalar has none."""
    return {name: torch.atleast_1d(tensor.detach()) for name, tensor in tensors.items()}


@contextmanager
def _as_one_error(*, alone: bool) -> Iterator[None]:
    """Around calls of DCP: of the errors that it gathers from all ranks, raises the first; ``alone`` is no surprise."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _unwarned() if alone else nullcontext():
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextmanager
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")
