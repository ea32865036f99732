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
_LONGEST_NAME = 220  # bytes: file systems take 255, and temporary names and caches add up to 35
# What file systems answer that cannot do it, such as exFAT, and shares of other systems.
_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LINKS = (*_UNSUPPORTED, errno.EPERM, errno.EMLINK)
_NO_LOCKS = (*_UNSUPPORTED, errno.ENOLCK, errno.EINVAL, errno.EBADF)


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
    temporary = path.with_name(f".{short_name(path.name)}.{secrets.token_hex(4)}.tmp")
    with temporary.open("xb") as held:
        try:
            with suppress(BlockingIOError):
                lock(held.fileno())
            yield temporary
            os.fsync(held.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def link(source: Path, target: Path) -> None:
    """Makes ``target`` a second name of ``source``, atomically; a copy where the file system has no links.

    Raises:
        OSError: the folder is not writable, or has no room for a copy; ``target`` is as it was.
    """
    if not _linked(source, target):
        _copy(source, target)
    sync_folder(target.parent)


def keep_as(path: Path, target: Path) -> None:
    """Gives ``path`` the name ``target`` too; where there are no links ``path`` is gone then, which takes no room."""
    if not _linked(path, target):
        os.replace(path, target)


def _linked(source: Path, target: Path) -> bool:
    """Links, atomically; False where the file system has no links."""
    temporary = target.with_name(f".{target.name}.link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    finally:
        temporary.unlink(missing_ok=True)  # it stays where both were names of one file already
    return True


def _copy(source: Path, target: Path) -> None:
    if source.stat().st_size > shutil.disk_usage(target.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


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
        for file in partial.iterdir():
            _sync(file)
        sync_folder(partial)
        os.rename(partial, path)
    sync_folder(path.parent)


@contextmanager
def partial_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder ``.NAME.partial`` beside ``path``, for work in progress; it is removed when the block ends.

    A folder that a killed process left is emptied and used.

    Raises:
        BlockingIOError: another process is using it.
        OSError: the folder above is not writable.
    """
    path = Path(path)
    partial = path.with_name(f".{short_name(path.name)}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    held = os.open(partial, os.O_RDONLY)
    try:
        lock(held)
        try:
            for left in partial.iterdir():
                left.unlink()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(held)


def short_name(name: str) -> str:
    """``name``, or where it is so long that nothing could be added to it, its beginning and a hash of it."""
    data = os.fsencode(name)
    if len(data) <= _LONGEST_NAME:
        return name
    return f"{data[: _LONGEST_NAME - 17].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


def move_into(folder: Path, *files: Path) -> None:
    """Moves ``files``, which are complete and flushed, into ``folder`` on the same disk, one after the other."""
    for file in files:
        os.replace(file, folder / file.name)
    sync_folder(folder)


def put_aside(path: Path) -> Path:
    """Renames ``path`` to the first of ``path.1``, ``path.2``, ... that is free; returns the new name."""
    names = (path.with_name(f"{short_name(path.name)}.{number}") for number in count(1))
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
    for left in path.parent.glob(f".{glob.escape(short_name(path.name))}.*.tmp"):
        with suppress(OSError), left.open("rb") as file:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:  # the lock comes a moment after the name
                lock(file.fileno())
                left.unlink()


def lock(descriptor: int, *, wait: bool = False, by_process: bool = False) -> None:
    """Keeps others out of an open file until it is closed; on file systems without locks it does nothing.

    Args:
        wait: until another process gives it up.
        by_process: processes that are forked from this one do not hold it.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        (fcntl.lockf if by_process else fcntl.flock)(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(errno.EAGAIN, "another process holds it") from None
        if error.errno not in _NO_LOCKS:
            raise


def sync_folder(path: Path) -> None:
    """Makes the names in a folder last through a power cut, where the file system can do that for folders."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EINVAL, errno.EBADF, errno.EACCES, errno.EISDIR):
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
