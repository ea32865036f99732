"""Saved weights into a model: the one way in, for a model on one device or spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanokimi.checkpoint.file import check_fits, plain_state
from nanokimi.config import ModelConfig
from nanokimi.model.transformer import Transformer
from nanokimi.parallel.ranks import ParallelModel, SingleDevice


def load_weights(path: Path, model: ParallelModel, saved: Mapping[str, Tensor]) -> None:
    """Copies into ``model`` its rows of the weights ``saved``, read from ``path``.

    Raises:
        CheckpointError: names or shapes do not fit; the message names the first of them.
    """
    saved = plain_state(saved)
    here = model.model.state_dict()
    check_fits(path, saved, {name: model.as_dtensor(name, tensor) for name, tensor in here.items()})
    with torch.no_grad():
        for name, tensor in here.items():
            model.copy_rows(name, tensor, saved[name])


def build_model(
    path: Path, config: ModelConfig, saved: Mapping[str, Tensor], device: str | torch.device = "cpu"
) -> Transformer:
    """A model with the weights ``saved``, read from ``path``, in evaluation mode; CheckpointError unless they fit."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device=device)
    load_weights(path, SingleDevice(model), saved)
    model.reset_buffers()
    return model.eval()
