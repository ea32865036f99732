"""Which device a command runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from nanokimi.errors import RunError, UserError


@cache
def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 autocast makes the device faster: CUDA devices that have bf16 in hardware."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compiles_well(device: torch.device) -> bool:
    """Whether torch.compile can be used: its code generator needs a CUDA device of capability 7.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def own_cores() -> int:
    """Cores on which this process may run, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Turns torch's out-of-memory errors into a RunError that says what to lower."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU has no type of its own
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "Storage size" in text:
            raise RunError(
                "out of memory: lower --batch_size (in training raise --gradient_accumulation, or add "
                "--activation_checkpointing), --set max_seq_length=... or choose a smaller --preset; "
                "saved checkpoints are intact"
            ) from error
        raise


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        UserError: there is no such device on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: unknown; choose auto, cpu, cuda, cuda:N or mps")
    missing = {
        "cpu": False,
        "cuda": (device.index or 0) >= torch.cuda.device_count(),
        "mps": not torch.backends.mps.is_available(),
    }
    if missing[device.type]:
        raise UserError(f"--device {name}: not available on this machine; use --device cpu or auto")
    return device
