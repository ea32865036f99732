"""One versioned checkpoint file: written so that a kill, a full disk or a bad sector never costs a saved one.

The file is what ``torch.save`` writes, a ZIP archive; the archive's comment holds the SHA-256 of
everything before it. So ``torch.load(path, weights_only=True)`` reads it anywhere, and a single
flipped byte is noticed here.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nanokimi import files
from nanokimi.errors import RunError, UserError
from nanokimi.files import atomic_write, is_full_disk

FORMAT = "nanokimi-checkpoint"
VERSION = 2

_MARK = b"nanokimi-sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_TAIL_BYTES = 2 + _COMMENT_BYTES  # a ZIP file ends in the length of its comment, and the comment
_BLOCK = 1 << 20
_SPARE_BYTES = 16 << 20


class CheckpointError(UserError):
    """A file that is no usable checkpoint; the message says which file and what is wrong with it."""


def save(path: Path, content: Mapping[str, Any], *, keep_as: Path | None = None) -> None:
    """Writes ``content`` (tensors, numbers, strings, lists, dicts) to ``path``; makes the folder if it is gone.

    The new file is complete, flushed and verified under a temporary name before it takes the place of
    the old one.

    Args:
        keep_as: the name under which the old one is kept.

    Raises:
        RunError: no room, or the disk does not give back what was written; ``path`` is as it was.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_space(path.parent, content)
        with atomic_write(path) as file:
            digest = _write(file, {"format": FORMAT, "version": VERSION, **content})
            file.flush()
            os.fsync(file.fileno())
            if _digest(Path(file.name)) != digest:
                raise RunError(f"{path}: what was read back differs from what was written: check the disk")
            if keep_as is not None and path.exists():
                files.keep_as(path, keep_as)


def link(source: Path, target: Path, *, keep_as: Path | None = None) -> None:
    """Makes ``target`` a second name of ``source`` (a copy where the file system has no links), atomically.

    Args:
        keep_as: the name under which what stood at ``target`` is kept.

    Raises:
        RunError: no room for a copy, or the folder cannot be written; ``source`` is intact.
    """
    with _explained(target):
        if keep_as is not None and target.exists():
            files.keep_as(target, keep_as)
        files.link(source, target)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error
        raise RunError(f"{path}: the disk is full; the earlier checkpoint is intact: free space and resume") from error


def read(path: Path) -> dict[str, Any]:
    """Verifies and reads a checkpoint; tensors are on the CPU, mapped from the file. Nothing in it is executed.

    Raises:
        CheckpointError: missing, empty, truncated, damaged, foreign, or of a newer version.
    """
    verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, it holds more than plain data: not a nanokimi checkpoint") from error
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "version" not in content:
        raise CheckpointError(f"{path}: not a nanokimi checkpoint")
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path}: written by a newer nanokimi (format {content['version']}, this one reads up to {VERSION}): update"
        )
    return content


def peek(path: Path) -> Mapping[str, Any]:
    """The plain values of a checkpoint, checked by the archive's own CRC; of tensors nothing is read but their shapes.

    Raises:
        CheckpointError: they cannot be read, or are damaged; ``read`` says why.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)  # compares the CRC
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a nanokimi checkpoint")
    return content


def require(path: Path, content: Mapping[str, Any], *names: str) -> None:
    """Raises CheckpointError unless ``content``, read from ``path``, has all the parts ``names``."""
    if missing := [name for name in names if name not in content]:
        raise CheckpointError(f"{path}: holds no {' and no '.join(missing)}: use another checkpoint")


def verify(path: Path) -> None:
    """Checks that ``path`` is a checkpoint and that every byte is as it was saved; CheckpointError if not."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory: name the checkpoint file, such as {path / 'latest.pt'}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint: check the path, or train one first")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty: use another checkpoint")
    with path.open("rb") as file:
        magic = file.read(2)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    if magic != b"PK":
        raise CheckpointError(f"{path}: not a checkpoint (it does not begin as one)")
    if tail[:2] != _COMMENT_BYTES.to_bytes(2, "little") or not tail[2:].startswith(_MARK):
        raise CheckpointError(f"{path}: truncated, or not saved by nanokimi: use another checkpoint")
    if tail[2 + len(_MARK) :].decode("ascii", "replace") != _digest(path):
        raise CheckpointError(f"{path}: damaged (its contents do not match their checksum): use another checkpoint")


RENAMED = {"embed": "embed.weight"}  # weights that version 1 called otherwise


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state by present names, without the prefix that ``torch.compile`` puts before every name."""
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    return {RENAMED.get(name, name): tensor for name, tensor in plain.items()}


def check_fits(path: Path, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, naming the first misfits, unless names and shapes agree."""
    problems = [f"lacks {name}" for name in expected if name not in saved]
    problems += [f"has the unknown {name}" for name in saved if name not in expected]
    problems += [
        f"{name} is {list(saved[name].shape)}, the model's is {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: the weights do not fit the model: {'; '.join(problems[:3])}{more}")


class HashingFile:
    """A file that is open for writing; hashes what passes through and remembers why it failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _write(file: BinaryIO, content: Mapping[str, Any]) -> str:
    hashing = HashingFile(file)
    try:
        torch.save(dict(content), hashing)
    except RuntimeError:
        if hashing.error is not None:  # torch reports a failed write as a surprise of its own
            raise hashing.error from None
        raise
    digest = hashing.sha256.hexdigest()
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_BYTES.to_bytes(2, "little") + _MARK + digest.encode())
    return digest


def _digest(path: Path) -> str:
    """SHA-256 of the archive as it was before the comment was added."""
    sha256, left = hashlib.sha256(), path.stat().st_size - _TAIL_BYTES
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            sha256.update(block)
            left -= len(block)
    sha256.update(b"\0\0")
    return sha256.hexdigest()


def _require_space(folder: Path, content: Mapping[str, Any]) -> None:
    need, free = _nbytes(content) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if need > free:
        raise RunError(
            f"{folder}: a checkpoint needs {need >> 20} MiB, the disk has {free >> 20} MiB left; "
            "earlier checkpoints are intact: free space and resume"
        )


def _nbytes(content: Any) -> int:
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(_nbytes(value) for value in content.values())
    if isinstance(content, (list, tuple)):
        return sum(_nbytes(value) for value in content)
    return len(content) if isinstance(content, (str, bytes)) else 8
