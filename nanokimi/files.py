"""Files that are either complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import fcntl
import getpass
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from nanokimi.errors import RunError, UserError

_STALE_SECONDS = 60


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the name ``path`` once the block ends without an error.

    Until then it has a temporary name in the same folder (``file.name``); on an error it is removed and
    what stood at ``path`` is untouched. Contents and name are flushed to the disk before this returns.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    with atomic_path(path) as temporary, temporary.open("r+b") as file:
        yield file


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """``atomic_write`` for code that opens the file itself: yields the temporary name of a file that is empty."""
    path = Path(path)
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("xb") as held:
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            os.fsync(held.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync(path.parent)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``path`` once the block ends without an error.

    Raises:
        FileExistsError: there is something at ``path`` already, other than an empty folder.
        BlockingIOError: another process is filling it.
        OSError: the folder above is not writable, or the disk is full.
    """
    path = Path(path)
    if not path.name or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists already", str(path))
    with partial_folder(path) as partial:
        yield partial
        for file in (*partial.iterdir(), partial):
            _sync(file)
        os.rename(partial, path)
    _sync(path.parent)


@contextmanager
def partial_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder ``.NAME.partial`` beside ``path``, for work in progress; it is removed when the block ends.

    A folder that a killed process left is emptied and used.

    Raises:
        BlockingIOError: another process is using it.
        OSError: the folder above is not writable.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    held = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            for left in partial.iterdir():
                left.unlink()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(held)


def move_into(folder: Path, *files: Path) -> None:
    """Moves ``files``, which are complete and flushed, into ``folder`` on the same disk, one after the other."""
    for file in files:
        os.replace(file, folder / file.name)
    _sync(folder)


def put_aside(path: Path) -> Path:
    """Renames ``path`` to the first of ``path.1``, ``path.2``, ... that is free; returns the new name."""
    names = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return path.rename(next(name for name in names if not name.exists()))


def require_writable(output: Path, *, example: str) -> None:
    """Raises UserError now, before the work, when the file named by ``--output`` could not be written."""
    if output.is_dir():
        raise UserError(f"--output {output} is a directory: name a file, such as {output / example}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}): choose another") from error


@contextmanager
def disk_errors_explained(what: str, path: Path) -> Iterator[None]:
    """Turns errors of the file system into a RunError that names the remedy."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full: free space" if is_full_disk(error) else error.strerror or error
        raise RunError(f"the {what} {path} cannot be written: {reason}") from error


def is_full_disk(error: Exception) -> bool:
    """Whether the disk is full; safetensors and numpy say so in words and without an error number."""
    in_words = any(words in str(error) for words in ("No space left", "requested and"))
    return in_words or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def cache_home() -> Path:
    """The user's cache folder for what nanokimi makes: ``$XDG_CACHE_HOME/nanokimi``, else ``~/.cache/nanokimi``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "nanokimi"


def home() -> Path:
    """The user's home; for a user who has none, a folder among the temporary ones that nobody else can write."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and no entry in the password file, as for many users of containers
        folder = Path(tempfile.gettempdir()) / f"nanokimi-home-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        about = folder.lstat()  # libraries are loaded from below it, so it must not be another user's
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022:
            return folder
        return Path(tempfile.mkdtemp(prefix="nanokimi-home-"))


def expand_home(paths: str) -> str:
    """``paths`` with the home for each ``~`` and ``~user`` that begins one; shells do that at the start of a word only.

    Of ``a.txt,~/b.txt`` and ``a.txt=0.7,tokenbin:~/b=0.3`` too.
    """
    return re.sub(r"(?:^|(?<=[,:]))~[^/,=]*", lambda found: os.path.expanduser(found[0]), paths)


def provide_home() -> None:
    """Lets the libraries too that ask for a home or the user's name find one; theirs is the environment."""
    os.environ.setdefault("HOME", str(home()))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove_stale(path: Path) -> None:
    """Removes temporaries that a killed process left for ``path``; a living writer holds a lock on its own."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), left.open("rb") as file:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:  # the lock comes a moment after the name
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
