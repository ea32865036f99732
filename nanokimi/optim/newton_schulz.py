"""Orthogonalisation of matrices by Newton-Schulz iterations: the heart of Muon (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5

# On a CPU a batch gains for small matrices, where the calls cost more than the products, and loses
# for large ones, which it only copies. Measured: 1.8 times at 48 x 56 x 256, nothing at 896 x 1024.
CPU_BATCHED_NUMEL = 64 * 1024


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32 (bf16 is 23 to 41 times slower on a CPU without it)."""
    if device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def newton_schulz(g: Tensor, *, steps: int = STEPS, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each matrix of ``g``, roughly: singular values in 0.68 to 1.21.

    Args:
        g: ``[..., rows, cols]``; each matrix is scaled on its own, so no scale of ``g`` matters.
        steps: quintic iterations.
        dtype: of the products; None chooses by hardware.

    Returns:
        a tensor like ``g`` in ``dtype``; a zero matrix stays zero.
    """
    dtype = dtype or best_dtype(g.device)
    tall = g.shape[-2] > g.shape[-1]
    x = g.reshape(-1, *g.shape[-2:])
    x = x.mT if tall else x
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))
    x = (x / norm.clamp_min(torch.finfo(norm.dtype).tiny)).to(dtype)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(g.shape)


def orthogonalise(matrices: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """``newton_schulz`` of many matrices or stacks of one shape ``[..., rows, cols]``.

    One batched product for all of them on an accelerator; on a CPU only where they are small.
    """
    rows, cols = matrices[0].shape[-2:]
    flat = [m.reshape(-1, rows, cols) for m in matrices]
    if matrices[0].device.type != "cpu" or rows * cols <= CPU_BATCHED_NUMEL:
        done = newton_schulz(torch.cat(flat), dtype=dtype).split([len(f) for f in flat])
    else:
        done = tuple(torch.stack([newton_schulz(matrix, dtype=dtype) for matrix in stack]) for stack in flat)
    return [d.view(m.shape) for d, m in zip(done, matrices, strict=True)]
