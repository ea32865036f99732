"""What this machine has, what will go wrong on it, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from nanokimi.console import show
from nanokimi.device import own_cores
from nanokimi.errors import RunError
from nanokimi.memory import free_memory, left_in_groups
from nanokimi.native.build import cache_folder, library
from nanokimi.ops.measured import NAMES, default_choice, fixed, measured_choice, multiplied_by
from nanokimi.ops.products import product

PACKAGES = ("nanokimi", "torch", "numpy", "tokenizers", "datasets", "safetensors")
EXTRAS = ("fastapi", "uvicorn", "transformers", "gguf", "lm_eval", "tensorboardX", "wandb", "trackio")
LEAST_MEMORY, LEAST_DISK = 2 << 30, 1 << 30
SIDE = 512  # of the matrices whose products are timed


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: of what was looked at.
        seen: what was found.
        trouble: what will go wrong and what to do; empty where nothing will.
        fails: whether a command will fail, and not only be slower.
    """

    name: str
    seen: str
    trouble: str = ""
    fails: bool = False


def run_doctor(output_dir: Path, *, as_json: bool) -> int:
    """Prints what was found; 1 if something will fail, else 0."""
    findings = [found for look in looks(output_dir) for found in attempted(look)]
    if as_json:
        show(json.dumps([asdict(found) for found in findings], indent=2))
    else:
        for found in findings:
            show(f"{found.name}: {found.seen}" + (f": {found.trouble}" if found.trouble else ""))
    return int(any(found.fails for found in findings))


def looks(output_dir: Path) -> list[Callable[[], Iterator[Finding]]]:
    """All examinations, in the order of the report."""
    return [
        versions,
        devices,
        memory,
        lambda: folder("output folder", output_dir, "choose another --output_dir", fails=True),
        lambda: folder("cache folder", cache_folder(), "set NANOKIMI_CACHE to a folder that can be written"),
        native_decoder,
        speed,
    ]


def attempted(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What ``look`` finds; an examination that itself fails is a finding too."""
    try:
        return list(look())
    except Exception as error:
        return [Finding("examination", type(error).__name__, f"{error}: this part could not be looked at")]


def versions() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    for name in (*PACKAGES, *EXTRAS):
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            needed = name in PACKAGES and name != "nanokimi"
            trouble = "install it with pip: commands will fail without it" if needed else ""
            yield Finding(name, "not installed", trouble, needed)


def devices() -> Iterator[Finding]:
    yield Finding("processor", f"{torch.backends.cpu.get_cpu_capability()}, {own_cores()} cores")
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Finding(f"cuda:{number}", f"{about.name}, {about.total_memory / 2**30:.1f} GiB")


def memory() -> Iterator[Finding]:
    """What may still be taken, within the machine and its control groups."""
    free = free_memory()
    if free is None:
        yield Finding("free memory", "this system does not tell")
        return
    little = free < LEAST_MEMORY
    trouble = "too little for more than small models: choose a small --preset, or raise the limit" if little else ""
    left = min(left_in_groups(), default=None)
    groups = "set no limit" if left is None else f"leave {left / 2**30:.1f} GiB"
    yield Finding("free memory", f"{free / 2**30:.1f} GiB; control groups {groups}", trouble)


def folder(name: str, path: Path, remedy: str, *, fails: bool = False) -> Iterator[Finding]:
    """Room, write rights and hard links in ``path``, or in the folder above that is there; nothing is left in it."""
    there = next(above for above in (path.absolute(), *path.absolute().parents) if above.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".nanokimi-doctor-") as trial:
            first = Path(trial, "first")
            first.write_bytes(b"x")
            try:
                os.link(first, Path(trial, "second"))
                links = "hard links"
            except OSError:
                links = "no hard links, so a save needs more room"
    except OSError as error:
        yield Finding(name, f"{path} cannot be written ({error.strerror})", remedy, fails)
        return
    free = shutil.disk_usage(there).free
    little = free < LEAST_DISK
    yield Finding(
        name, f"{path}, {free / 2**30:.1f} GiB free, {links}", "free space" if little else "", little and fails
    )


def native_decoder() -> Iterator[Finding]:
    try:
        library()
        yield Finding("native decoder", "can be used")
    except RunError as error:
        yield Finding("native decoder", "cannot be used", f"{error}; without it text is written more slowly")


def speed() -> Iterator[Finding]:
    """How fast each library and type multiplies, and which of them a run on this CPU would take, measured now."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    for kind, name in NAMES.items():
        with multiplied_by(kind):
            fast = gigaflops(partial(product, a, b))
        yield Finding(f"fp32 products by {name}", f"{fast:.0f} GFLOP/s")
    half_a, half_b = a.bfloat16(), b.bfloat16()
    yield Finding("bf16 products", f"{gigaflops(partial(torch.matmul, half_a, half_b)):.0f} GFLOP/s")
    choice = default_choice(torch.device("cpu")) if fixed() else measured_choice(SIDE, SIDE)
    yield Finding("products of a run", f"{choice} ({choice.evidence})")


def gigaflops(multiply: Callable[[], object]) -> float:
    """Speed of a product of two matrices of ``SIDE``: the best of five after one to warm up."""
    multiply()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started)
    return 2e-9 * SIDE**3 / min(seconds)
