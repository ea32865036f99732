"""One training step: forward and backward over the micro-batches, one look at what they showed, one update.

The parts are apart so that each can be timed on its own; called, a step is all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from nanokimi.config import TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.device import has_fast_bf16
from nanokimi.model.transformer import Losses, Transformer
from nanokimi.optim.muonclip import MuonClip
from nanokimi.parallel.layout import share_of_step
from nanokimi.parallel.ranks import ParallelModel, SingleDevice
from nanokimi.training.compilation import compiles, failed_to_compile, without_compiler

Objective: TypeAlias = Callable[[nn.Module, Batch], Losses]


def cross_entropy(model: nn.Module, batch: Batch) -> Losses:
    """The objective of pre-training: to predict the labels."""
    losses: Losses = model(batch.tokens, batch.labels, documents=batch.documents, label_count=batch.label_count)
    return losses


class StepReading(NamedTuple):
    """What one step showed, on the host."""

    cross_entropy: float
    balance_loss: float
    grad_norm: float
    tokens: int  # that were predicted
    max_logits: list[list[float]]  # [L][H]; -inf where nothing was predicted
    expert_counts: list[list[float]]  # [MoE layers][E]

    @property
    def finite(self) -> bool:
        """Whether losses, gradients and attention logits can be trusted."""
        finite = map(math.isfinite, (self.cross_entropy, self.balance_loss, self.grad_norm))
        return all(finite) and all(logit < math.inf for heads in self.max_logits for logit in heads)


class TrainingStep:
    """Repeats one step on whatever batches it is given.

    Args:
        model: on ``device``; what it notes of a step (``max_logits``, ``expert_counts``) is read and forgotten here.
        parallel: the model as it lies on several ranks; None is one process.
        objective: the losses of a batch, whose sum is minimised: summed over labels and divided by the batch's
            ``label_count``, which is such that the step's gradient is that of the mean over all its labels, in
            whatever passes and on whatever ranks they lie.

    Attributes:
        parts: how a step is cut into passes.
        module: ``model`` as the objective calls it: compiled where the config says so, wrapped for its ranks.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: MuonClip,
        config: TrainConfig,
        device: torch.device,
        *,
        parallel: ParallelModel | None = None,
        objective: Objective = cross_entropy,
    ) -> None:
        self.model, self.optimizer, self.config, self.device = model, optimizer, config, device
        self.objective = objective
        self.parallel: ParallelModel = parallel or SingleDevice(model)
        self.parts = share_of_step(config.batch_size, config.gradient_accumulation, self.parallel.ranks.size)
        self.module: nn.Module = self.parallel.training_module(compiles(config, model, device))
        self._proven = False  # a first pass went well
        model.checkpointing = config.activation_checkpointing

    def __call__(self, batches: Iterator[Batch]) -> StepReading:
        """All of a step; the weights stay as they are unless all of it is finite. Returns what it showed."""
        losses, labels = self.accumulate(batches)
        norm = self.clip_gradients()
        seen = self.read(losses, labels, norm)
        if seen.finite:
            self.optimizer.step()
        self.clear()
        return seen

    def accumulate(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """Forward and backward over all micro-batches.

        Returns:
            this rank's part of the mean losses ``[2]``, and the number of labels of all ranks, a scalar.
        """
        micro_batches = [next(batches) for _ in range(self.parts.passes)]
        own = sum(batch.counted() for batch in micro_batches)
        labels = self.parallel.all_reduce(torch.full((), own, dtype=torch.float64, device=self.device))
        label_count = (labels / self.parallel.ranks.size).clamp(min=1)  # the gradients are averaged over the ranks
        losses = torch.zeros(2, device=self.device)
        self.model.train()
        for number, batch in enumerate(micro_batches, start=1):
            with self.parallel.micro_batch(last=number == len(micro_batches)):
                losses += self._forward_and_backward(batch.to(self.device)._replace(label_count=label_count))
        return losses / self.parallel.ranks.size, labels

    def _forward_and_backward(self, batch: Batch) -> Tensor:
        """Adds the gradients of one micro-batch; its losses ``[2]``."""
        try:
            losses = self._pass(batch)
        except Exception as error:
            if self._proven or not failed_to_compile(error):
                raise
            self.module = without_compiler(error, self.config, self.parallel)
            self.clear()
            losses = self._pass(batch)
        self._proven = True
        return losses

    def _pass(self, batch: Batch) -> Tensor:
        with self.autocast():
            losses = self.objective(self.module, batch)
        losses.loss.backward()
        return torch.stack(losses).detach()

    def clip_gradients(self) -> Tensor:
        """Scales the gradients down to ``max_grad_norm``; returns the norm that they had, a scalar."""
        return self.parallel.clip_gradients(self.config.max_grad_norm or math.inf)

    def read(self, losses: Tensor, labels: Tensor, norm: Tensor) -> StepReading:
        """Brings all that the host needs of a step over at once: the step's one wait for the device."""
        self.optimizer.share_statistics()
        model, layers = self.model, self.model.config.n_layers
        mean = self.parallel.all_reduce(losses.double())
        numbers = (mean, norm.view(1), labels.view(1), model.max_logits.flatten(), model.expert_counts.flatten())
        values = torch.cat([number.to(torch.float64) for number in numbers]).tolist()
        heads, experts = model.config.n_heads, model.config.n_routed_experts
        logits, counts = values[4 : 4 + layers * heads], values[4 + layers * heads :]
        ce, balance, grad_norm, tokens = values[:4]
        return StepReading(ce, balance, grad_norm, int(tokens), _rows(logits, heads), _rows(counts, experts))

    def clear(self) -> None:
        """Drops the gradients and what the model noted."""
        self.optimizer.zero_grad()
        self.optimizer.skip_step()

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        mode = self.config.mixed_precision
        enabled = mode == "on" or (mode == "auto" and has_fast_bf16(self.device))
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def _rows(values: list[float], width: int) -> list[list[float]]:
    return [values[i : i + width] for i in range(0, len(values), width)]
