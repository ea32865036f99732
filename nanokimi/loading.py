"""``load``: a model ready for use, from a checkpoint file alone."""

from __future__ import annotations

from pathlib import Path

import torch

from nanokimi import checkpoint
from nanokimi.config import ModelConfig, from_dict
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.model.transformer import Transformer


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model of a checkpoint, in evaluation mode on ``device``, and its tokenizer.

    Raises:
        CheckpointError: missing, damaged or foreign file; the message says which and why.
    """
    path = Path(path)
    content = checkpoint.read(path)
    checkpoint.require(path, content, "model_config", "model", "tokenizer")
    config = from_dict(ModelConfig, content["model_config"])
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device=device)
    load_weights(path, model, content["model"])
    model.reset_buffers()
    return model.eval(), Tokenizer.from_state(content["tokenizer"])


def load_weights(path: Path, model: Transformer, saved: dict[str, torch.Tensor]) -> None:
    """Copies saved weights into ``model``; CheckpointError, naming the misfits, unless all of them fit."""
    saved = checkpoint.plain_state(saved)
    checkpoint.check_fits(path, saved, model.state_dict())
    model.load_state_dict(saved)
