"""The iteration as it is written out, and its fast forms: batched, transposed, mirrored."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanokimi.ops.newton_schulz import (
    CPU_BATCHED_NUMEL,
    newton_schulz,
    newton_schulz_flops,
    reference_newton_schulz,
)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 7), (300, 260), (230, 450)])
def test_every_form_computes_what_is_written_out(shape: tuple[int, int]) -> None:
    g = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(g), reference_newton_schulz(g), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        newton_schulz(g.float(), dtype=torch.float32).double(), reference_newton_schulz(g), rtol=0, atol=1e-4
    )


def test_both_sides_of_the_limit_of_batches_are_tried() -> None:
    assert 24 * 40 <= CPU_BATCHED_NUMEL < 300 * 260


def test_a_stack_is_its_matrices_one_by_one() -> None:
    stack = torch.randn(5, 30, 20, dtype=torch.float64)
    expected = torch.stack([reference_newton_schulz(matrix) for matrix in stack])
    torch.testing.assert_close(newton_schulz(stack), expected, rtol=1e-10, atol=1e-10)


def test_a_zero_matrix_stays_zero() -> None:
    assert (reference_newton_schulz(torch.zeros(4, 6)) == 0).all()


def test_its_flops_are_those_that_torch_counts() -> None:
    for rows, cols in ((3, 5), (5, 3), (4, 4), (2, 64)):
        with FlopCounterMode(display=False) as counted:
            newton_schulz(torch.empty(rows, cols, device="meta"), steps=2)
        assert counted.get_total_flops() == newton_schulz_flops(rows, cols, steps=2)
