"""Orthogonalisation of matrices by Newton-Schulz iterations: the heart of Muon (Jordan et al., 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanokimi.ops.products import product

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5

# On a CPU a batch gains for small matrices, where the calls cost more than the products, and loses
# for large ones, which it only copies. Measured: 1.8 times at 48 x 56 x 256, nothing at 896 x 1024.
CPU_BATCHED_NUMEL = 64 * 1024

# Rows of a symmetric product that are computed at once, up to the diagonal: the rest is mirrored.
# Measured at 896 x 960 to 896 x 3968: a tenth to a quarter less time, in fp32 and bf16.
ROWS = 224


def reference_newton_schulz(g: Tensor, *, steps: int = STEPS) -> Tensor:
    """The iteration written out for one ``[rows, cols]`` matrix, in the precision of ``g``; see ``newton_schulz``."""
    a, b, c = QUINTIC
    x: Tensor = g.mT if g.shape[0] > g.shape[1] else g
    x = x / torch.linalg.matrix_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.shape[0] > g.shape[1] else x


def newton_schulz_flops(rows: int, cols: int, *, steps: int = STEPS) -> int:
    """FLOPs of the iteration on one matrix, with l its long and s its short side: ``2 steps s² (2 l + s)``.

    Three products a step: s x l by l x s, s x s by s x s, s x s by s x l. Half-products by symmetry count in full.
    """
    short, long = sorted((rows, cols))
    return 2 * steps * short**2 * (2 * long + short)


def best_dtype(device: torch.device, stored: torch.dtype = torch.float32) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32 (bf16 is 23 to 41 times slower on a CPU without it).

    Matrices that are ``stored`` in fp64 are multiplied in it: nobody takes it for its speed.
    """
    if stored == torch.float64:
        return stored
    on_cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if device.type == "cuda" or (device.type == "cpu" and on_cpu) else torch.float32


def batched(matrix: Tensor) -> bool:
    """Whether matrices of this size gain by being multiplied in one batch, on this device."""
    return matrix.device.type != "cpu" or matrix.shape[-2] * matrix.shape[-1] <= CPU_BATCHED_NUMEL


def batches_of(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the ``matrices`` to be handed to ``orthogonalise`` together: of one shape, transposed or not."""
    batches: dict[Any, list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        batches[tuple(sorted(matrix.shape[-2:])) if batched(matrix) else -number].append(number)
    return list(batches.values())


def newton_schulz(g: Tensor, *, steps: int = STEPS, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each matrix of ``g``, roughly: singular values in 0.68 to 1.21.

    Args:
        g: ``[..., rows, cols]``; each matrix is scaled on its own, so no scale of ``g`` matters.
        steps: quintic iterations.
        dtype: of the products; None chooses by hardware.

    Returns:
        a tensor like ``g`` in ``dtype``; a zero matrix stays zero.
    """
    return orthogonalise([g], steps=steps, dtype=dtype)[0]


def orthogonalise(matrices: Sequence[Tensor], *, steps: int = STEPS, dtype: torch.dtype | None = None) -> list[Tensor]:
    """``newton_schulz`` of many matrices or stacks ``[..., rows, cols]`` of one shape, transposed or not.

    One batched product for all of them on an accelerator; on a CPU only where they are small.
    """
    wide = [m.mT if m.shape[-2] > m.shape[-1] else m for m in matrices]
    stacks = [m.reshape(-1, *m.shape[-2:]) for m in wide]
    x = torch.cat(stacks)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    dtype = dtype or best_dtype(x.device, x.dtype)
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)  # no second copy where the type is kept
    x = torch.div(x, norm.clamp_min_(torch.finfo(norm.dtype).tiny), out=out)
    if batched(wide[0]):
        x = _quintic(x, steps)
    else:
        for matrix in x:
            matrix.copy_(_quintic_by_mirror(matrix, steps))
    done = [part.view(m.shape) for m, part in zip(wide, x.split([len(s) for s in stacks]), strict=True)]
    return [d.mT if m.shape != d.shape else d for m, d in zip(matrices, done, strict=True)]


def _quintic(x: Tensor, steps: int) -> Tensor:
    """``x <- a x + b (x xᵀ) x + c (x xᵀ)² x`` on a batch ``[n, rows, cols]``."""
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _quintic_by_mirror(x: Tensor, steps: int) -> Tensor:
    """``_quintic`` of one matrix ``[rows, cols]`` on a CPU, in three quarters of the multiplications."""
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = symmetric_square(x)
        polynomial = symmetric_square(gram, plus=gram, beta=b, alpha=c)
        x = _product_plus(x, polynomial, x, beta=a)
    return x


def symmetric_square(x: Tensor, *, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """``alpha x xᵀ + beta plus``, with ``x`` ``[rows, cols]`` and ``plus`` symmetric: one side mirrors the other."""
    out = x.new_empty(len(x), len(x))
    for start in range(0, len(x), ROWS):
        rows, end = slice(start, start + ROWS), start + ROWS
        added = None if plus is None else plus[rows, :end]
        out[rows, :end] = _product_plus(added, x[rows], x[:end].mT, beta=beta, alpha=alpha)
        out[:start, rows] = out[rows, :start].mT
    return out


def _product_plus(plus: Tensor | None, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """``alpha a b + beta plus``: rounded once in half precision, by the fastest library in fp32."""
    if plus is None:
        return product(a, b)
    if a.dtype != torch.float32:
        return torch.addmm(plus, a, b, beta=beta, alpha=alpha)
    out = product(a, b)
    return (out if alpha == 1 else out.mul_(alpha)).add_(plus, alpha=beta)
