"""Three ways to take the same AdamW step."""

from __future__ import annotations

import pytest
import torch

from nanokimi.ops.adamw import CPU_CHUNK, AdamWStep, TensorLists, adamw_, fused_adamw_, reference_adamw_

SHAPES = [(300, 701), (1,), (), (7, 3, 2)]


def lists(seed: int) -> TensorLists:
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator) for shape in SHAPES]

    return TensorLists(drawn(), drawn(), drawn(), [x.square() for x in drawn()])


def test_chunks_give_the_whole_update_to_the_bit() -> None:
    assert lists(0).parameters[0].numel() > CPU_CHUNK
    by = AdamWStep(3, 0.1, 0.01, (0.9, 0.95), 1e-8)
    whole, chunks = lists(0), lists(0)
    reference_adamw_(whole, by)
    adamw_(chunks, by)
    for ours, theirs, before in zip(chunks, whole, lists(0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ours is chunks.grads or all(not torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("step", [1, 40])
def test_the_fused_kernel_gives_the_same_update(step: int) -> None:
    by = AdamWStep(step, 0.1, 0.2, (0.9, 0.95), 1e-8)
    ours, reference = lists(1), lists(1)
    fused_adamw_(ours, by)
    reference_adamw_(reference, by)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
