"""What workloads are made of: a preset's model, random tokens, a clock, and the memory that a process took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.memory import keep_freed_memory
from nanokimi.model.transformer import Transformer

SEED = 0


def use(device: str, threads: int) -> torch.device:
    """The device by its name, the threads set, the seed planted."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    return torch.device(device)


def as_training_does(device: torch.device) -> None:
    """What ``nanokimi train`` asks of the process before it begins; peers run as they come."""
    if device.type == "cpu":
        keep_freed_memory()


def model_of(preset: str, device: torch.device, **overrides: Any) -> Transformer:
    """A model of a preset's shape with the initial weights of ``SEED``."""
    torch.manual_seed(SEED)
    return Transformer(ModelConfig.preset(preset, **overrides)).to(device)


def random_tokens(config: ModelConfig, *shape: int) -> Tensor:
    """Ids from the whole vocabulary, int64 of ``shape``, on the CPU, the same in every process."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(SEED))


def random_batch(config: ModelConfig, batch_size: int, context: int) -> Batch:
    """Random tokens, and those that follow them, as a loader gives them: ``[B, T]`` on the CPU."""
    return Batch.of_rows(random_tokens(config, batch_size, context + 1))


def train_config(preset: str, compiled: str, batch_size: int) -> TrainConfig:
    """A run's settings: one micro-batch a step, ``compiled`` as for ``--compile``."""
    return TrainConfig(preset=preset, compile=compiled, batch_size=batch_size, gradient_accumulation=1)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes, all that it started on ``device`` included."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1000
    began = time.perf_counter()
    work()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - began


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process ever held: on CUDA of the device's, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells on Linux begins with the memory of the process that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
