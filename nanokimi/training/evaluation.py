"""Loss on held-out text, per token and per byte."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Subset

from nanokimi.data.loader import evenly_spread
from nanokimi.data.packing import PackedSequences
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.model.transformer import Transformer, document_numbers


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

    End-of-text tokens stand for no bytes; what it costs to predict them is counted.

    Args:
        precision: an autocast context for the forward passes.
        mask_documents: tokens attend within their document only, as they did in training.
    """
    device, was_training = next(model.parameters()).device, model.training
    chosen = evenly_spread(len(sequences), max(1, max_tokens // sequences.length) if max_tokens else 0)
    nats, tokens, text_bytes = 0.0, 0, 0
    model.eval()
    with precision or nullcontext():
        own = torch.Generator()  # a loader draws a seed when it starts: not from the generator a resume restores
        for batch in DataLoader(Subset(sequences, chosen), batch_size=batch_size, generator=own):
            inputs, labels = batch[:, :-1].to(device), batch[:, 1:].to(device)
            documents = document_numbers(inputs, tokenizer.eot_id) if mask_documents else None
            nats += model.loss(inputs, labels, documents).cross_entropy.item() * labels.numel()
            tokens += labels.numel()
            text_bytes += tokenizer.count_bytes(batch[:, 1:])
    model.train(was_training)
    return HeldOut(nats / tokens, nats / math.log(2) / max(1, text_bytes))
