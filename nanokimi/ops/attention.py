"""Causal attention that also returns the log-sum-exp of its logits, by whichever fused kernel the device has.

The log-sum-exp bounds the largest logit from above: ``max <= lse <= max + ln(visible keys)``. QK-Clip reads it for
free; torch's public attention function computes it too, but does not return it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from nanokimi.ops.products import at_least_fp32

ROWS_PER_CHUNK = 128  # queries whose logits ``largest_logits`` holds at once
MASK_ROWS_PER_CHUNK = 256  # rows of a bias whose mask is held at once
ROW_ALIGNMENT = 8  # elements: in half precision the 16 bytes that CUDA reads at once

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]


class DocumentMask(NamedTuple):
    """Which positions may attend to one another; made by ``document_mask``, once for all layers of a pass.

    Attributes:
        documents: int64 ``[B, T]``, the number of the document that each position belongs to.
        bias: what the kernels add to the logits, ``[B, 1, T, T]``: 0 where a position may attend, -inf elsewhere.
    """

    documents: Tensor
    bias: Tensor


def document_mask(documents: Tensor, dtype: torch.dtype) -> DocumentMask:
    """The mask of ``documents`` ``[B, T]`` for queries in ``dtype``.

    The rows of its bias begin at multiples of ``ROW_ALIGNMENT`` elements, whatever T is: CUDA's kernel refuses others.
    """
    batch, length = documents.shape
    padded = -(-length // ROW_ALIGNMENT) * ROW_ALIGNMENT
    bias = torch.zeros(batch, 1, length, padded, dtype=dtype, device=documents.device)[..., :length]
    for start in range(0, length, MASK_ROWS_PER_CHUNK):
        end = min(start + MASK_ROWS_PER_CHUNK, length)
        visible = _attn_mask(start, end, length, documents.device, documents)
        bias[:, :, start:end].masked_fill_(~visible, -torch.inf)
    return DocumentMask(documents, bias)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: DocumentMask | None = None
) -> tuple[Tensor, Tensor]:
    """``causal_attention`` written out: what the kernels are compared with, and what runs on devices without one."""
    logits = at_least_fp32(q @ k.transpose(-2, -1)) * scale
    documents = None if mask is None else mask.documents
    logits = torch.where(_attn_mask(0, q.shape[-2], k.shape[-2], q.device, documents), logits, -torch.inf)
    return logits.softmax(dim=-1).type_as(v) @ v, logits.detach().logsumexp(dim=-1)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: DocumentMask | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention where position t sees positions 0 to t, or those among them that are in its document.

    Args:
        q, k: ``[B, H, T, N + P]``.
        v: ``[B, H, T, V]``.
        scale: factor of the logits.
        mask: of documents; None: all of a sequence is one.

    Returns:
        the output ``[B, H, T, V]`` and the log-sum-exp of each row of visible scaled logits ``[B, H, T]``
        in fp32 (fp64 for fp64 inputs); no gradient flows through the latter.
    """
    fused = _fused_kernel(q, v)
    if fused is None:
        return reference_attention(q, k, v, scale, mask)
    kernel, multiple = fused
    if mask is not None and mask.bias.dtype != q.dtype:  # a layer of another precision than its model
        mask = document_mask(mask.documents, q.dtype)
    bias = None if mask is None else mask.bias
    out, lse = kernel(*_equal_widths(q, k, v, multiple), scale, bias)
    return out[..., : v.shape[-1]], lse[..., : q.shape[2]]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, attn_mask: Tensor | None) -> Tensor:
    """Softmax attention of T queries ``[B, H, T, N + P]`` to S keys.

    Args:
        k, v: ``[B, H, S, N + P]`` and ``[B, H, S, V]``.
        scale: factor of the logits.
        attn_mask: bool, broadcasts to ``[B, H, T, S]``, what a query may attend to (something at least); None: to all.

    Returns:
        ``[B, H, T, V]``.
    """
    out = F.scaled_dot_product_attention(*_equal_widths(q, k, v, 1), attn_mask=attn_mask, scale=scale)
    return out[..., : v.shape[-1]]


def _fused_kernel(q: Tensor, v: Tensor) -> tuple[Kernel, int] | None:
    """The kernel for this device, dtype and head width, and what head widths must be a multiple of, if there is one."""
    if v.device.type == "cpu":
        return _cpu_kernel, 1
    if v.device.type == "cuda" and v.dtype in (torch.bfloat16, torch.float16):
        fits = torch.cuda.get_device_capability(v.device) >= (8, 0) and max(q.shape[-1], v.shape[-1]) <= 256
        return (_cuda_kernel, 8) if fits else None
    return (_cuda_kernel, 4) if v.device.type == "cuda" and v.dtype == torch.float32 else None


# The bias is causal by itself. The kernels are told ``is_causal`` all the same: they then skip what it masks.


def _cpu_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, attn_mask=bias, scale=scale
    )
    return out, lse


def _cuda_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flash attention in half precision; in fp32, and with a bias, which flash does not take, the efficient kernel."""
    v = v.contiguous()  # a view may begin between the multiples of 16 bytes that the kernels read from
    if bias is None and v.dtype != torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    else:
        bias = None if bias is None else bias.expand(-1, q.shape[1], -1, -1)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, True, scale=scale
        )
    return out, lse


def _attn_mask(start: int, end: int, keys: int, device: torch.device, documents: Tensor | None) -> Tensor:
    """Which of the first ``keys`` positions the rows from ``start`` to ``end`` may attend to.

    Bool ``[end - start, keys]``, with ``documents`` ``[B, 1, end - start, keys]``.
    """
    causal = torch.ones(end - start, keys, dtype=torch.bool, device=device).tril(start)
    if documents is None:
        return causal
    return causal & (documents[:, None, start:end, None] == documents[:, None, None, :keys])


def _equal_widths(q: Tensor, k: Tensor, v: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pads heads with zeros to one width, as the kernels want it: no logit and no value changes."""
    width = -(-max(q.shape[-1], v.shape[-1]) // multiple) * multiple
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    return q, k, v


@torch.no_grad()
def largest_logits(
    q: Tensor, k: Tensor, scale: float, mask: DocumentMask | None = None, counted: Tensor | None = None
) -> Tensor:
    """The largest scaled logit of each head over visible pairs, ``[H]``, a chunk of rows at a time.

    ``counted``, bool ``[B, T]``: the queries that count; without any the largest logit is -inf.
    """
    length, documents = q.shape[2], None if mask is None else mask.documents
    best = torch.full((q.shape[1],), -torch.inf, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    for start in range(0, length, ROWS_PER_CHUNK):
        end = min(start + ROWS_PER_CHUNK, length)
        logits = at_least_fp32(q[:, :, start:end] @ k[:, :, :end].transpose(-2, -1)) * scale
        attn_mask = _attn_mask(start, end, end, q.device, documents)
        if counted is not None:
            attn_mask = attn_mask & counted[:, None, start:end, None]
        best = torch.maximum(best, torch.where(attn_mask, logits, -torch.inf).amax(dim=(0, 2, 3)))
    return best
