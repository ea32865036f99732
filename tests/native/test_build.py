"""Building the kernels: on first use, once, and with a clear reason where it fails. The sources are a stub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import locked_folder

from nanokimi.errors import RunError
from nanokimi.native import build

pytestmark = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source that compiles in no time, and a cache folder of its own; nothing is remembered."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "decode.cpp").write_text('extern "C" int answer() { return 41; }\n', encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("NANOKIMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    build._outcome.cache_clear()
    yield sources
    build._outcome.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A compiler that says a version and otherwise does what ``script`` says."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo "compiler 1"\n{script}\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def is_built() -> bool:
    """Whether the library that would be loaded lies in the cache folder."""
    try:
        return build._target(build._compiler(), build._openmp_runtime()).exists()
    except build.Unavailable:
        return False


def built(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir())


def test_the_library_is_built_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_built()
    assert build.library().answer() == 41
    assert is_built()
    assert len(built(tmp_path)) == 1
    build._outcome.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.library().answer() == 41


def test_another_source_or_instruction_set_is_another_library(
    tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.library()
    (stub / "decode.cpp").write_text('extern "C" int answer() { return 42; }\n', encoding="utf-8")
    build._outcome.cache_clear()
    assert build.library().answer() == 42
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert not is_built()
    assert len(built(tmp_path)) == 2


def test_instructions_follow_those_that_pytorch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert build._flags()[-4:] == ("-mavx2", "-mfma", "-mf16c", "-mtune=native")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert build._flags()[-1] == "-march=native"


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path(os.environ["NANOKIMI_CACHE"])
    monkeypatch.delenv("NANOKIMI_CACHE")
    assert build.cache_folder() == Path("/somewhere/nanokimi")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path.home() / ".cache" / "nanokimi"


def assert_fails(reason: str) -> None:
    assert not is_built()
    with pytest.raises(RunError) as caught:
        build.library()
    message = str(caught.value)
    assert message.startswith("the native decoder cannot be built: ")
    assert message.endswith("; or use --decoder eager")
    assert reason in message
    assert "\n" not in message
    assert str(build._outcome()) in message


def test_no_compiler_is_a_clear_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert_fails("no C++ compiler found (no-such-compiler): install g++ or set CXX")


def test_a_compiler_named_by_the_user_that_is_not_there_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_fails("no C++ compiler found (no-such-compiler): install g++ or set CXX")


def test_a_failed_compilation_tells_the_first_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'echo "in a file" >&2; echo "decode.cpp:7: error: odd" >&2; echo "error: more" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    assert_fails("fails (decode.cpp:7: error: odd): set CXX to another compiler")
    assert built(tmp_path) == []


def test_a_compiler_that_makes_no_library_is_a_clear_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 0"))
    assert_fails("makes no library that loads")
    assert built(tmp_path) == []


def test_a_cache_folder_that_cannot_be_written_is_a_clear_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOKIMI_CACHE", str(locked_folder(tmp_path) / "nanokimi"))
    assert_fails("set NANOKIMI_CACHE to a folder that can be written")


def test_two_processes_that_build_at_once_both_get_a_whole_library(tmp_path: Path, stub: Path) -> None:
    real = next(filter(None, map(shutil.which, build.COMPILERS)))
    script = (
        "from pathlib import Path; from nanokimi.native import build;"
        f"build.SOURCES = Path({str(stub)!r}); assert build.library().answer() == 41"
    )
    environment = os.environ | {"CXX": compiler(tmp_path, f'sleep 0.5; exec {real} "$@"')}
    processes = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(built(tmp_path)) == 1
