"""Products by oneDNN, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanokimi.ops import products
from nanokimi.ops.products import linear, product, reference_linear

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
