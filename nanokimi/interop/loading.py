"""Reads models: checkpoints, whole or sharded, folders in Hugging Face format, and repositories of the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanokimi import checkpoint
from nanokimi.checkpoint import shards
from nanokimi.checkpoint.weights import build_model
from nanokimi.config import ModelConfig, from_dict
from nanokimi.data.tokenizer import Tokenizer, hub_problem
from nanokimi.errors import UserError
from nanokimi.interop.hf_reader import read_folder, read_weights
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer

# Settings of a run that the reader of a model card wants to know, and that hold no path.
TEXT_SETTINGS = ("dataset", "hf_repo_name", "hf_config")
STEP_SETTINGS = ("batch_size", "gradient_accumulation", "learning_rate", "adam_lr", "momentum", "weight_decay")
SETTINGS = (*TEXT_SETTINGS, *STEP_SETTINGS, "schedule", "qk_clip_tau", "seed")


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
        path = _download(str(name))
    if not _is_huggingface(path):
        return load(path, device)[0]
    config, weights, _, _ = read_weights(path)
    return build_model(path, config, weights, device)


def read_model(path: str | Path, *, tokenizer: str = "") -> StoredModel:
    """The model at ``path``, not built yet; errors as for ``load``.

    Args:
        tokenizer: is used in place of a folder's own, see ``interop.hf_reader.read_folder``.
    """
    path = Path(path)
    if _is_huggingface(path):
        return read_folder(path, tokenizer=tokenizer)
    if path.suffix == ".gguf":
        raise UserError(f"{path}: GGUF files are for other programs: name the checkpoint that it was made from")
    content = _read_shards(path) if shards.is_sharded(path) else checkpoint.read(path)
    checkpoint.require(path, content, "model_config", "model", "tokenizer")
    return StoredModel(
        from_dict(ModelConfig, content["model_config"]),
        checkpoint.plain_state(content["model"]),
        Tokenizer.from_state(content["tokenizer"]),
        training_figures(content),
    )


def _is_huggingface(path: Path) -> bool:
    described = (path / "config.json").exists() or any(path.glob("*.safetensors"))
    return path.is_dir() and described and not shards.is_sharded(path)


def _read_shards(path: Path) -> dict[str, Any]:
    """What a checkpoint file of the same run would hold, except for the optimizer state."""
    shards.verify(path)
    names = [name for name in shards.shapes(path) if name.startswith("model.")]
    found = shards.read_tensors(path, names)
    weights = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    return {**shards.read_about(path), "model": weights}


def _download(name: str) -> Path:
    """The folder of a repository ``owner/name`` in the local cache, brought up to date."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except HFValidationError:
        raise UserError(f"{name}: no such file or folder, and not a repository name (owner/name)") from None
    except Exception as error:  # besides its own errors, those of whichever HTTP client the hub library uses
        raise UserError(f"{name}: {hub_problem(error)}") from error


def training_figures(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells about its training, in plain values; of paths only the last part, they are private."""
    if "train_config" not in content:
        return dict(content.get("training", {}))
    config, counters, history = content["train_config"], content.get("counters", {}), content.get("history", "")
    kept = {name: config[name] for name in SETTINGS if config.get(name) not in ("", None)}
    if config.get("init_from"):
        kept["init_from"] = Path(config["init_from"]).name
    if config.get("dataset") in ("local", "localstreaming", "tokenbin"):
        names = ", ".join(Path(path.strip()).name for path in config["data_path"].split(","))
        kept["data"] = "a mixture" if config.get("mix") else names
    measured: dict[str, float] = {}
    lines = history.splitlines()[::-1]
    for name in ("train_ce_loss", "val_loss", "val_bits_per_byte"):
        values = (json.loads(line)[name] for line in lines if f'"{name}":' in line)
        last = next((value for value in values if value is not None), None)
        if last is not None:
            measured[name] = last
    return {"steps": counters.get("step"), "tokens": counters.get("tokens"), **measured, **kept}
