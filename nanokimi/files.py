"""Files that are either complete or absent, whatever happens while they are written."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_STALE_SECONDS = 60


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the name ``path`` once the block ends without an error.

    Until then it has a temporary name in the same folder (``file.name``); on an error it is removed and
    what stood at ``path`` is untouched. Contents and name are flushed to the disk before this returns.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("x+b") as file:
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _remove_stale(path: Path) -> None:
    """Removes temporaries that a killed process left for ``path``; a living writer holds a lock on its own."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), left.open("rb") as file:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:  # the lock comes a moment after the name
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
