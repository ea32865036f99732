"""Products by groups, against a loop over the groups and torch's own."""

from __future__ import annotations

import pytest
import torch
from conftest import no_waiting
from torch import Tensor
from torch.nn import functional as F

from nanokimi.ops.grouped import grouped_linear, reference_grouped_linear

LENGTHS = [[40, 25, 35], [0, 100, 0], [100, 0, 0], [1, 98, 1], [50, 0, 50]]


def ends_of(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths).cumsum(0).int()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_and_their_gradients_are_those_of_a_loop(lengths: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(100, 96, dtype=dtype, requires_grad=True)
    weights = torch.randn(3, 256, 96, dtype=dtype, requires_grad=True)
    grad = torch.randn(100, 256, dtype=dtype)
    ends = ends_of(lengths)
    out, expected = grouped_linear(x, weights, ends), reference_grouped_linear(x, weights, ends)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    ours = torch.autograd.grad(out, (x, weights), grad)
    theirs = torch.autograd.grad(expected, (x, weights), grad)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_torchs_grouped_product_computes_the_same(lengths: list[int]) -> None:
    """What CUDA devices run, here through torch's own fallback."""
    x, weights = torch.randn(100, 96), torch.randn(3, 64, 96)
    theirs = F.grouped_mm(x, weights.mT, offs=ends_of(lengths))
    torch.testing.assert_close(grouped_linear(x, weights, ends_of(lengths)), theirs, rtol=0, atol=1e-4)


def test_groups_compile_without_a_break_whatever_their_lengths() -> None:
    x, weights = torch.randn(100, 96, requires_grad=True), torch.randn(3, 64, 96, requires_grad=True)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS:
            ends = ends_of(lengths)
            out = compiled(x, weights, ends)
            torch.testing.assert_close(out, reference_grouped_linear(x, weights, ends), rtol=0, atol=1e-4)
            out.sum().backward()


def test_autocast_reaches_groups() -> None:
    x, weight = torch.randn(200, 128), torch.randn(160, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_linear(x, weight[None], torch.tensor([200], dtype=torch.int32)).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS)
def test_groups_on_cuda_are_those_of_a_loop(lengths: list[int]) -> None:
    x = torch.randn(100, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(3, 64, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16)
    ends = ends_of(lengths).cuda()
    with no_waiting():
        out = grouped_linear(x, weights, ends)
        ours = torch.autograd.grad(out, (x, weights), grad)
    expected = reference_grouped_linear(x, weights, ends)
    theirs = torch.autograd.grad(expected, (x, weights), grad)
    torch.testing.assert_close((out, *ours), (expected, *theirs), rtol=2e-2, atol=0.3)
