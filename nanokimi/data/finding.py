"""Which files a path means: folders and patterns are searched, links followed once, and each file is read once.

What the user has not named is left out if its name begins with a dot, as hidden files, editors' copies and the folders
of notebooks do, or if it lies in a token cache.
"""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from nanokimi.console import counted

CACHE_SUFFIX = ".nanokimi"  # of the folder beside a text where its tokens are kept
_SHOWN = 3

Wanted = Callable[[str], bool]


class Search:
    """Finds files, and keeps account of what it leaves out.

    Attributes:
        left_out: by reason, paths that were passed over.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, list[Path]] = defaultdict(list)

    @property
    def note(self) -> str:
        """What was left out, in words; empty if that is nothing."""
        return "; ".join(f"{reason} ({_listing(paths)})" for reason, paths in self.left_out.items() if paths)

    def below(self, folder: Path, wanted: Wanted) -> list[Path]:
        """All files below ``folder`` whose names are ``wanted``, in the order of their names."""
        return sorted(file for below in self._folders(folder) for file in self.files_in(below, wanted))

    def files_in(self, folder: Path, wanted: Wanted) -> list[Path]:
        """The files of ``folder`` alone whose names are ``wanted``, in the order of their names."""
        named = [path for path in self._entries(folder) if wanted(path.name) and not os.path.isdir(path)]
        self.left_out["links that lead nowhere"] += (path for path in named if not os.path.exists(path))
        return [path for path in named if os.path.isfile(path) and self._is_meant(path)]

    def matching(self, pattern: str) -> list[Path]:
        """What fits a pattern (``*``, ``?``, ``[...]``; ``**`` for all folders below), in the order of their names."""
        path = Path(pattern)
        return sorted(self._matching(Path(path.anchor), path.parts[bool(path.anchor) :]))

    def once(self, files: Iterable[Path]) -> list[Path]:
        """Each of ``files`` under one of its names: the first one that is no link."""
        files = list(dict.fromkeys(files))
        kept: dict[tuple[int, int], Path] = {}
        links_last = sorted(filter(os.path.exists, files), key=lambda file: file.is_symlink())
        further = [file for file in links_last if kept.setdefault(_place(file), file) is not file]
        self.left_out["further names of files that are read already"] += further
        left_out = set(further)
        return [file for file in files if file not in left_out]

    # ---- walking ----------------------------------------------------------------------------------

    def _folders(self, top: Path) -> Iterator[Path]:
        """``top`` and every folder below it, once each; those that only links lead to come last."""
        seen: set[tuple[int, int]] = set()
        waiting, links = [top], list[Path]()
        while waiting:
            for folder in waiting:  # which grows meanwhile
                if (place := _place(folder)) in seen:
                    self.left_out["links to folders that are read already"] += [folder] * folder.is_symlink()
                    continue
                seen.add(place)
                yield folder
                for path in self._entries(folder):
                    if os.path.isdir(path) and self._is_meant(path):
                        (links if path.is_symlink() else waiting).append(path)
            waiting, links = links, []

    def _matching(self, folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """What below ``folder`` fits the rest of a pattern."""
        first, rest = parts[0], parts[1:]
        if first == "**":
            for below in self._folders(folder):
                yield from self._matching(below, rest or ("*",))
            return
        if not glob.has_magic(first):
            found = [folder / first] if os.path.lexists(folder / first) else []
        else:
            fitting = (path for path in self._entries(folder) if fnmatchcase(path.name, first))
            found = [path for path in fitting if first.startswith(".") or self._is_meant(path)]
        for path in found:
            if not rest:
                yield path
            elif os.path.isdir(path):
                yield from self._matching(path, rest)

    def _entries(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir())
        except PermissionError:
            self.left_out["folders that cannot be opened"].append(folder)
        except OSError:  # no folder, or gone by now
            pass
        return []

    def _is_meant(self, path: Path) -> bool:
        """Whether something that the user has not named counts; hidden names are noted, our own caches are not."""
        if path.suffix == CACHE_SUFFIX and os.path.isdir(path):
            return False
        if path.name.startswith("."):
            self.left_out["names that begin with a dot"].append(path)
            return False
        return True


def split_path(path: str) -> list[str]:
    """The items of a path that may be several with commas between them."""
    return [path] if os.path.lexists(path) else [item.strip() for item in path.split(",")]


def _place(path: Path) -> tuple[int, int]:
    """By what a file or folder is told apart from others, whatever its name."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _listing(paths: list[Path]) -> str:
    paths = list(dict.fromkeys(paths))
    names = ", ".join(map(str, paths[:_SHOWN]))
    return f"{names} and {counted(len(paths) - _SHOWN, 'other')}" if len(paths) > _SHOWN else names
