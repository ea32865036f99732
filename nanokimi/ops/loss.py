"""Cross-entropy and log-probabilities over a large vocabulary, without ever holding the logits of the whole batch.

Rows are taken in chunks. The gradient of the mean cross-entropy is known as soon as a chunk's logits are: both are made
together, in the forward pass. That of single log-probabilities is not, so their logits are computed again for it.

Letters: n rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanokimi.ops.products import as_multiplied, at_least_fp32, product

IGNORED = -100  # the label of a row that does not count, as in torch
ROWS_PER_CHUNK = 512  # 100 MB of fp32 logits with a vocabulary of 49,152
CPU_STRIP = 4096  # entries of the vocabulary whose gradients are multiplied at once, so that the operands fit a cache


def reference_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """``log softmax(logits)[label]`` of each row ``[n, V]``, in fp32 or better; 0 where the label is ``IGNORED``."""
    return -F.cross_entropy(at_least_fp32(logits), labels, ignore_index=IGNORED, reduction="none")


def log_probabilities_by(head: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """``reference_log_probabilities`` of ``head(x)`` ``[n]``, for any ``head`` from ``[n, D]`` to ``[n, V]``.

    The head is called for a chunk of rows at a time, and once more for the gradient.
    """

    def of_chunk(rows: Tensor, targets: Tensor) -> Tensor:
        return reference_log_probabilities(head(rows), targets)

    chunks = zip(x.split(ROWS_PER_CHUNK), labels.split(ROWS_PER_CHUNK), strict=True)
    return torch.cat([checkpoint(of_chunk, rows, targets, use_reentrant=False) for rows, targets in chunks])


def linear_log_probabilities(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``reference_log_probabilities`` of the logits ``x Wᵀ``: ``[n]``, differentiable.

    Args:
        x: ``[n, D]``.
        weight: ``[V, D]``.
        labels: int64 ``[n]``.
    """
    out: Tensor = _LinearLogProbabilities.apply(as_multiplied(x), as_multiplied(weight), labels)  # type: ignore[no-untyped-call]
    return out


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, count: float | Tensor) -> Tensor:
    """The sum of ``-linear_log_probabilities``, divided by ``count``: a scalar, in nats.

    Args:
        count: what a mean is taken over, a number or a scalar; with that of a whole step, the sum of the results of its
            parts is the step's mean.
    """
    x, weight = as_multiplied(x), as_multiplied(weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, labels, count)  # type: ignore[no-untyped-call]
        return loss
    return torch.stack([chunk.losses.sum() for chunk in _chunks(x, weight, labels)]).sum() / count


class _Chunk(NamedTuple):
    """Some rows and what their logits say.

    Attributes:
        rows: which of all.
        x: ``[m, D]``.
        at_targets: index of the targets' logits in ``[V, m]``; of ignored rows the first one's.
        ignored: ``[m]`` bool.
        exponentials: of the logits less the largest, ``[V, m]``: transposed, so that the left operand of the product
            that is the gradient of the weight is contiguous (see ``product``).
        totals: their sums, ``[m]``.
        losses: ``[m]``.
    """

    rows: slice
    x: Tensor
    at_targets: tuple[Tensor, Tensor]
    ignored: Tensor
    exponentials: Tensor
    totals: Tensor
    losses: Tensor


def _chunks(x: Tensor, weight: Tensor, labels: Tensor) -> Iterator[_Chunk]:
    for start in range(0, len(x), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        ignored = labels[rows] == IGNORED
        targets = labels[rows].masked_fill(ignored, 0)
        logits = at_least_fp32(product(weight, x[rows].mT))
        largest = logits.amax(dim=0)
        chosen = logits.gather(0, targets.unsqueeze(0)).squeeze(0) - largest
        exponentials = logits.sub_(largest).exp_()  # in place: a chunk's logits are the largest tensor of the loss
        totals = exponentials.sum(dim=0)
        losses = (totals.log() - chosen).masked_fill(ignored, 0)
        at_targets = (targets, torch.arange(len(targets), device=x.device))
        yield _Chunk(rows, x[rows], at_targets, ignored, exponentials, totals, losses)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss; the gradients of ``x`` and ``weight`` are computed with it, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, count: float | Tensor) -> Tensor:
        losses, gradients = [], _Gradients(x, weight)
        for chunk in _chunks(x, weight, labels):
            losses.append(chunk.losses.sum())
            grad = chunk.exponentials.div_((chunk.totals * count).masked_fill(chunk.ignored, torch.inf))
            grad[chunk.at_targets] -= (~chunk.ignored).to(grad.dtype) / count
            gradients.add(chunk, grad)
        ctx.save_for_backward(gradients.of_x, gradients.of_weight.to(weight.dtype))
        return torch.stack(losses).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_x, of_weight = ctx.saved_tensors
        return of_x * grad.to(of_x.dtype), of_weight * grad.to(of_weight.dtype), None, None


class _LinearLogProbabilities(torch.autograd.Function):
    """Keeps nothing but its operands, and computes the logits again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, labels)
        return -torch.cat([chunk.losses for chunk in _chunks(x, weight, labels)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, labels = ctx.saved_tensors
        gradients = _Gradients(x, weight)
        for chunk in _chunks(x, weight, labels):
            own = grad[chunk.rows].masked_fill(chunk.ignored, 0)
            by_logit = chunk.exponentials.mul_(-own / chunk.totals)
            by_logit[chunk.at_targets] += own
            gradients.add(chunk, by_logit)
        return gradients.of_x, gradients.of_weight.to(weight.dtype), None


class _Gradients:
    """Those of ``x`` and ``weight``, filled chunk by chunk; that of the weight in fp32 or better."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.weight, self.of_x = weight, torch.empty_like(x)
        self.of_weight = torch.empty(weight.shape, dtype=at_least_fp32(weight[:0]).dtype, device=weight.device)

    def add(self, chunk: _Chunk, by_logit: Tensor) -> None:
        """``by_logit``: the gradient of the chunk's logits, ``[V, m]``."""
        self.of_x[chunk.rows] = torch.ops.nanokimi.logit_gradients(
            by_logit.to(chunk.x.dtype), chunk.x, self.weight, self.of_weight, chunk.rows.start == 0
        )


@torch.library.custom_op("nanokimi::logit_gradients", mutates_args=("grad_weight",))
def _logit_gradients(grad: Tensor, rows: Tensor, weight: Tensor, grad_weight: Tensor, first: bool) -> Tensor:
    """From the gradient of logits ``[V, n]`` that of ``rows`` ``[n, D]``; adds (``first``: writes) that of ``weight``.

    On a CPU a strip of the vocabulary at a time: neither a transposed copy of the weight nor a second gradient of its
    size is made. An operator of its own: torch.compile would copy the whole gradient for each strip.
    """
    grad_rows = torch.zeros_like(rows, dtype=grad_weight.dtype)
    step = CPU_STRIP if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), step):
        strip = slice(start, start + step)
        part = product(grad[strip], rows)
        grad_weight[strip] = part if first else grad_weight[strip] + part
        grad_rows += product(grad[strip].mT, weight[strip])
    return grad_rows.to(rows.dtype)


@_logit_gradients.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, grad_weight: Tensor, first: bool) -> Tensor:
    return torch.empty_like(rows)
