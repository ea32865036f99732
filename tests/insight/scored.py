"""What the tests of evaluation share: the obvious way to score tokens, and a model on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional as F

from nanokimi import checkpoint
from nanokimi.config import TrainConfig
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.model.transformer import Transformer


@torch.no_grad()
def log_prob(model: Transformer, tokens: Sequence[int], scored: int) -> tuple[float, bool]:
    """Log-probability of the last ``scored`` tokens, one sequence alone, and whether all are the likeliest."""
    table = F.log_softmax(model(torch.tensor([tokens[:-1]]))[0].double(), dim=-1)[-scored:]
    labels = torch.tensor(tokens[-scored:])
    return float(table[torch.arange(scored), labels].sum()), bool((table.argmax(-1) == labels).all())


def document_log_prob(model: Transformer, tokens: Sequence[int], eot: int, stride: int = 0) -> float:
    """Log-probability of a document, by the definition: token by token, each with what its window shows of it."""
    context, total, start = model.config.max_seq_length, 0.0, 0
    row = [eot, *tokens]
    while start < len(tokens):
        end = min(len(tokens), start + (context if not start else stride or context))
        first = max(0, end - context)  # the last input is token end - 1 of the document, row[end - 1]
        total += log_prob(model, row[first : end + 1], end - start)[0]
        start = end
    return total


def save_model(path: Path, model: Transformer, tokenizer: Tokenizer, trained: TrainConfig | None = None) -> Path:
    """A checkpoint of ``model``; ``trained``: of a run with these settings."""
    content = {
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        "tokenizer": tokenizer.to_state(),
        **({"train_config": asdict(trained)} if trained else {}),
    }
    checkpoint.save(path, content)
    return path
