"""A model as a Hugging Face folder: safetensors, ``config.json``, tokenizer files, model card."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from nanokimi.config import ModelConfig, from_dict
from nanokimi.data.tokenizer import CHAT_TEMPLATE, CONFIG, Tokenizer, load_tokenizer
from nanokimi.errors import UserError
from nanokimi.files import new_folder
from nanokimi.interop.hf_config import FIELDS, huggingface_config, model_values
from nanokimi.interop.huggingface import from_huggingface, to_huggingface
from nanokimi.interop.model_card import model_card
from nanokimi.interop.receipt import RECEIPT, verify_receipt
from nanokimi.interop.shards import INDEX, WEIGHTS, Shards, read_json
from nanokimi.interop.stored import StoredModel, with_shared_expert
from nanokimi.model.transformer import Transformer

OWN = "nanokimi.json"
SHARD_BYTES = 5_000_000_000
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# What only we have, and config.json has no place for.
_OWN_FIELDS = set(ModelConfig.__dataclass_fields__) - {*FIELDS, "rope_theta", "rope_factor", "score_func"}
_ALWAYS_SO = ("attention", "n_kv_heads")  # fields that have but one value in such a folder


# ---- writing --------------------------------------------------------------------------------------------


def write_folder(folder: Path, model: StoredModel, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes ``model`` into ``folder``, which is there and empty; returns its files.

    Nothing depends on time or place: the same model leaves the same bytes.

    Args:
        shard_bytes: weights beyond this size are split over several files.

    Raises:
        UserError: a model that neither DeepseekV3ForCausalLM nor DeepseekV2ForCausalLM can express exactly.
        OSError: the disk is full.
    """
    require_expressible(model)
    model = with_shared_expert(model)
    dtype = str(DTYPES[dtype_of(model)]).removeprefix("torch.")
    eot = model.tokenizer.eot_id
    special = {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": eot, "pad_token_id": eot}
    texts = {
        "config.json": _json({**huggingface_config(model.config), **special, "torch_dtype": dtype}),
        "generation_config.json": _json(special),
        **tokenizer_files(model.tokenizer, model.config.max_seq_length),
        OWN: _json({"model_config": _own_config(model.config), "training": dict(model.training)}),
        "README.md": model_card(model, dtype),
    }
    return [*_write_texts(folder, texts), *_write_weights(folder, model.config, model.weights, shard_bytes)]


def save_model(target: Path, config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Makes the folder ``target`` of a model without its tokenizer, by the names of ``Transformer.state_dict()``.

    Raises:
        UserError: as for ``write_folder``, or ``target`` exists.
    """
    dtype = str(weights["head.weight"].dtype).removeprefix("torch.")
    texts = {
        "config.json": _json({**huggingface_config(config), "torch_dtype": dtype}),
        OWN: _json({"model_config": _own_config(config), "training": {}}),
    }
    try:
        with new_folder(target) as folder:
            _write_texts(folder, texts)
            _write_weights(folder, config, weights, SHARD_BYTES)
    except FileExistsError as error:
        raise UserError(f"{target}: exists already: choose another name, or remove it") from error


def _own_config(config: ModelConfig) -> dict[str, Any]:
    values = {**asdict(config), "tokenizer_name": _without_folders(config.tokenizer_name)}
    return {name: value for name, value in values.items() if name not in _ALWAYS_SO}


def _write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in texts]


def dtype_of(model: StoredModel) -> str:
    """The type in which the matrices are stored: a key of ``DTYPES``."""
    stored = model.weights["head.weight"].dtype
    return next(name for name, dtype in DTYPES.items() if dtype == stored)


def with_dtype(model: StoredModel, dtype: str) -> StoredModel:
    """The same model with weights of type ``dtype``, a key of ``DTYPES``; balance biases are always fp32.

    Raises:
        UserError: an unknown type, or one that does not reach as far as the values.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of auto, {', '.join(DTYPES)}")
    cast = {
        name: weight.to(torch.float32 if name.endswith(".balance_bias") else DTYPES[dtype])
        for name, weight in model.weights.items()
    }
    for name, weight in cast.items():
        if not weight.isfinite().all():
            raise UserError(f"{name}: holds values beyond those of {dtype}: choose --dtype bf16 or f32")
    return replace(model, weights=cast)


def require_expressible(model: StoredModel) -> None:
    """Raises UserError unless transformers has a model that computes the same."""
    huggingface_config(model.config)
    if model.config.score_func == "softmax":
        biased = [name for name, bias in model.weights.items() if name.endswith(".balance_bias") and bias.any()]
        if biased:
            raise UserError(
                f"{biased[0]} is not zero: transformers' DeepseekV2ForCausalLM, the one with softmax scores, has no "
                "balance bias, so this model cannot be exported; train with bias_update_rate=0, or with sigmoid scores"
            )


def require_finite(model: StoredModel) -> None:
    """Raises UserError, naming the weight, if one holds NaN or infinity."""
    for name, weight in model.weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{name}: holds values that are not finite: export an earlier checkpoint")


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, str]:
    """``tokenizer.json`` and its companions; unless it came with another, the end of text also begins, as in GPT-2."""
    bos = {"bos_token": tokenizer.bos} if tokenizer.bos else {}
    special = {**bos, "eos_token": tokenizer.eot, "pad_token": tokenizer.eot}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one name that transformers 4 and 5 both load
        **special,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds one that its generate() refuses
    }
    template = {} if tokenizer.chat_template is None else {CHAT_TEMPLATE: tokenizer.chat_template}
    return {
        "tokenizer.json": tokenizer.to_json(),
        CONFIG: _json(settings),
        "special_tokens_map.json": _json(special),
        **template,
    }


def _without_folders(tokenizer_name: str) -> str:
    """Names of the hub as they are; of paths the last part, for they are private."""
    path = Path(tokenizer_name)
    return path.name if path.is_absolute() or path.suffix == ".json" else tokenizer_name


def _write_weights(
    folder: Path, config: ModelConfig, weights: Mapping[str, torch.Tensor], shard_bytes: int
) -> list[Path]:
    renamed = to_huggingface(weights, config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in renamed.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    files: list[Path] = []
    home: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        whole = {name: renamed[name].detach().contiguous().clone() for name in names}  # experts share one storage
        save_file(whole, folder / file, metadata={"format": "pt"})
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # not for the owner alone
        files.append(folder / file)
        home |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in renamed.values())
        (folder / INDEX).write_text(_json({"metadata": {"total_size": total}, "weight_map": home}), encoding="utf-8")
        files.append(folder / INDEX)
    return files


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


# ---- reading --------------------------------------------------------------------------------------------


def read_folder(folder: Path, *, tokenizer: str = "") -> StoredModel:
    """The model of a Hugging Face folder with DeepSeek-V3's, V2's, Kimi K2's or Moonlight's architecture.

    Args:
        tokenizer: a ``tokenizer.json``, or a folder that holds one, in the place of the folder's own.

    Raises:
        UserError: missing, damaged or truncated files, another architecture, features that our network lacks,
            shapes that do not fit ``config.json``, no tokenizer; one line that says which.
    """
    read = read_weights(folder, () if tokenizer else ("tokenizer.json", CONFIG, CHAT_TEMPLATE))
    return StoredModel(read.config, read.weights, find_tokenizer(folder, tokenizer, read.config), *read[2:])


class StoredWeights(NamedTuple):
    """What ``StoredModel`` holds, but for the tokenizer."""

    config: ModelConfig
    weights: Mapping[str, torch.Tensor]
    training: Mapping[str, Any]
    notes: tuple[str, ...]


def read_weights(folder: Path, others: Collection[str] = ()) -> StoredWeights:
    """The model of a folder without its tokenizer; errors as for ``read_folder``.

    Args:
        others: files that will be read too, which the folder's receipt has to vouch for.
    """
    content = read_json(folder / "config.json")
    weights = Shards(folder)
    verify_receipt(folder / RECEIPT, ("config.json", *others, OWN, INDEX, *weights.files))
    values, notes = model_values(content, str(folder / "config.json"))
    kept, training = _own_values(folder / OWN)
    config = from_dict(ModelConfig, {"tokenizer_name": folder.resolve().name, **kept, **values})
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    if content.get("tie_word_embeddings"):
        weights.alias("lm_head.weight", "model.embed_tokens.weight")
    notes += weights.fit(to_huggingface(expected, config), config.n_layers)
    renamed = from_huggingface(weights, config, expected)
    return StoredWeights(config, renamed, training, tuple(notes))


def _own_values(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``nanokimi.json``, where there is one, adds to ``config.json``: fields of ModelConfig, and the training."""
    if not path.is_file():
        return {}, {"imported": True}
    content = read_json(path)
    fields, training = content.get("model_config"), content.get("training")
    if not isinstance(fields, dict) or not isinstance(training, dict):
        raise UserError(f"{path}: lacks model_config or training: remove it, or copy it again")
    return {name: value for name, value in fields.items() if name in _OWN_FIELDS}, training


def find_tokenizer(folder: Path, named: str, config: ModelConfig) -> Tokenizer:
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
