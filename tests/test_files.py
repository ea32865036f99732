from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from nanokimi.files import atomic_write


def test_the_name_appears_with_the_whole_contents(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with suppress(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_removed_and_a_living_writers_file_is_not(tmp_path: Path) -> None:
    path, left = tmp_path / "file", tmp_path / ".file.0badcafe.tmp"
    left.write_bytes(b"half")
    with atomic_write(path) as living:
        for old in (left, living.name):
            os.utime(old, (time.time() - 1000,) * 2)
        with atomic_write(path) as file:
            file.write(b"second")
        assert not left.exists()
        living.write(b"first")
    assert path.read_bytes() == b"first"


def test_files_are_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    ordinary, atomic = tmp_path / "a", tmp_path / "b"
    ordinary.touch()
    with atomic_write(atomic):
        pass
    assert atomic.stat().st_mode == ordinary.stat().st_mode
