"""The chunked cross-entropy against torch's, and what it never holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanokimi.ops.loss import ROWS_PER_CHUNK, linear_cross_entropy, reference_log_probabilities


def reference(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -reference_log_probabilities(F.linear(x, weight), labels).mean()


def example(rows: int, vocab: int = 50, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 24, dtype=dtype, requires_grad=True)
    return x, weight, torch.randint(vocab, (rows,))


@pytest.mark.parametrize("rows", [1, 7, ROWS_PER_CHUNK, ROWS_PER_CHUNK + 1, 2 * ROWS_PER_CHUNK + 100])
def test_loss_and_gradients_are_those_of_the_whole_batch_at_once(rows: int) -> None:
    x, weight, labels = example(rows)
    ours, theirs = linear_cross_entropy(x, weight, labels, len(x)), reference(x, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(3 * theirs, (x, weight))
    torch.testing.assert_close(torch.autograd.grad(3 * ours, (x, weight)), expected, rtol=1e-9, atol=1e-12)


def test_without_gradients_the_loss_is_the_same() -> None:
    x, weight, labels = example(700)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, labels, len(x)), reference(x, weight, labels))


def test_fp32_stays_close_with_a_size_that_goes_to_onednn() -> None:
    x, weight, labels = example(600, vocab=500, dtype=torch.float32)
    ours = torch.autograd.grad(linear_cross_entropy(x, weight, labels, len(x)), (x, weight))
    theirs = torch.autograd.grad(reference(x.double(), weight.double(), labels), (x, weight))
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(here, there.float(), rtol=0, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    x, weight, labels = example(8, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(1e4 * x, weight, labels, len(x)), reference(1e4 * x, weight, labels)
        )


def test_a_logit_that_is_no_number_makes_the_loss_none() -> None:
    x, weight, labels = example(8)
    with torch.no_grad():
        x[3, 3] = torch.nan
    assert linear_cross_entropy(x, weight, labels, len(x)).isnan()


def test_under_autocast_products_are_in_half_precision_and_the_softmax_is_not() -> None:
    x, weight, labels = example(600, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels, len(x))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference(x, weight, labels), rtol=2e-2, atol=0)
    expected = torch.autograd.grad(reference(x, weight, labels), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), expected, rtol=0, atol=2e-3)


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_the_logits_of_the_whole_batch_never_exist() -> None:
    x, weight, labels = example(4 * ROWS_PER_CHUNK, vocab=300)
    with LargestTensor() as seen:
        linear_cross_entropy(x, weight, labels, len(x)).backward()
    assert seen.numel == 300 * ROWS_PER_CHUNK
