"""One training step, the compiler that may speed it up, and evaluation on held-out text.

A step is forward and backward over the micro-batches, one look at what they showed, one update. Its parts are functions
of their own, so that each can be timed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from nanokimi.config import TrainConfig
from nanokimi.console import log
from nanokimi.data.batch import Batch, PackedSequences
from nanokimi.data.loader import evenly_spread
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.device import compiles_well, has_fast_bf16
from nanokimi.errors import RunError
from nanokimi.model.transformer import Losses, Transformer
from nanokimi.optim.muonclip import MuonClip
from nanokimi.parallel.layout import share_of_step
from nanokimi.parallel.ranks import ParallelModel, Ranks, SingleDevice, current_ranks

# On a CPU compiling takes a minute or more. A pass is then 1.07 times (nano-243m) or 1.4 times (tiny) as fast, which
# has paid off after 1e14 or 2e13 floating-point operations. Runs that are a few times as long are compiled.
WORTH_FLOPS = 3e14
FLOPS_PER_SECOND = 1e11  # about what two cores reach; turns a limit of seconds into floating-point operations

WINDOW = 128  # steps that SpikeWatch looks back on; the smallest number from which it judges is half of it
DEVIATIONS = 6.0

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
    spike: bool = False  # it stands out among the steps before
    skipped: bool = False  # it did not touch the weights

    @property
    def finite(self) -> bool:
        """Whether losses, gradients and attention logits can be trusted."""
        finite = map(math.isfinite, (self.cross_entropy, self.balance_loss, self.grad_norm))
        return all(finite) and all(logit < math.inf for heads in self.max_logits for logit in heads)


class SpikeWatch:
    """Compares loss and gradient norm of each step with those of the last ``WINDOW`` finite steps.

    A spike enters the window like any other step: should the loss stay where it jumped to, that is normal soon, and a
    guard never locks a run out (as in OLMo-core's ``SkipStepOptimizer``).

    Args:
        earlier: loss and gradient norm of the steps before, in their order; None where one was not finite.
    """

    def __init__(self, earlier: Iterable[tuple[float | None, float | None]] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        for loss, norm in earlier:
            if loss is not None and norm is not None:
                self._note(loss, norm)

    def __call__(self, loss: float, norm: float) -> bool:
        """Whether one of two finite numbers lies more than ``DEVIATIONS`` standard deviations over its window."""
        spike = _stands_out(loss, self._losses) or _stands_out(norm, self._norms)
        self._note(loss, norm)
        return spike

    def _note(self, loss: float, norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(norm)


def _stands_out(value: float, window: deque[float]) -> bool:
    if len(window) < WINDOW // 2:
        return False
    mean = math.fsum(window) / len(window)
    variance = math.fsum((x - mean) ** 2 for x in window) / (len(window) - 1)
    return value > mean + DEVIATIONS * math.sqrt(variance)


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
        spikes: what the steps before were like; a resume puts that of the run there.
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
        self.spikes = SpikeWatch()
        self._proven = False  # a first pass went well
        model.checkpointing = config.activation_checkpointing

    def __call__(self, batches: Iterator[Batch]) -> StepReading:
        """All of a step, which leaves the weights as they are if it is to be skipped. Returns what it showed."""
        losses, labels = self.accumulate(batches)
        norm = self.clip_gradients()
        seen = self.judge(self.read(losses, labels, norm))
        if not seen.skipped:
            self.optimizer.step()
        self.clear()
        return seen

    def judge(self, seen: StepReading) -> StepReading:
        """``seen`` with ``spike`` and ``skipped``; it enters the window of the steps to come."""
        guarded, spike = self.config.spike_guard, seen.finite and self.spikes(seen.cross_entropy, seen.grad_norm)
        if guarded:  # a last bit in which their gradient norms differ must not part the ranks
            spike = bool(self.parallel.ranks.max([spike])[0])
        return seen._replace(spike=spike, skipped=not seen.finite or (guarded and spike))

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


# ---- the compiler -------------------------------------------------------------------------------


def compiles(config: TrainConfig, model: Transformer, device: torch.device) -> bool:
    """Whether this run compiles; it follows from the settings alone, so that a resume decides the same."""
    if config.compile != "auto":
        return config.compile == "on"
    if device.type == "cpu":
        return planned_flops(config, model) >= WORTH_FLOPS and _has_cpp_compiler()
    return compiles_well(device)


def planned_flops(config: TrainConfig, model: Transformer) -> float:
    """Floating-point operations of the whole run: 6 per token and active weight, the embedding left out."""
    sequences = config.max_steps * config.batch_size * config.gradient_accumulation
    weights = model.num_parameters(active=True) - model.embed.weight.numel()
    flops = 6.0 * weights * sequences * model.config.max_seq_length
    return min(flops, config.max_seconds * FLOPS_PER_SECOND) if config.max_seconds else flops


def _has_cpp_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def failed_to_compile(error: Exception) -> bool:
    """Whether ``error`` comes from the compiler and not from the model."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return isinstance(error, (TorchDynamoException, CppCompileError, InvalidCxxCompiler))


def without_compiler(error: Exception, config: TrainConfig, model: ParallelModel) -> nn.Module:
    """The model without the compiler, after a line that says so.

    Raises:
        RunError: the user asked for ``--compile on``; or other ranks are in the middle of the same pass.
    """
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:200]
    if config.compile == "on":
        raise RunError(f"--compile on: torch.compile failed ({reason}): use --compile off, or auto") from error
    if model.layout.mode != "one":
        raise RunError(f"torch.compile failed ({reason}): use --compile off") from error
    log(f"note: torch.compile failed ({reason}): training goes on without it")
    return model.training_module(compiled=False)


# ---- evaluation ---------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """Nats per token, and bits per byte of text: the measure that does not depend on the tokenizer."""

    loss: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(
    model: Transformer,
    sequences: PackedSequences,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    max_tokens: int = 0,
    precision: AbstractContextManager[object] | None = None,
    mask_documents: bool = False,
) -> HeldOut:
    """Predicts every token of ``sequences`` once, or ``max_tokens`` of them evenly spread over the text.

    End-of-text tokens stand for no bytes; what it costs to predict them is counted. The ranks of a run share the
    batches; one that has fewer computes one again, uncounted, for a sharded model is gathered by all of them.

    Args:
        precision: an autocast context for the forward passes.
        mask_documents: tokens attend within their document only, as they did in training.
    """
    ranks = current_ranks()
    device, was_training = next(model.parameters()).device, model.training
    chosen = evenly_spread(len(sequences), max(1, max_tokens // sequences.length) if max_tokens else 0)
    nats, tokens, text_bytes = 0.0, 0, 0
    model.eval()
    with precision or nullcontext():
        for numbers, counts in _shared(chosen, batch_size, ranks):
            rows = torch.from_numpy(sequences.batch(numbers)).long()
            batch = Batch.of_rows(rows, tokenizer.eot_id if mask_documents else None).to(device)
            summed = model(batch.tokens, batch.labels, documents=batch.documents, label_count=1).cross_entropy.item()
            if counts:
                nats += summed
                tokens += batch.labels.numel()
                text_bytes += tokenizer.count_bytes(rows[:, 1:])
    model.train(was_training)
    all_nats, all_tokens, all_bytes = ranks.sum([nats, tokens, text_bytes])
    return HeldOut(all_nats / all_tokens, all_nats / math.log(2) / max(1, all_bytes))


def _shared(chosen: list[int], batch_size: int, ranks: Ranks) -> Iterator[tuple[list[int], bool]]:
    """This rank's batches of the numbers ``chosen``, as many as every rank has; whether each counts."""
    batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    for first in range(0, len(batches), ranks.size):
        number = first + ranks.rank
        yield batches[min(number, len(batches) - 1)], number < len(batches)
