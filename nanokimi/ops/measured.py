"""Which precision and which library multiply fastest on this machine: measured, where a processor's flags mislead.

A processor may say that it multiplies bf16 and do so at half the speed of fp32, and either of MKL and oneDNN may be the
faster. So products of the shapes at hand are timed once per machine and version of torch, and the outcome is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from nanokimi.files import atomic_write
from nanokimi.ops.newton_schulz import best_dtype, newton_schulz
from nanokimi.ops.products import HAS_ONEDNN, SMALL, Library, fp32_library, multiply_fp32_by, product

GAIN = 1.15  # by which another choice has to be faster, in the median, to replace the default
FIXED = "fixed"  # the value of NANOKIMI_PRODUCTS that forbids to measure
LARGEST = 512  # rows and columns of a matrix that are timed at most
TOKENS = 1024  # rows that are multiplied by it
ROUNDS, SECONDS = 9, 0.2  # of a measurement with its warm-up: three rounds, then as many as the time allows
NAMES: dict[Library, str] = {"onednn": "oneDNN", "mkl": "MKL"}


class Choice(NamedTuple):
    """How a CPU multiplies.

    Attributes:
        dtype: of Newton-Schulz, ``bfloat16`` or ``float32``.
        library: of fp32 products.
        dtype_gain: how many times as fast as in bf16 Newton-Schulz was in fp32; 0 where it was not measured.
        library_gain: how many times as fast as oneDNN MKL was; 0 where it was not measured.
    """

    dtype: str
    library: Library = "onednn"
    dtype_gain: float = 0.0
    library_gain: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def evidence(self) -> str:
        """What the choice rests on, in words."""
        by_library = f"MKL has {self.library_gain:.2f} times the speed of oneDNN" if self.library_gain else ""
        by_dtype = f"float32 {self.dtype_gain:.2f} times that of bfloat16" if self.dtype_gain else ""
        found = ", ".join(part for part in (by_library, by_dtype) if part)
        return f"measured: {found}" if found else "by default"

    def __str__(self) -> str:
        return f"fp32 by {NAMES[self.library]}, Newton-Schulz in {self.dtype}"


def default_choice(device: torch.device) -> Choice:
    """What the hardware's flags say."""
    return Choice(str(best_dtype(device)).removeprefix("torch."), "onednn" if HAS_ONEDNN else "mkl")


def fixed() -> bool:
    """Whether the environment forbids to measure."""
    return os.environ.get("NANOKIMI_PRODUCTS") == FIXED


def machine_choice(shape: tuple[int, int], folder: Path, *, deterministic: bool = False) -> Choice:
    """What is faster on this CPU for matrices of ``shape``; measured unless ``folder`` knows it.

    ``deterministic``, and ``NANOKIMI_PRODUCTS=fixed`` in the environment, leave it to the processor's flags.
    """
    if deterministic or fixed():
        return default_choice(torch.device("cpu"))
    rows, cols = (min(side, LARGEST) for side in shape)
    path = folder / f"products-{_machine(rows, cols)}.json"
    with suppress(OSError, ValueError, TypeError):
        known = Choice(**json.loads(path.read_text(encoding="utf-8")))
        if known.dtype in ("bfloat16", "float32") and known.library in NAMES:
            return known
    choice = measured_choice(rows, cols)
    with suppress(OSError):  # then it is measured again the next time
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(choice._asdict()).encode())
    return choice


def measured_choice(rows: int, cols: int) -> Choice:
    """The choice for ``[rows, cols]`` matrices, measured now: first the library, then Newton-Schulz with it.

    Nothing is measured where there is no other choice: without oneDNN, or without bf16 instructions, for then bf16 is
    23 to 41 times slower.
    """
    choice = default_choice(torch.device("cpu"))
    if choice.library == "onednn":
        gain = library_gain(rows, cols)
        choice = choice._replace(library="mkl" if gain >= GAIN else "onednn", library_gain=gain)
    if choice.dtype == "bfloat16":
        with multiplied_by(choice.library):
            gain = dtype_gain(rows, cols)
        choice = choice._replace(dtype="float32" if gain >= GAIN else "bfloat16", dtype_gain=gain)
    return choice


def library_gain(rows: int, cols: int) -> float:
    """How many times as fast MKL multiplies as oneDNN: a layer with a ``[rows, cols]`` weight, and its gradients.

    0 for products too small for their times to tell, or for the library to matter.
    """
    if TOKENS * rows * cols < 16 * SMALL:
        return 0.0
    x, weight, grad = _drawn(TOKENS, cols), _drawn(rows, cols), _drawn(TOKENS, rows)
    with multiplied_by("onednn"):  # the first call of a process sets the operator up, in up to a second
        product(_drawn(128, 128), _drawn(128, 128))

    def layer(library: Library) -> Callable[[], object]:
        def call() -> None:
            with multiplied_by(library):
                product(x, weight.mT), product(grad, weight), product(grad.mT, x)

        return call

    return ratio_of(layer("onednn"), layer("mkl"))


def dtype_gain(rows: int, cols: int) -> float:
    """How many times as fast one step of Newton-Schulz on a ``[rows, cols]`` matrix is in fp32 as it is in bf16."""
    matrix = _drawn(rows, cols)

    def step(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: newton_schulz(matrix, steps=1, dtype=dtype)

    return ratio_of(step(torch.bfloat16), step(torch.float32))


def _drawn(rows: int, cols: int) -> torch.Tensor:
    """A matrix of noise; the process's own random numbers stay as they are."""
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


@contextmanager
def multiplied_by(library: Library) -> Iterator[None]:
    """Within it ``library`` multiplies fp32 matrices."""
    before = fp32_library()
    multiply_fp32_by(library)
    try:
        yield
    finally:
        multiply_fp32_by(before)


def ratio_of(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Median time of ``first`` over that of ``second``, in alternation, after one call of each to warm up."""
    began = time.perf_counter()
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < 3 or (len(times[0]) < ROUNDS and time.perf_counter() - began < SECONDS):
        for call, seconds in zip((first, second), times, strict=True):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return median(times[0]) / median(times[1])


def _machine(rows: int, cols: int) -> str:
    """What a measurement holds for: processor, threads, version of torch, shape."""
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line for line in lines if line.startswith("model name")), "")
    parts = (model, os.cpu_count(), torch.get_num_threads(), torch.__version__, rows, cols)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
