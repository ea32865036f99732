"""Matrices as the kernels read them, and large pages for their memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanokimi.inference.decoding import use_weights_
from nanokimi.model.transformer import Transformer
from nanokimi.native import WEIGHT_FORMATS
from nanokimi.native.build import prefer_huge_pages
from nanokimi.native.packed_model import pack


def test_int8_holds_every_row_at_its_own_scale() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-6, 3e-6, -1.27e-4]])
    values, scale = pack(weight, "int8")
    assert scale is not None
    assert values.dtype == torch.int8
    assert values[:, :3].tolist() == [[64, -127, 32], [0, 0, 0], [1, 3, -127]]
    torch.testing.assert_close(scale, torch.tensor([2 / 127, 0.0, 1e-6]))


def unpacked(weight: Tensor, weight_format: str) -> Tensor:
    values, scale = pack(weight, weight_format)
    rows = values[:, : weight.shape[-1]].float()
    return rows if scale is None else rows * scale.unsqueeze(-1)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_rounded_matrix_is_packed_without_loss(debug_model: Transformer, weight_format: str) -> None:
    use_weights_(debug_model, weight_format)
    weight = debug_model.moe_layers()[0].experts.w1
    torch.testing.assert_close(unpacked(weight, weight_format), weight.flatten(0, 1), rtol=3e-7, atol=0)


def test_rows_are_padded_with_zeros_to_whole_vectors() -> None:
    values, _ = pack(torch.ones(3, 17), "bf16")
    assert values.shape == (3, 32)
    assert values[:, 17:].abs().sum() == 0


def test_weights_that_lie_between_cache_lines_are_moved() -> None:
    weight = torch.randn(2 * 16 + 1)[1:].view(2, 16)
    values, _ = pack(weight, "fp32")
    assert values.data_ptr() % 64 == 0
    assert torch.equal(values, weight)


# ---- large pages ----------------------------------------------------------------------------------


def huge_kilobytes() -> int:
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is asked")
def test_a_large_tensor_moves_into_huge_pages_and_keeps_its_values() -> None:
    tensor = torch.arange(16_000_000)
    expected, before = tensor.clone(), huge_kilobytes()
    if not prefer_huge_pages(tensor):
        pytest.skip("this system has no huge pages to give, or does not move memory into them")
    assert huge_kilobytes() - before >= tensor.nbytes // 1024 - 2 * 2048
    assert torch.equal(tensor, expected)


def test_a_tensor_smaller_than_a_page_is_left_alone() -> None:
    assert not prefer_huge_pages(torch.zeros(1000))
