"""From logits to token ids: temperature, then top-k, then top-p, then min-p. V is the vocabulary.

Each filter works on what the one before it left: top-k; top-p, the nucleus of Holtzman et al. (2020, section 3.1);
min-p (Nguyen et al. 2024, section 3). Among tokens of equal probability the lowest id counts as likelier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanokimi.inference.options import SamplingOptions

# Log-probability of the token drawn; id and log-probability of the likeliest ones, best first.
Report = tuple[float, tuple[tuple[int, float], ...]]


def draw(logits: Tensor, options: Sequence[SamplingOptions], uniforms: Sequence[float]) -> list[int]:
    """One id for each of the n rows of ``logits`` ``[n, V]``. No row depends on the others, to the bit.

    Args:
        options: how each row is drawn; a greedy row takes the likeliest token.
        uniforms: for each row a random number, 0 or more and below 1, at which the cumulative distribution is
            inverted.
    """
    ids = [0] * len(logits)
    for greedy in (True, False):
        rows = [row for row, choice in enumerate(options) if choice.greedy == greedy]
        if not rows:
            continue
        part = logits if len(rows) == len(ids) else logits[rows]
        if greedy:
            found = part.argmax(dim=-1)
        else:  # the first id at which the cumulative distribution passes the uniform number
            sums = _weights(part, [options[row] for row in rows]).cumsum(dim=-1)
            uniform = torch.tensor([uniforms[row] for row in rows], dtype=torch.float64, device=logits.device)
            found = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).squeeze(-1)
        for row, token in zip(rows, found.clamp(max=logits.shape[-1] - 1).tolist(), strict=True):
            ids[row] = token
    return ids


def log_probabilities(
    logits: Tensor, ids: Sequence[int], counts: Sequence[int | None], *, vocab_size: int | None = None
) -> list[Report | None]:
    """The model's own log-probabilities, before temperature and filters, of ``ids``, one for each row of ``[n, V]``.

    Args:
        counts: how many of the likeliest tokens each row reports; None: the row reports nothing.
        vocab_size: ids from here on are never among the likeliest, though they take their share of probability.
    """
    reports: list[Report | None] = [None] * len(ids)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if rows:
        logprobs = logits[rows].float().log_softmax(dim=-1)
        own = logprobs.gather(-1, torch.tensor([ids[row] for row in rows], device=logits.device)[:, None])
        known = logprobs[:, :vocab_size]
        best = known.topk(min(max(count or 0 for count in counts), known.shape[-1]))
        for row, *values in zip(rows, own[:, 0].tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
            logprob, tokens, likeliest = values
            reports[row] = (logprob, tuple(zip(tokens, likeliest, strict=True))[: counts[row]])
    return reports


def _weights(logits: Tensor, options: Sequence[SamplingOptions]) -> Tensor:
    """Probabilities up to a factor, zero for the tokens that are filtered out, fp64 ``[n, V]``."""
    # A tiny temperature must not become 0 in fp32. The maximum is subtracted first, so it gives -inf and never NaN.
    coldest = torch.finfo(torch.float32).tiny
    table = [(max(o.temperature, coldest), o.top_k or torch.inf, o.top_p, o.min_p) for o in options]
    choices = torch.tensor(table, dtype=torch.float64, device=logits.device).T.unsqueeze(-1)  # [4, n, 1]
    logits = logits.float()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(choices[0].float())
    weights = scaled.softmax(dim=-1).double()
    filtered = [row for row, choice in enumerate(options) if not choice.unfiltered]
    if len(filtered) == len(options):
        return weights * _kept(scaled, *choices[1:])
    if filtered:
        weights[filtered] *= _kept(scaled[filtered], *choices[1:, filtered])
    return weights


def _kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens pass the filters, bool ``[n, V]``; the choices are ``[n, 1]``, ``scaled`` is at most 0.

    Only the values are sorted, not their ids. The smallest value that passes then says which tokens do.
    """
    if scaled.device.type == "cpu":  # with numpy, whose vector instructions are twenty times as fast as torch
        values = torch.from_numpy(-np.sort(-scaled.numpy(), axis=-1))
    else:
        values = scaled.sort(dim=-1, descending=True).values
    weights = values.exp().double()
    weights = weights * (torch.arange(weights.shape[-1], device=scaled.device) < top_k)
    sums = weights.cumsum(dim=-1)
    passing = ((top_p == 1) | (sums - weights < top_p * sums[:, -1:])) & (weights >= min_p) & (weights > 0)
    count = passing.sum(dim=-1, keepdim=True)
    cut = values.gather(-1, (count - 1).clamp(min=0))  # logits that are not finite pass no filter
    equal = scaled == cut
    equals_passing = count - (values > cut).sum(dim=-1, keepdim=True)
    return (scaled > cut) | (equal & (equal.cumsum(dim=-1) <= equals_passing))
