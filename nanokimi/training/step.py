"""One training step: forward and backward over the micro-batches, one look at what they showed, one update.

The parts are apart so that each can be timed on its own; called, a step is all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanokimi.config import TrainConfig
from nanokimi.device import has_fast_bf16
from nanokimi.model.transformer import Losses, Transformer, document_numbers
from nanokimi.optim.muonclip import MuonClip
from nanokimi.parallel.layout import share_of_step
from nanokimi.parallel.spread import Alone, Spread
from nanokimi.training.compilation import compiles, failed_to_compile, without_compiler


class StepReading(NamedTuple):
    """What one step showed, on the host."""

    cross_entropy: float
    balance_loss: float
    grad_norm: float
    max_logits: list[list[float]]  # [L][H]
    expert_counts: list[list[float]]  # [MoE layers][E]

    @property
    def finite(self) -> bool:
        """Whether losses, gradients and attention logits can be trusted."""
        logits = (x for heads in self.max_logits for x in heads)
        return all(map(math.isfinite, (self.cross_entropy, self.balance_loss, self.grad_norm, *logits)))


def make_optimizer(model: Transformer, config: TrainConfig, spread: Spread | None = None) -> MuonClip:
    """The optimizer of a run."""
    return MuonClip(
        model, config.learning_rate, adam_lr=config.adam_lr, momentum=config.momentum,
        weight_decay=config.weight_decay, adjust_lr_fn=config.adjust_lr_fn, tau=config.qk_clip_tau,
        shards=spread.shards if spread is not None else None,
    )  # fmt: skip


class TrainingStep:
    """Repeats one step on whatever batches it is given: int64 ``[B, T + 1]``, inputs and labels in one.

    Args:
        model: on ``device``; what it notes of a step (``max_logits``, ``expert_counts``) is read and forgotten here.
        eot_id: the end-of-text token, by which ``config.mask_documents`` tells documents apart.
        spread: how the model lies on several ranks; None is one process.

    Attributes:
        parts: how a step is cut into passes.
        loss: ``model.loss``, compiled where the config says so.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: MuonClip,
        config: TrainConfig,
        device: torch.device,
        *,
        eot_id: int = -1,
        spread: Spread | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.device, self.eot_id = model, optimizer, config, device, eot_id
        self.spread: Spread = spread or Alone(model)
        self.parts = share_of_step(config.batch_size, config.gradient_accumulation, self.spread.ranks.size)
        self.loss: Callable[..., Losses] = self.spread.loss(compiles(config, model, device))
        self._proven = False  # a first pass went well
        model.checkpointing = config.activation_checkpointing

    def __call__(self, batches: Iterator[Tensor]) -> tuple[StepReading, int]:
        """All of a step; the weights stay as they are unless all of it is finite.

        Returns:
            what it showed, and the number of tokens it learned from.
        """
        losses, tokens = self.accumulate(batches)
        norm = self.clip_gradients()
        seen = self.read(self.spread.share(losses), norm)
        if seen.finite:
            self.update()
        self.clear()
        return seen, tokens * self.spread.ranks.size

    def accumulate(self, batches: Iterator[Tensor]) -> tuple[Tensor, int]:
        """Forward and backward over all micro-batches; their mean losses ``[2]`` and the number of tokens."""
        means = torch.zeros(2, device=self.device)
        tokens = 0
        self.model.train()
        passes = self.parts.passes
        for number in range(passes):
            batch = next(batches).to(self.device, non_blocking=True)
            with self.spread.passing(last=number == passes - 1):
                means += self._forward_and_backward(batch, passes) / passes
            tokens += batch[:, 1:].numel()
        return means, tokens

    def _forward_and_backward(self, batch: Tensor, parts: int) -> Tensor:
        """Adds the gradients of one micro-batch out of ``parts``; its losses ``[2]``."""
        try:
            losses = self._passes(batch, parts)
        except Exception as error:
            if self._proven or not failed_to_compile(error):
                raise
            self.loss = without_compiler(error, self.config, self.spread)
            self.clear()
            losses = self._passes(batch, parts)
        self._proven = True
        return losses

    def _passes(self, batch: Tensor, parts: int) -> Tensor:
        arguments: tuple[Tensor, ...] = (batch[:, :-1], batch[:, 1:])
        if self.config.mask_documents:
            arguments += (document_numbers(batch[:, :-1], self.eot_id),)
        with self.autocast():
            losses = self.loss(*arguments)
        ((losses.cross_entropy + losses.balance) / parts).backward()
        return torch.stack(losses).detach()

    def clip_gradients(self) -> Tensor:
        """Scales the gradients down to ``max_grad_norm``; returns the norm that they had, a scalar."""
        return self.spread.clip_gradients(self.config.max_grad_norm or math.inf)

    def read(self, losses: Tensor, norm: Tensor) -> StepReading:
        """Brings all that the host needs of a step over at once: the step's one wait for the device."""
        model, layers = self.model, self.model.config.n_layers
        numbers = (losses, norm.view(1), model.max_logits.flatten(), model.expert_counts.flatten())
        values = torch.cat([number.to(torch.float64) for number in numbers]).tolist()
        heads, experts = model.config.n_heads, model.config.n_routed_experts
        logits, counts = values[3 : 3 + layers * heads], values[3 + layers * heads :]
        cross_entropy, balance_loss, grad_norm = values[:3]
        return StepReading(cross_entropy, balance_loss, grad_norm, _rows(logits, heads), _rows(counts, experts))

    def update(self) -> None:
        """Moves the weights, with QK-Clip, and the balance biases."""
        self.optimizer.step()
        self.model.update_balance()

    def clear(self) -> None:
        """Drops the gradients and what the model noted."""
        self.optimizer.zero_grad()
        self.model.reset_stats()

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        mode = self.config.mixed_precision
        enabled = mode == "on" or (mode == "auto" and has_fast_bf16(self.device))
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def _rows(values: list[float], width: int) -> list[list[float]]:
    return [values[i : i + width] for i in range(0, len(values), width)]
