"""Reads a Hugging Face folder: safetensors, ``config.json``, ``nanokimi.json`` and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanokimi.checkpoint import check_fits
from nanokimi.config import ModelConfig, from_dict
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.errors import UserError
from nanokimi.interop.huggingface import FIELDS, from_huggingface, model_values, to_huggingface
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import meta_model
from nanokimi.receipt import RECEIPT, verify_receipt

WEIGHTS, INDEX, OWN = "model.safetensors", "model.safetensors.index.json", "nanokimi.json"
# The fields of ModelConfig that only nanokimi.json holds.
OWN_FIELDS = set(ModelConfig.__dataclass_fields__) - {*FIELDS, "rope_theta", "rope_factor", "score_func"}


def read_folder(folder: Path, *, tokenizer: str = "") -> StoredModel:
    """The model of a Hugging Face folder with DeepSeek-V3's, V2's, Kimi K2's or Moonlight's architecture.

    Args:
        tokenizer: a ``tokenizer.json``, or a folder that holds one, in place of the folder's own.

    Raises:
        UserError: missing, damaged or truncated files, another architecture, features that our network lacks,
            shapes that do not fit ``config.json``, no tokenizer; one line that says which.
    """
    config, weights, training, notes = read_weights(folder)
    return StoredModel(config, weights, _find_tokenizer(folder, tokenizer, config), training, notes)


def read_weights(folder: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """What ``StoredModel`` holds, except for the tokenizer; errors as for ``read_folder``."""
    content = _read_json(folder / "config.json")
    files, tensors = _open_weights(folder)
    verify_receipt(folder / RECEIPT, ("config.json", OWN, INDEX, *files))
    values, notes = model_values(content, str(folder / "config.json"))
    kept, training = _own_values(folder / OWN)
    config = from_dict(ModelConfig, {"tokenizer_name": folder.resolve().name, **kept, **values})
    expected = meta_model(config).state_dict()
    if content.get("tie_word_embeddings") and "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    notes += _check_weights(folder, tensors, to_huggingface(expected, config), config.n_layers)

    def read(name: str) -> Tensor:
        file, key = tensors[name]
        tensor: Tensor = file.get_tensor(key)
        return tensor if key == name else tensor.clone()  # what was tied shares no memory here

    return config, from_huggingface(read, config, expected), training, tuple(notes)


def _open_weights(folder: Path) -> tuple[list[str], dict[str, tuple[Any, str]]]:
    """The names of the files that hold weights; and for each tensor its file, open, and its name in it."""
    index = folder / INDEX
    weight_map: Any = _read_json(index).get("weight_map") if index.is_file() else {"": WEIGHTS}
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise UserError(f"{index}: its weight_map is no list of tensors and files: copy it again")
    files = sorted(set(names))
    if not (folder / files[0]).is_file() and any(folder.glob("*.bin")):
        raise UserError(
            f"{folder}: its weights are pickles (*.bin), which can run code and are not read: convert them to "
            "safetensors"
        )
    tensors: dict[str, tuple[Any, str]] = {}
    for path in (folder / name for name in files):
        if not path.is_file():
            raise UserError(f"{path}: missing: copy the folder again")
        try:
            opened: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or damaged ({error}): copy it again") from error
        tensors |= {name: (opened, name) for name in opened.keys()}  # noqa: SIM118
    if lost := sorted(weight_map.keys() - tensors.keys() - {""}):
        raise UserError(f"{index}: lists {lost[0]}, which no file holds: copy the folder again")
    return files, tensors


def _check_weights(
    folder: Path, tensors: Mapping[str, tuple[Any, str]], expected: Mapping[str, Tensor], n_layers: int
) -> list[str]:
    """Checks names, shapes and types against ``expected``, by the folder's names; returns notes on what is left out."""
    left_out: list[str] = []
    found: dict[str, Tensor] = {}
    for name, (file, key) in tensors.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        predicts_further_tokens = layer.isdecimal() and int(layer) >= n_layers
        if name not in expected and (predicts_further_tokens or name.endswith("rotary_emb.inv_freq")):
            left_out.append(name)
            continue
        part = file.get_slice(key)
        if part.get_dtype() not in ("F32", "F16", "BF16"):
            raise UserError(
                f"{folder}: {name} is of type {part.get_dtype()}: quantised weights are not read, convert them to bf16"
            )
        if all(part.get_shape()):  # where there are no shared experts, transformers writes matrices without rows
            found[name] = torch.empty(part.get_shape(), device="meta")
    check_fits(folder, found, expected)
    names = ", ".join(left_out[:3]) + (" ..." if len(left_out) > 3 else "")
    note = f"left out, for the model works without (layers for further tokens, old tables): {names}"
    return [note] if left_out else []


def _own_values(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``nanokimi.json``, where there is one, adds to ``config.json``: fields of ModelConfig, and the training."""
    if not path.is_file():
        return {}, {"imported": True}
    content = _read_json(path)
    fields, training = content.get("model_config"), content.get("training")
    if not isinstance(fields, dict) or not isinstance(training, dict):
        raise UserError(f"{path}: lacks model_config or training: remove it, or copy it again")
    return {name: value for name, value in fields.items() if name in OWN_FIELDS}, training


def _find_tokenizer(folder: Path, named: str, config: ModelConfig) -> Tokenizer:
    """The tokenizer of the folder, or the one ``named``, under the name that ``config`` gives it."""
    if not named and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: there is no tokenizer.json in it: put one there, or `nanokimi import hf {folder} "
            "--tokenizer FILE` (byte takes plain bytes)"
        )
    found = load_tokenizer(named or str(folder))
    if found.vocab_size > config.vocab_size:
        raise UserError(
            f"{named or folder / 'tokenizer.json'}: has {found.vocab_size} entries, the model only "
            f"{config.vocab_size} (vocab_size): it belongs to another model"
        )
    found.name = config.tokenizer_name
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError, naming the file, where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        folder = path.parent
        problem = f"{path}: no such file" if folder.is_dir() else f"{folder} is a file"
        remedy = "name a folder in Hugging Face format"
        if not folder.exists():
            problem = f"{folder}: no such folder"
            remedy = f"for a model of the hub, `hf download OWNER/NAME --local-dir {folder}` first"
        raise UserError(f"{problem}: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object: copy it again")
    return content
