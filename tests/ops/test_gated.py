"""The gate of SwiGLU against what autograd makes of its formula."""

from __future__ import annotations

import torch

from nanokimi.ops.gated import gated, reference_gated


def test_value_and_gradients_are_those_of_the_formula() -> None:
    gate, x = (4 * torch.randn(50, 30, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(50, 30, dtype=torch.float64)
    ours, theirs = gated(gate, x), reference_gated(gate, x)
    assert torch.equal(ours, theirs)
    expected = torch.autograd.grad(theirs, (gate, x), grad)
    torch.testing.assert_close(torch.autograd.grad(ours, (gate, x), grad), expected, rtol=1e-12, atol=1e-12)


def test_only_its_operands_are_kept() -> None:
    kept: list[torch.Tensor] = []
    gate, x = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated(gate, x)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), x.data_ptr()]
