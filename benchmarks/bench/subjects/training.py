"""A training step at a preset's shape: ours, in parts and whole, and transformers' forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench.clock import seconds
from benchmarks.bench.subjects.peers import deepseek_v3
from benchmarks.bench.subjects.shapes import (
    SEED,
    as_training_does,
    model_of,
    random_batch,
    random_tokens,
    train_config,
    use,
)
from nanokimi.config import ModelConfig
from nanokimi.data.batch import Batch
from nanokimi.data.loader import BatchLoader, LoaderOptions
from nanokimi.optim.optimizers import make_optimizer
from nanokimi.optim.qk_clip import qk_clip_
from nanokimi.training.step import TrainingStep

BATCHES = 64  # of random tokens, for the loader


class Network:
    """Our training step, as ``nanokimi train`` takes it.

    Args:
        preset: the shape.
        batch_size, context: B and T of the one micro-batch.
        compiled: as for ``--compile``.
    """

    def __init__(self, preset: str, batch_size: int, context: int, compiled: str, device: str, threads: int) -> None:
        self.device = use(device, threads)
        as_training_does(self.device)
        self.config = train_config(preset, compiled, batch_size)
        self.model = model_of(preset, self.device, max_seq_length=context)
        self.optimizer = make_optimizer(self.model, self.config)
        self.step = TrainingStep(self.model, self.optimizer, self.config, self.device)
        self.batch = random_batch(self.model.config, batch_size, context)
        self._loader: Iterator[Batch] | None = None

    def passes(self) -> dict[str, Any]:
        """Forward and backward."""
        taken = seconds(lambda: self.step.accumulate(repeat(self.batch)), self.device)
        self.step.clear()
        return {"seconds": taken}

    def whole(self, tau: float) -> dict[str, Any]:
        """All of a step, with QK-Clip at ``tau``; 0 switches it off."""
        self.optimizer.tau = tau
        return {"seconds": seconds(lambda: self.step(repeat(self.batch)), self.device)}

    def clip(self) -> dict[str, Any]:
        """QK-Clip alone, every head over the limit."""
        rows = self.model.qk_rows()
        logits = torch.full_like(self.model.max_logits, 1.001)
        return {"seconds": seconds(lambda: qk_clip_(rows, logits, 1.0), self.device)}

    def data(self) -> dict[str, Any]:
        """The next batch of the loader, from tokens in memory."""
        if self._loader is None:
            batch_size, context = self.batch.tokens.shape
            tokens = random_tokens(self.model.config, BATCHES * batch_size * context + 1).numpy().astype(np.uint16)
            self._loader = iter(BatchLoader(tokens, LoaderOptions(context, batch_size, SEED)))
        loader = self._loader
        return {"seconds": seconds(lambda: next(loader), torch.device("cpu"))}


class Reference:
    """transformers' forward and backward pass at the same shape, in fp32; on CUDA under bf16 autocast, as ours.

    Args:
        weights: ``bf16`` keeps the weights themselves in it, which autocast does not.
    """

    def __init__(
        self, preset: str, batch_size: int, context: int, device: str, threads: int, weights: str = "fp32"
    ) -> None:
        self.device = use(device, threads)
        config = ModelConfig.preset(preset, max_seq_length=context)
        self.model = deepseek_v3(config, self.device).train()
        if weights == "bf16":
            self.model.bfloat16()
        self.autocast = self.device.type == "cuda" and weights == "fp32"
        self.tokens = random_tokens(config, batch_size, context).to(self.device)

    def passes(self) -> dict[str, Any]:
        """Forward and backward."""
        taken = seconds(forward_and_backward(self.model, self.tokens, self.autocast), self.device)
        self.model.zero_grad()
        return {"seconds": taken}


def forward_and_backward(model: Any, tokens: Tensor, autocast: bool) -> Callable[[], None]:
    """transformers' own loss over ``tokens`` ``[B, T]``; it shifts the labels itself."""

    def work() -> None:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=autocast):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return work
