"""Products by oneDNN and by groups, and the gate between them, against torch's own and against their formulas."""

from __future__ import annotations

import pytest
import torch
from conftest import no_waiting
from torch import Tensor
from torch.nn import functional as F

from nanokimi.ops import products
from nanokimi.ops.products import (
    gated,
    grouped_linear,
    linear,
    product,
    reference_gated,
    reference_grouped_linear,
    reference_linear,
)

LENGTHS = [[40, 25, 35], [0, 100, 0], [100, 0, 0], [1, 98, 1], [50, 0, 50]]  # of groups

needs_onednn = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this build of torch has no oneDNN")


def laid_out(rows: int, cols: int, layout: str) -> Tensor:
    if layout == "part":
        return torch.randn(rows, cols + 30)[:, :cols]
    return torch.randn(cols, rows).mT if layout == "transposed" else torch.randn(rows, cols)


@needs_onednn
@pytest.mark.parametrize("left", ["plain", "transposed", "part"])
@pytest.mark.parametrize("right", ["plain", "transposed", "part"])
def test_a_product_is_torchs_in_every_layout(left: str, right: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN never sees a part of a wider matrix, which would cost it a thousand times as much."""
    original = products._onednn

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        assert x.is_contiguous()
        assert weight.is_contiguous() or weight.mT.is_contiguous()
        return original(x, weight)

    monkeypatch.setattr(products, "_onednn", watched)
    a, b = laid_out(130, 170, left), laid_out(170, 190, right)
    assert products.by_onednn(130 * 170 * 190, a, b)
    torch.testing.assert_close(product(a, b).double(), a.double() @ b.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_to_torch(dtype: torch.dtype) -> None:
    a, b = torch.randn(130, 170, dtype=dtype), torch.randn(170, 190, dtype=dtype)
    assert torch.equal(product(a, b), a @ b)


@needs_onednn
@pytest.mark.parametrize("shape", [(3, 50, 128), (200, 128)])
def test_a_linear_layer_and_its_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(160, 128, requires_grad=True)
    assert products.by_onednn(x.numel() * 160, x, weight)
    grad = torch.randn(*shape[:-1], 160)
    ours = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    theirs = torch.autograd.grad(reference_linear(x.double(), weight.double()), (x, weight), grad.double())
    torch.testing.assert_close(linear(x, weight), reference_linear(x, weight), rtol=0, atol=1e-4)
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(here, there.float(), rtol=0, atol=1e-4)


def test_autocast_reaches_linear_layers() -> None:
    x, weight = torch.randn(200, 128), torch.randn(160, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


# ---- groups -------------------------------------------------------------------------------------


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


# ---- the gate -----------------------------------------------------------------------------------


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
