"""Compiles the decoder's C++ for this machine on first use, keeps it in a cache folder, and loads it.

The library is linked to the OpenMP runtime that PyTorch has already loaded, so that there is one pool of threads.
``prefer_huge_pages`` is for the memory that the kernels read from end to end.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from nanokimi.console import log
from nanokimi.errors import RunError
from nanokimi.files import atomic_path, cache_home

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# Without contraction a product and a sum round the same wherever the compiler places them: results are reproducible.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w")
_SECONDS = 300
_PAGE = 2 << 20  # bytes of a large page
_HUGEPAGE, _COLLAPSE = 14, 25  # numbers from Linux's mman.h; see madvise(2)


class Unavailable(Exception):
    """Why there is no native library, and what to do, in one line."""


def library() -> ctypes.CDLL:
    """The compiled decoder; built and stored unless it is there. RunError: it cannot be built here, and why."""
    outcome = _outcome()
    if isinstance(outcome, str):
        raise RunError(f"the native decoder cannot be built: {outcome}; or use --decoder eager")
    return outcome


def cache_folder() -> Path:
    """``$NANOKIMI_CACHE``, else ``$XDG_CACHE_HOME/nanokimi``, else ``~/.cache/nanokimi``."""
    if own := os.environ.get("NANOKIMI_CACHE"):
        return Path(own)
    return cache_home()


@functools.cache
def _outcome() -> ctypes.CDLL | str:
    """The library, or the reason why there is none; tried once per process."""
    try:
        runtime, compiler = _openmp_runtime(), _compiler()
        target = _target(compiler, runtime)
        if not target.exists():
            _compile(compiler, runtime, target)
        return ctypes.CDLL(str(target))
    except Unavailable as reason:
        return str(reason)
    except OSError as error:
        return f"{cache_folder()}: {error.strerror or error}: set NANOKIMI_CACHE to a folder that can be written"


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        if found := shutil.which(name):
            return found
    raise Unavailable(f"no C++ compiler found ({named or ', '.join(COMPILERS)}): install g++ or set CXX")


def _openmp_runtime() -> Path:
    """The libgomp, or a runtime with the same entry points, that PyTorch works with."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise Unavailable(f"{platform.system()} is not supported") from None
    loaded = sorted({Path(path) for path in re.findall(r"(/.*/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so\S*)", maps)})
    if not loaded:
        raise Unavailable("this PyTorch has no OpenMP runtime: install one from pytorch.org")
    beside = Path(torch.__file__).parent
    return min(loaded, key=lambda path: beside not in path.parents and beside.parent not in path.parents)


def _flags() -> tuple[str, ...]:
    """Instructions as PyTorch itself uses them, so that ``ATEN_CPU_CAPABILITY`` limits both."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return (*FLAGS, "-mavx2", "-mfma", "-mf16c", "-mtune=native")
    return (*FLAGS, "-march=native")


def _target(compiler: str, runtime: Path) -> Path:
    """The library's path. Its name depends on everything that would change the library."""
    digest = hashlib.sha256()
    for source in sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h")):
        digest.update(source.read_bytes())
    version = _run([compiler, "--version"]).stdout
    for part in (*_flags(), compiler, version, str(runtime), _processor()):
        digest.update(part.encode() + b"\0")
    return cache_folder() / f"decode-{digest.hexdigest()[:16]}.so"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run ({error}): set CXX to another compiler") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took longer than {_SECONDS} s: set CXX to another compiler") from None


def _processor() -> str:
    """Model and instructions of the CPU: a home folder may be shared between machines."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    return "".join(sorted(set(re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*\n", text, re.MULTILINE))))


def _compile(compiler: str, runtime: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    log(f"compiling the decoder for this machine, once, into {target.parent}: about ten seconds")
    with atomic_path(target) as temporary:  # another process may build at the same time
        done = _run([compiler, *_flags(), str(SOURCES / "decode.cpp"), "-o", str(temporary), str(runtime)])
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            said = errors[0].strip() if errors else f"exit code {done.returncode}"
            raise Unavailable(f"{compiler} fails ({said}): set CXX to another compiler")
        try:
            ctypes.CDLL(str(temporary))
        except OSError as error:
            raise Unavailable(f"{compiler} makes no library that loads ({error}): set CXX to another") from None


def prefer_huge_pages(tensor: Tensor, *, filled: bool = True) -> bool:
    """Asks Linux to keep the memory of ``tensor`` in large pages, so that the processor looks up fewer addresses.

    Args:
        filled: move what is there now, which takes as long as a copy the first time. Otherwise a page becomes large
            when it is first written.

    Returns:
        Whether Linux agreed.
    """
    # Only pages that lie wholly inside the tensor.
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - first
    if size <= 0 or not sys.platform.startswith("linux"):
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advised = madvise(first, size, _HUGEPAGE) == 0
    return advised and (not filled or madvise(first, size, _COLLAPSE) == 0)
