"""Loss on held-out text, per token and per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from nanokimi.data.batch import Batch, PackedSequences
from nanokimi.data.loader import evenly_spread
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.model.transformer import Transformer
from nanokimi.parallel.ranks import Ranks, current_ranks


class HeldOut(NamedTuple):
    """Nats per token, and bits per byte of text: the measure that does not depend on the tokenizer."""

    loss: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(
    model: Transformer,
    sequences: PackedSequences,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    max_tokens: int = 0,
    precision: AbstractContextManager[object] | None = None,
    mask_documents: bool = False,
) -> HeldOut:
    """Predicts every token of ``sequences`` once, or ``max_tokens`` of them evenly spread over the text.

    End-of-text tokens stand for no bytes; what it costs to predict them is counted. The ranks of a run share the
    batches; one that has fewer computes one again, uncounted, for a sharded model is gathered by all of them.

    Args:
        precision: an autocast context for the forward passes.
        mask_documents: tokens attend within their document only, as they did in training.
    """
    ranks = current_ranks()
    device, was_training = next(model.parameters()).device, model.training
    chosen = evenly_spread(len(sequences), max(1, max_tokens // sequences.length) if max_tokens else 0)
    nats, tokens, text_bytes = 0.0, 0, 0
    model.eval()
    with precision or nullcontext():
        for numbers, counts in _shared(chosen, batch_size, ranks):
            rows = torch.from_numpy(sequences.batch(numbers)).long()
            batch = Batch.of_rows(rows, tokenizer.eot_id if mask_documents else None).to(device)
            summed = model(batch.tokens, batch.labels, documents=batch.documents, label_count=1).cross_entropy.item()
            if counts:
                nats += summed
                tokens += batch.labels.numel()
                text_bytes += tokenizer.count_bytes(rows[:, 1:])
    model.train(was_training)
    all_nats, all_tokens, all_bytes = ranks.sum([nats, tokens, text_bytes])
    return HeldOut(all_nats / all_tokens, all_nats / math.log(2) / max(1, all_bytes))


def _shared(chosen: list[int], batch_size: int, ranks: Ranks) -> Iterator[tuple[list[int], bool]]:
    """This rank's batches of the numbers ``chosen``, as many as every rank has; whether each counts."""
    batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    for first in range(0, len(batches), ranks.size):
        number = first + ranks.rank
        yield batches[min(number, len(batches) - 1)], number < len(batches)
