"""Which precision and which library multiply fastest on this machine: measured, where a processor's flags mislead.

A processor may say that it multiplies bf16 and do so at half the speed of fp32, and either of MKL and oneDNN may be the
faster. So products of the shapes at hand are timed once per machine and version of torch, and the outcome is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from nanokimi.files import atomic_write
from nanokimi.ops.newton_schulz import best_dtype, newton_schulz

GAIN = 1.15  # by which another choice has to be faster, in the median, to replace the default
FIXED = "fixed"  # the value of NANOKIMI_PRODUCTS that forbids to measure
LARGEST = 1024  # rows and columns that are timed at most
ROUNDS, SECONDS = 7, 0.5  # of a measurement: at least three rounds, then as many as the time allows


class Choice(NamedTuple):
    """How Newton-Schulz multiplies on a CPU.

    Attributes:
        dtype: ``bfloat16`` or ``float32``.
        gain: how many times as fast the other one was when it was measured; 0 where nothing was.
    """

    dtype: str
    gain: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def default_choice(device: torch.device) -> Choice:
    """What the hardware's flags say."""
    return Choice(str(best_dtype(device)).removeprefix("torch."))


def machine_choice(shape: tuple[int, int], folder: Path, *, deterministic: bool = False) -> Choice:
    """The faster precision of Newton-Schulz on this CPU for matrices of ``shape``; measured unless ``folder`` knows it.

    ``deterministic``, and ``NANOKIMI_PRODUCTS=fixed`` in the environment, leave it to the processor's flags.
    """
    default = default_choice(torch.device("cpu"))
    fixed = deterministic or os.environ.get("NANOKIMI_PRODUCTS") == FIXED
    if fixed or default.torch_dtype == torch.float32:  # without the instructions bf16 is 23 to 41 times slower
        return default
    rows, cols = (min(side, LARGEST) for side in shape)
    path = folder / f"products-{_machine(rows, cols)}.json"
    with suppress(OSError, ValueError, TypeError):
        known = Choice(**json.loads(path.read_text(encoding="utf-8")))
        if known.dtype in ("bfloat16", "float32"):
            return known
    gain = measured_gain(rows, cols)
    choice = Choice("float32" if gain >= GAIN else default.dtype, gain)
    with suppress(OSError):  # then it is measured again the next time
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(choice._asdict()).encode())
    return choice


def measured_gain(rows: int, cols: int) -> float:
    """How many times as fast one step of Newton-Schulz on a ``[rows, cols]`` matrix is in fp32 as it is in bf16."""
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))

    def step(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: newton_schulz(matrix, steps=1, dtype=dtype)

    return ratio_of(step(torch.bfloat16), step(torch.float32))


def ratio_of(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Median time of ``first`` over that of ``second``, in alternation, after one call of each to warm up."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
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
