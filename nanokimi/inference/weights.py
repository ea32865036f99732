"""Weights stored in fewer bytes: which values a format can hold, and matrices packed in it for the native decoder.

Only storage changes: activations and sums stay fp32. The model with rounded values is the reference for everything
that computes with packed ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanokimi.errors import UserError
from nanokimi.inference.settings import WEIGHT_FORMATS as WEIGHT_FORMATS
from nanokimi.model.transformer import Transformer

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROW_ALIGNMENT = 16  # elements: PAD in nanokimi/native/simd.h
_LARGEST_INT8 = 127
_CACHE_LINE = 64  # bytes: vectors that straddle two of them load at half the speed


class Packed(NamedTuple):
    """A matrix as the native decoder reads it.

    Attributes:
        values: ``[rows, in]`` in the format, ``in`` padded with zeros to a multiple of ``ROW_ALIGNMENT``.
        scale: ``[rows]`` in fp32, for int8 only.
    """

    values: Tensor
    scale: Tensor | None


@torch.no_grad()
def round_weights_(model: Transformer, weight_format: str) -> None:
    """Rounds, in place, every matrix that decoding reads to values that ``weight_format`` can hold.

    Norms, routers and the embedding table keep theirs: they are small or read one row at a time. int8 is symmetric,
    one scale per output row: its largest magnitude / 127.

    Raises:
        UserError: an unknown format, or a weight too large for fp16.
    """
    if weight_format not in WEIGHT_FORMATS:
        raise UserError(f"--weights {weight_format}: choose one of {', '.join(WEIGHT_FORMATS)}")
    if weight_format == "fp32":
        return
    for weight in _decoding_matrices(model):
        weight.copy_(_rounded(weight, weight_format))


def _decoding_matrices(model: Transformer) -> list[nn.Parameter]:
    kept = {id(router.weight) for router in model.routers()}
    parameters = [weight for role, weight in model.param_roles() if role not in ("norm", "embedding")]
    return [weight for weight in parameters if id(weight) not in kept]


def _rounded(weight: Tensor, weight_format: str) -> Tensor:
    if weight_format == "int8":
        values, scale = _quantised(weight)
        return values * scale.unsqueeze(-1)
    half = weight.to(HALVES[weight_format])
    if not half.isfinite().all():
        raise UserError(f"--weights {weight_format}: a weight is larger than it can hold; use bf16")
    return half.to(weight.dtype)


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, in floating point, and the scale of each row ``[...]``."""
    scale = weight.abs().amax(dim=-1) / _LARGEST_INT8
    return (weight / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round(), scale


@torch.no_grad()
def pack(weight: Tensor, weight_format: str) -> Packed:
    """``weight`` ``[..., out, in]`` in fp32, all leading dimensions flattened to rows.

    In fp32 with rows of a suitable length these are the weight's own memory, not a copy.
    """
    rows = weight.detach().flatten(0, -2)
    scale = None
    if weight_format == "int8":
        whole, scale = _quantised(rows)
        rows = whole.to(torch.int8)
    elif weight_format != "fp32":
        rows = rows.to(HALVES[weight_format])
    missing = -rows.shape[1] % ROW_ALIGNMENT
    rows = (F.pad(rows, (0, missing)) if missing else rows).contiguous()
    return Packed(rows.clone() if rows.data_ptr() % _CACHE_LINE else rows, scale)
