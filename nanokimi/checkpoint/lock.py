"""Keeps two runs out of one folder."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from nanokimi.console import log
from nanokimi.errors import UserError
from nanokimi.files import lock

LOCK = ".nanokimi.lock"  # in the folder of a run, held while it trains


class FolderLock:
    """The lock of ``checkpoints``'s parent, which names the programs that started the run; makes the folders too.

    Raises:
        UserError: they cannot be written, or another run is writing there.
    """

    def __init__(self, checkpoints: Path, launchers: Collection[str] = ()) -> None:
        self._checkpoints, self._launchers = checkpoints, launchers
        self._path = checkpoints.parent / LOCK
        self._file: TextIO | None = None

    def __enter__(self) -> FolderLock:
        output = self._checkpoints.parent
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a")
            lock(self._file.fileno(), by_process=True)  # orphaned data workers do not hold on to it
        except OSError as error:
            taken = isinstance(error, BlockingIOError)
            self.__exit__()
            problem = "another run is writing there" if taken else f"cannot be written ({error.strerror})"
            raise UserError(f"--output_dir {output}: {problem}: choose another") from error
        self._file.truncate(0)
        self._file.writelines(f"{name}\n" for name in sorted(self._launchers))
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def keep(self) -> None:
        """Makes again, and says so, what somebody removed while the run goes on; all is as when it is entered."""
        if self._checkpoints.is_dir() and self._is_held():
            return
        log(f"warning: {self._checkpoints} or the lock beside it was removed while the run goes on: made again")
        self.__exit__()
        self.__enter__()

    def _is_held(self) -> bool:
        with suppress(FileNotFoundError):
            return self._file is not None and os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        return False
