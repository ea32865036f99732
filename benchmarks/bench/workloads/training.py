"""Training at a preset's shape: steps, optimizers, peak memory and growth, ours and those of transformers and torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench.workloads.peers import LR, MuonAndAdamW, deepseek_v3, random_gradients
from benchmarks.bench.workloads.setup import (
    SEED,
    as_training_does,
    model_of,
    peak_bytes,
    random_batch,
    random_tokens,
    seconds,
    train_config,
    use,
)
from nanokimi.config import ModelConfig
from nanokimi.data.batch import Batch
from nanokimi.data.loader import BatchLoader, LoaderOptions
from nanokimi.optim.muonclip import make_optimizer
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


class Optimizer:
    """An optimizer over the weights of a preset, with random gradients.

    Args:
        kind: ``muonclip``, ``muon`` (torch.optim.Muon and AdamW), ``adamw_fused`` or ``adamw_foreach``.
    """

    def __init__(self, preset: str, kind: str, device: str, threads: int) -> None:
        self.device = use(device, threads)
        if kind == "muonclip":
            as_training_does(self.device)
        model = model_of(preset, self.device)
        random_gradients(model.parameters())
        model.max_logits.fill_(1.0)
        makers: dict[str, Callable[[], Any]] = {
            "muonclip": lambda: make_optimizer(model, train_config(preset, "off", 1)),
            "muon": lambda: MuonAndAdamW(model.named_parameters()),
            "adamw_fused": lambda: torch.optim.AdamW(model.parameters(), lr=LR, fused=True),
            "adamw_foreach": lambda: torch.optim.AdamW(model.parameters(), lr=LR, foreach=True),
        }
        self.optimizer = makers[kind]()

    def step(self) -> dict[str, Any]:
        """One update."""
        return {"seconds": seconds(self.optimizer.step, self.device)}

    def is_slow(self) -> dict[str, Any]:
        """See ``MuonAndAdamW.is_slow``."""
        return {"slow": self.optimizer.is_slow()}

    def extrapolate(self) -> dict[str, Any]:
        """See ``MuonAndAdamW.extrapolated``."""
        return {"seconds": self.optimizer.extrapolated(self.device)}


STEPS = 4  # the later ones meet the optimizer's state and what the allocator kept


class Memory:
    """A training run in a process of its own, measured once.

    Args:
        kind: ``nanokimi``, or ``transformers`` with torch.optim.Muon and AdamW.
        compiled, checkpointing: ours, as for ``--compile`` and ``--activation_checkpointing``.
    """

    def __init__(
        self,
        preset: str,
        batch_size: int,
        context: int,
        kind: str,
        device: str,
        threads: int,
        compiled: str = "off",
        checkpointing: bool = False,
    ) -> None:
        self.device = use(device, threads)
        self.preset, self.batch_size, self.context = preset, batch_size, context
        self.compiled, self.checkpointing = compiled, checkpointing
        self.run = {"nanokimi": self._ours, "transformers": self._theirs}[kind]
        if kind == "transformers":
            import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")  # before the baseline, as all imports
        self.imports = peak_bytes(self.device)

    def measure(self) -> dict[str, Any]:
        """Bytes at the peak, those of the imports, and whether Muon stepped for a single matrix only."""
        partial = self.run()
        return {"bytes": peak_bytes(self.device), "imports": self.imports, "partial": partial}

    def _ours(self) -> bool:
        as_training_does(self.device)
        model = model_of(self.preset, self.device, max_seq_length=self.context)
        config = train_config(self.preset, self.compiled, self.batch_size)
        config = replace(config, activation_checkpointing=self.checkpointing)
        step = TrainingStep(model, make_optimizer(model, config), config, self.device)
        batch = random_batch(model.config, self.batch_size, self.context)
        for _ in range(STEPS):
            step(repeat(batch))
        return False

    def _theirs(self) -> bool:
        config = ModelConfig.preset(self.preset, max_seq_length=self.context)
        model = deepseek_v3(config, self.device).train()
        tokens = random_tokens(config, self.batch_size, self.context).to(self.device)
        passes = forward_and_backward(model, tokens, self.device.type == "cuda")
        optimizer, slow = MuonAndAdamW(model.named_parameters()), None
        for _ in range(STEPS):
            passes()
            slow = optimizer.is_slow() if slow is None else slow
            (optimizer.step_largest if slow else optimizer.step)()
            model.zero_grad()
        return bool(slow)


class Growth:
    """Forward and backward passes of changing size, eager; asked from small to large, for memory only ever grows."""

    def __init__(self, preset: str, device: str, threads: int) -> None:
        self.device, self.preset = use(device, threads), preset
        as_training_does(self.device)
        self.imports = peak_bytes(self.device)

    def passes(self, batch_size: int, context: int, repeats: int, **overrides: Any) -> dict[str, Any]:
        """Median seconds of ``repeats`` passes after one to warm up, and the peak of memory above the imports."""
        model = model_of(self.preset, self.device, max_seq_length=context, **overrides)
        config = train_config(self.preset, "off", batch_size)
        step = TrainingStep(model, make_optimizer(model, config), config, self.device)
        batch = random_batch(model.config, batch_size, context)
        taken = []
        for _ in range(repeats + 1):
            taken.append(seconds(lambda: step.accumulate(repeat(batch)), self.device))
            step.clear()
        return {"seconds": statistics.median(taken[1:]), "bytes": peak_bytes(self.device) - self.imports}
