"""A folder whose every file operation passes through this program: counted, failed, killed at, recorded, replayed.

The model of a power cut. A disk keeps what was synced before and may lose anything else. A write to a file lasts from
the next ``fsync`` of that file on; until then each write may be lost alone, whatever became of others. A change of
names (a new file, link, rename, removal) lasts from the next ``fsync`` of a folder that it changes on; until then any
subset of such changes may be on the disk, in no order, but each as a whole: a rename is atomic. A file whose new name
has come to the disk can hold lost writes: these read as zeros, or as the end of the file. File systems promise more
(ext4 orders renames after data), so what holds here holds there.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

Tree = dict[str, bytes]  # contents of files by path; paths of folders end in "/"
NEEDS_ROOM = ("write", "create", "mkdir", "link", "fsync")  # operations that a full disk refuses
ALL_SUBSETS = 8  # of so many changes of names; of more: every beginning of them, and each left out


class Op(NamedTuple):
    """One operation: a write (node, offset, data), a sync of a node, a change of names, or news of the program."""

    kind: str  # write, sync, names, done
    node: int = 0
    offset: int = 0
    data: bytes = b""
    names: tuple[
        tuple[int, str, int], ...
    ] = ()  # folder, name, node; 0 is nothing, a folder is below 0 (the root is 1)
    step: int = 0


class Disk:
    """Stands between this process and everything below ``root``, which is an empty folder at first.

    Args:
        before: is called with the number and the kind of every operation before it happens; may raise. What it returns
            for a write is how many bytes of it are to be written before this process is killed; None: all goes on.
    """

    def __init__(self, root: Path, before: Callable[[int, str], int | None] = lambda number, kind: None) -> None:
        self.root, self.before, self.ops, self.count = str(root.resolve()), before, [], 0
        self.kinds: list[str] = []  # of all operations
        self._entries: dict[tuple[int, str], int] = {}
        self._nodes = itertools.count(2)  # 1 is the root

    def done(self, step: int) -> None:
        """Notes that a checkpoint of ``step`` is said to be on the disk."""
        self.ops.append(Op("done", step=step))

    def _at(self, path: Any) -> tuple[int, str] | None:
        """Folder and name; None outside of the root."""
        path = os.path.abspath(os.fspath(path))
        if not path.startswith(self.root + "/"):
            return None
        *above, name = path[len(self.root) + 1 :].split("/")
        folder = 1
        for part in above:
            folder = self._entries.get((folder, part), 0)
        return folder, name

    def _happens(self, kind: str) -> int | None:
        self.count += 1
        self.kinds.append(kind)
        return self.before(self.count, kind)

    def _names(self, *changes: tuple[tuple[int, str], int]) -> None:
        for place, node in changes:
            if node:
                self._entries[place] = node
            else:
                self._entries.pop(place, None)
        self.ops.append(Op("names", names=tuple((*place, node) for place, node in changes)))

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """While the block runs, all operations of this process below the root are seen."""
        real = {name: getattr(os, name) for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync")}
        opened = io.open

        def open_(path: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            place = None if isinstance(path, int) or not set(mode) & set("wxa+") else self._at(path)
            if place is None:
                return opened(path, mode, *arguments, **more)
            if place not in self._entries:
                self._happens("create")
            raw = _Raw(self, path, mode.replace("b", "").replace("t", ""), place)
            kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
            return kind(raw) if "b" in mode else io.TextIOWrapper(kind(raw), encoding="utf-8")

        def moved(source: Any, target: Any, **more: Any) -> None:
            self._change(
                "rename", real["rename"], (source, target), lambda a, b: ((a, 0), (b, self._entries.get(a, 0)))
            )

        def link(source: Any, target: Any, **more: Any) -> None:
            self._change("link", real["link"], (source, target), lambda a, b: ((b, self._entries.get(a, 0)),))

        def removed(kind: str) -> Callable[..., None]:
            def act(path: Any, *, dir_fd: int | None = None) -> None:
                path = path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
                self._change(kind, real[kind], (path,), lambda a: ((a, 0),))

            return act

        def mkdir(path: Any, *arguments: Any, **more: Any) -> None:
            self._change("mkdir", real["mkdir"], (path,), lambda a: ((a, -next(self._nodes)),))

        def fsync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            place = self._at(path)
            if path == self.root or place:
                self._happens("fsync")
            real["fsync"](number)
            if path == self.root or place:
                self.ops.append(Op("sync", 1 if path == self.root else self._entries.get(place, 0)))

        patched = {"mkdir": mkdir, "rename": moved, "replace": moved, "link": link, "fsync": fsync}
        patched |= {"unlink": removed("unlink"), "remove": removed("unlink"), "rmdir": removed("rmdir")}
        opens = (mock.patch.object(module, "open", open_) for module in (builtins, io))
        with mock.patch.multiple(os, **patched), next(opens), next(opens):
            yield self

    def _change(self, kind: str, act: Any, paths: tuple[Any, ...], changes: Any) -> None:
        places = [self._at(path) for path in paths]
        if None in places:
            act(*paths)
            return
        if kind in ("unlink", "rmdir", "mkdir") and os.path.lexists(paths[0]) == (kind == "mkdir"):
            act(*paths)  # fails, and changes nothing
            return
        self._happens(kind)
        act(*paths)
        self._names(*changes(*places))


class _Raw(io.FileIO):
    def __init__(self, disk: Disk, path: Any, mode: str, place: tuple[int, str]) -> None:
        super().__init__(os.fspath(path), mode)
        self._disk = disk
        if place not in disk._entries:
            disk._names((place, next(disk._nodes)))
        self._node = disk._entries[place]

    def write(self, data: Any) -> int:
        data, offset = bytes(data), self.tell()
        part = self._disk._happens("write")
        if part is not None:
            super().write(data[: part * len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(data)
        self._disk.ops.append(Op("write", self._node, offset, data))
        return len(data)


def killed_at(number: int) -> Callable[[int, str], int | None]:
    """Kills the process at an operation: odd numbers before it, even ones in the middle of a write."""

    def before(count: int, kind: str) -> int | None:
        if count != (number + 1) // 2:
            return None
        if kind == "write":
            return 1 - number % 2
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    return before


def full_from(number: int) -> Callable[[int, str], None]:
    """From this operation on there is no room for anything new."""

    def before(count: int, kind: str) -> None:
        if count >= number and kind in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before


# ---- power cuts ---------------------------------------------------------------------------------


class PowerCuts:
    """Every state in which a power cut can leave the disk, at any moment of what was recorded.

    Attributes:
        prefixes, states, dropped_writes, dropped_names: how many there were, the same ones counted again.
    """

    def __init__(self, ops: list[Op]) -> None:
        self.ops = ops
        self.prefixes = self.states = self.dropped_writes = self.dropped_names = 0

    def __iter__(self) -> Iterator[tuple[int, Tree]]:
        """The step that was said to be on the disk, and what is found there; temporary files are left out."""
        durable: dict[tuple[int, str], int] = {}
        pending: list[Op] = []
        writes: dict[int, list[Op]] = {}
        synced: dict[int, int] = {}
        said = 0
        for op in self.ops:
            if op.kind == "done":
                said = max(said, op.step)
            elif op.kind == "write":
                writes.setdefault(op.node, []).append(op)
            elif op.kind == "names":
                pending.append(op)
            else:
                synced[op.node] = len(writes.get(op.node, []))
                for change in [c for c in pending if any(folder == op.node for folder, _, _ in c.names)]:
                    _apply(durable, change)
                    pending.remove(change)
            self.prefixes += 1
            self.dropped_writes += sum(len(done) - synced.get(node, 0) for node, done in writes.items())
            for kept in _subsets(pending):
                self.dropped_names += len(pending) - len(kept)
                entries = dict(durable)
                for change in kept:
                    _apply(entries, change)
                for tree in _trees(entries, writes, synced):
                    self.states += 1
                    yield said, tree


def _apply(entries: dict[tuple[int, str], int], change: Op) -> None:
    for folder, name, node in change.names:
        if node:
            entries[folder, name] = node
        else:
            entries.pop((folder, name), None)


def _subsets(changes: list[Op]) -> Iterator[list[Op]]:
    if len(changes) <= ALL_SUBSETS:
        for chosen in itertools.product((False, True), repeat=len(changes)):
            yield [change for change, kept in zip(changes, chosen, strict=True) if kept]
        return
    for number in range(len(changes) + 1):
        yield changes[:number]
    for number in range(len(changes)):
        yield changes[:number] + changes[number + 1 :]


def _trees(entries: dict[tuple[int, str], int], writes: dict[int, list[Op]], synced: dict[int, int]) -> Iterator[Tree]:
    """What can be read: with every write, without any that is not synced, and without each of those alone."""
    paths = {path: node for path, node in _walk(entries, 1, "") if not path.endswith(".tmp")}
    yield {path: _content(writes.get(node, [])) for path, node in paths.items()}
    for node in {node for node in paths.values() if synced.get(node, 0) < len(writes.get(node, []))}:
        done, safe = writes[node], synced.get(node, 0)
        for left in (done[:safe], *(done[:i] + done[i + 1 :] for i in range(safe, len(done)))):
            yield {path: _content(left if other == node else writes.get(other, [])) for path, other in paths.items()}


def _walk(entries: dict[tuple[int, str], int], folder: int, above: str) -> Iterator[tuple[str, int]]:
    for (parent, name), node in entries.items():
        if parent == folder:
            yield above + name + "/" * (node < 0), node
            yield from _walk(entries, node, f"{above}{name}/")


def _content(writes: list[Op]) -> bytes:
    data = bytearray()
    for write in writes:
        data.extend(bytes(max(0, write.offset + len(write.data) - len(data))))
        data[write.offset : write.offset + len(write.data)] = write.data
    return bytes(data)


def key_of(tree: Tree) -> str:
    """A name for a state of the disk."""
    return hashlib.sha256(repr(sorted((k, hashlib.sha256(v).digest()) for k, v in tree.items())).encode()).hexdigest()
