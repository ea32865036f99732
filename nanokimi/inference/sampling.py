"""From logits to token ids: temperature, then top-k, then top-p, then min-p. V is the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from nanokimi.inference.settings import SamplingParams


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
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if params.top_k:
        ordered[..., params.top_k :] = -torch.inf
    probs = ordered.softmax(dim=-1)
    if params.top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= params.top_p, 0.0)
    if params.min_p:
        probs = probs.masked_fill(probs < params.min_p * probs[..., :1], 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, ids, probs)


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
