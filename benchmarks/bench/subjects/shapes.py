"""What the subjects are made of: a preset's model, random tokens, the configuration of a training step."""

from __future__ import annotations

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
