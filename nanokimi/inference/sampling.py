"""From logits to token ids: temperature, then top-k, then top-p, then min-p. V is the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanokimi.inference.settings import SamplingParams

CANDIDATES = (512, 8192)  # sorted before all are: a trained model's nucleus seldom holds more than the first number


def new_generator(seed: int | None, device: torch.device | str) -> torch.Generator:
    """A generator of its own for one request, so that no other draw disturbs it; None seeds it at random."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that ``params`` draws from, fp32, of the shape of ``logits`` ``[V]`` or ``[B, V]``.

    Each filter works on what the one before it left, renormalised: top-k; top-p, the nucleus of Holtzman
    et al. (2020, section 3.1); min-p (Nguyen et al. 2024, section 3). Among equals the lowest id counts as likelier.
    """
    logits = logits.float()
    if params.greedy:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    # The maximum goes first: a tiny temperature then overflows to -inf, never to NaN.
    coldest = max(params.temperature, torch.finfo(torch.float32).tiny)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / coldest
    all_probs = scaled.softmax(dim=-1)
    if not params.top_k and params.top_p == 1:  # nothing asks for an order
        probs = all_probs * (all_probs >= params.min_p * all_probs.amax(dim=-1, keepdim=True))
        return probs / probs.sum(dim=-1, keepdim=True)
    ids = _likeliest(scaled, all_probs, params)
    probs = all_probs.gather(-1, ids)
    if params.top_k:
        probs[..., params.top_k :] = 0.0
        probs = probs / probs.sum(dim=-1, keepdim=True)
    if params.top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= params.top_p, 0.0)
    if params.min_p:
        probs = probs.masked_fill(probs < params.min_p * probs[..., :1], 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return torch.zeros_like(all_probs).scatter(-1, ids, probs)


def _likeliest(scaled: Tensor, probs: Tensor, params: SamplingParams) -> Tensor:
    """Ids, likeliest first, among equals the lowest: of one row on a CPU only as many as the filters can keep."""
    if scaled.dim() == 1 and scaled.device.type == "cpu":
        for some in (params.top_k,) if params.top_k else CANDIDATES:
            if some >= len(scaled):
                break
            ids = (scaled >= scaled.topk(some).values[-1]).nonzero().squeeze(-1)
            if params.top_k or probs[ids].sum() >= params.top_p:
                return ids[scaled[ids].sort(descending=True, stable=True).indices]
    return scaled.sort(dim=-1, descending=True, stable=True).indices


def sample(
    logits: Tensor, params: SamplingParams, generator: torch.Generator | None = None, *, vocab_size: int | None = None
) -> Tensor:
    """Draws one id per row.

    Args:
        logits: ``[V]`` or ``[B, V]``.
        generator: on the device of ``logits``; not used when ``params.greedy``.
        vocab_size: ids from here on are padding of the model's vocabulary and are never drawn.

    Returns:
        int64 ids, ``[]`` or ``[B]``.
    """
    logits = logits[..., :vocab_size]
    if params.greedy:
        return logits.argmax(dim=-1)
    return torch.multinomial(probabilities(logits, params), 1, generator=generator).squeeze(-1)


def sample_each(
    logits: Tensor, params: SamplingParams, generators: Sequence[torch.Generator], *, vocab_size: int | None = None
) -> Tensor:
    """``sample`` for the rows of ``logits`` ``[B, V]``, each with a generator of its own."""
    if params.greedy:
        return sample(logits, params, vocab_size=vocab_size)
    logits = logits[..., :vocab_size]
    # A CPU sorts one row in part, see above; other devices take all rows at once.
    by_row = logits.device.type == "cpu"
    probs = [probabilities(row, params) for row in logits] if by_row else probabilities(logits, params).unbind()
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(probs, generators, strict=True)])
