"""Looks at every token of a text: what the model expected at its position, and which experts it visited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.inference.engine import TextAssembly, TextChunk, check_prompt
from nanokimi.inference.sampling import Report, log_probabilities
from nanokimi.model.moe import Routing
from nanokimi.model.transformer import Transformer

ROWS = 128  # logits at once: bounds their memory


class TokenView(NamedTuple):
    """One token of a text.

    Attributes:
        id, text: the token; bytes that are no whole characters show as U+FFFD.
        logprob: of the token given those before it, natural logarithm; None for the first.
        likeliest: id, text and log-probability of what the model expected at its position, best first.
        experts: for each MoE layer the routed experts that the token visited.
    """

    id: int
    text: str
    logprob: float | None
    likeliest: tuple[tuple[int, str, float], ...]
    experts: tuple[tuple[int, ...], ...]


@torch.inference_mode()
def inspect_tokens(
    model: Transformer, tokenizer: Tokenizer, ids: Sequence[int], *, start: int = 0, top: int = 5
) -> list[TokenView]:
    """Looks at ``ids[start:]``, each given all before it, in one forward pass without a cache.

    Args:
        model: in evaluation mode.
        top: how many likeliest tokens to report.

    Raises:
        UserError: no ids, more than the context holds, or some that are not in the vocabulary.
    """
    check_prompt(ids, model.config.max_seq_length, tokenizer.vocab_size)
    device = next(model.parameters()).device
    routings: list[Routing] = []
    with ExitStack() as hooks:
        for moe in model.moe_layers():
            hooks.enter_context(moe.router.register_forward_hook(lambda _, inputs, routing: routings.append(routing)))
        hidden = model.hidden_states(torch.tensor([ids], device=device))
    chosen = [routing.experts.sort(dim=-1).values.tolist() for routing in routings]  # [layers][tokens][K]
    reports = _reports(model, hidden[0], ids, start, top, tokenizer.vocab_size)
    views = []
    for position, report in enumerate(reports, start):
        logprob, likeliest = report or (None, ())
        shown = tuple((token, tokenizer.decode([token]), value) for token, value in likeliest)
        experts = tuple(tuple(layer[position]) for layer in chosen)
        views.append(TokenView(ids[position], tokenizer.decode([ids[position]]), logprob, shown, experts))
    return views


@torch.inference_mode()
def echoed(model: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], logprobs: int | None) -> TextChunk:
    """A prompt as if the model had written it: its text, and its tokens with what ``logprobs`` asks for."""
    reports: list[Report | None] = [None] * len(prompt)
    if logprobs is not None:
        hidden = model.hidden_states(torch.tensor([prompt], device=next(model.parameters()).device))
        reports = _reports(model, hidden[0], prompt, 0, logprobs, tokenizer.vocab_size)
    text = TextAssembly(tokenizer)
    for token, report in zip(prompt, reports, strict=True):
        text.push(token, report)
    text.done = True
    return text.take() or TextChunk("", ())


def _reports(
    model: Transformer, hidden: Tensor, ids: Sequence[int], start: int, top: int, vocab_size: int
) -> list[Report | None]:
    """For each of ``ids[start:]`` its log-probability and the likeliest ones; None for the first of all.

    They are over all of the model's vocabulary, padding included, as evaluation takes them (``insight.scoring``).

    Args:
        hidden: ``[T, D]``, of all ids.
    """
    reports: list[Report | None] = [None] if start == 0 else []
    for first in range(max(start, 1), len(ids), ROWS):
        asked = ids[first : first + ROWS]
        logits = model.head(hidden[first - 1 : first - 1 + len(asked)])
        reports += log_probabilities(logits, asked, [top] * len(asked), vocab_size=vocab_size)
    return reports
