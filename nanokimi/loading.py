"""``load``: a model ready for use, from a checkpoint, whole or sharded, or from a folder in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nanokimi import checkpoint
from nanokimi.checkpoint import shards
from nanokimi.checkpoint.weights import build_model
from nanokimi.config import ModelConfig, from_dict
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.interop.download import download_model
from nanokimi.interop.hf_folder import read_folder, read_weights
from nanokimi.interop.model_card import training_figures
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer

WEIGHTS = "model."  # before the names of weights in a sharded checkpoint


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model of a checkpoint (a file, or a folder ``step_N``) or of a Hugging Face folder, and its tokenizer.

    The model is in evaluation mode on ``device``; weights are fp32 in memory, whatever they are stored as.

    Raises:
        UserError: missing, damaged or foreign files, an architecture or a feature that nanokimi does not have;
            the message says which and why.
    """
    stored = read_model(path)
    return build_model(Path(path), stored.config, stored.weights, device), stored.tokenizer


def load_pretrained(name: str | Path, device: str | torch.device = "cpu") -> Transformer:
    """``load`` without the tokenizer, which the folder need not have; ``name`` may be a hub repository too.

    Raises:
        UserError: as for ``load``, or the hub has no such repository or cannot be reached.
    """
    path = Path(name)
    if not path.exists() and path.suffix not in (".pt", ".gguf") and str(name).count("/") == 1:
        path = download_model(str(name))
    stored = read_weights(path) if _is_huggingface(path) else read_model(path)
    return build_model(path, stored.config, stored.weights, device)


def read_model(path: str | Path, *, tokenizer: str = "") -> StoredModel:
    """What lies at ``path``, not built yet; errors as for ``load``.

    Args:
        tokenizer: takes the place of a folder's own, see ``interop.hf_folder.read_folder``.
    """
    path = Path(path)
    if shards.is_sharded(path):
        return _of_run(path, _read_shards(path))
    if _is_huggingface(path):
        return read_folder(path, tokenizer=tokenizer)
    if path.suffix == ".gguf":
        raise UserError(f"{path}: GGUF files are for other programs: name the checkpoint that it was made from")
    return _of_run(path, checkpoint.read(path))


def _is_huggingface(path: Path) -> bool:
    described = (path / "config.json").exists() or any(path.glob("*.safetensors"))
    return path.is_dir() and described and not shards.is_sharded(path)


def _read_shards(path: Path) -> dict[str, Any]:
    """What a file of the same run would hold, but for the optimizer state."""
    shards.verify(path)
    names = [name for name in shards.shapes(path) if name.startswith(WEIGHTS)]
    found = shards.read_tensors(path, names)
    weights = {name.removeprefix(WEIGHTS): tensor for name, tensor in found.items()}
    return {**shards.read_about(path), "model": weights}


def _of_run(path: Path, content: dict[str, Any]) -> StoredModel:
    checkpoint.require(path, content, "model_config", "model", "tokenizer")
    return StoredModel(
        from_dict(ModelConfig, content["model_config"]),
        checkpoint.plain_state(content["model"]),
        Tokenizer.from_state(content["tokenizer"]),
        training_figures(content),
    )
