"""Writes a model as a Hugging Face folder: safetensors, ``config.json``, tokenizer files, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import CHAT_TEMPLATE, CONFIG, Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import new_folder
from nanokimi.interop.hf_reader import INDEX, OWN, WEIGHTS
from nanokimi.interop.huggingface import ARCHITECTURES, huggingface_config, to_huggingface
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import meta_model
from nanokimi.receipt import RECEIPT

SHARD_BYTES = 5_000_000_000


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
    model = model.with_shared_expert()
    config, eot, dtype = model.config, model.tokenizer.eot_id, _dtype(model.weights)
    special = {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": eot, "pad_token_id": eot}
    texts = {
        "config.json": _json({**huggingface_config(config), **special, "torch_dtype": dtype}),
        "generation_config.json": _json(special),
        **tokenizer_files(model.tokenizer, config.max_seq_length),
        OWN: _own(config, model.training),
        "README.md": model_card(model, dtype),
    }
    return [*_write_texts(folder, texts), *_write_weights(folder, config, model.weights, shard_bytes)]


def save_model(target: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Makes the folder ``target`` of a model without its tokenizer, by the names of ``Transformer.state_dict()``.

    Raises:
        UserError: as for ``write_folder``, or ``target`` exists.
    """
    fields = {**huggingface_config(config), "torch_dtype": _dtype(weights)}
    texts = {"config.json": _json(fields), OWN: _own(config, {})}
    try:
        with new_folder(target) as folder:
            _write_texts(folder, texts)
            _write_weights(folder, config, weights, SHARD_BYTES)
    except FileExistsError as error:
        raise UserError(f"{target}: exists already: choose another name, or remove it") from error


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
    files = {
        "tokenizer.json": _that_adds_nothing(tokenizer.to_json()),
        CONFIG: _json(settings),
        "special_tokens_map.json": _json(special),
    }
    return files if tokenizer.chat_template is None else {**files, CHAT_TEMPLATE: tokenizer.chat_template}


def _that_adds_nothing(layout: str) -> str:
    """A ``tokenizer.json`` without the step that adds tokens to a text: the model has been trained without them."""
    inner = HFTokenizer.from_str(layout)
    if not inner.num_special_tokens_to_add(is_pair=False):
        return layout
    inner.post_processor = None
    return str(inner.to_str(pretty=True))


def _own(config: ModelConfig, training: Mapping[str, Any]) -> str:
    """``nanokimi.json``. The tokenizer's name loses its folders, which are private, unless it is one of the hub."""
    path = Path(config.tokenizer_name)
    name = path.name if path.is_absolute() or path.suffix == ".json" else config.tokenizer_name
    fields = {**asdict(config), "tokenizer_name": name}
    del fields["attention"], fields["n_kv_heads"]  # they have only one value in such a folder
    return _json({"model_config": fields, "training": dict(training)})


def _write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in texts]


def _write_weights(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], shard_bytes: int) -> list[Path]:
    renamed = to_huggingface(weights, config)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in renamed.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = folder / (WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors")
        own_memory = {name: tensor.detach().contiguous().clone() for name, tensor in shard.items()}  # experts share one
        save_file(own_memory, file, metadata={"format": "pt"})
        file.chmod((folder / "config.json").stat().st_mode)  # not for the owner alone
        files.append(file)
        weight_map |= dict.fromkeys(shard, file.name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in renamed.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files += _write_texts(folder, {INDEX: _json(index)})
    return files


def _dtype(weights: Mapping[str, Tensor]) -> str:
    return str(weights["head.weight"].dtype).removeprefix("torch.")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def model_card(model: StoredModel, dtype: str) -> str:
    """``README.md`` of the exported folder, with the front matter that the hub reads."""
    config, network = model.config, meta_model(model.config)
    model_type, architecture = ARCHITECTURES[config.score_func]
    experts = f"{config.n_routed_experts} / {config.n_activated_experts} / {config.n_shared_experts}"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanokimi
- {model_type}
- moe
- mla
---

# A nanokimi model

A base language model, trained to continue text. Its architecture is `{architecture}`: Multi-head Latent
Attention and a sparse Mixture of Experts.

| | |
|---|---|
| parameters | {network.num_parameters():,} |
| active per token | {network.num_parameters(active=True):,} |
| layers (dense) | {config.n_layers} ({config.n_dense_layers}) |
| width, heads | {config.dim}, {config.n_heads} |
| experts: routed / active / shared | {experts} |
| context | {config.max_seq_length:,} tokens |
| vocabulary | {config.vocab_size:,} |
| weights | {dtype} |

## Training

{_training(model.training)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))
```

With nanokimi: `nanokimi generate FOLDER --prompt "Once upon a time"`. `{RECEIPT}` holds the checksums of the files
and what an independent engine computed from them.
"""


def _training(figures: Mapping[str, Any]) -> str:
    if figures.get("imported"):
        return "The weights were imported; how they were trained is not known here."
    if not figures:
        return "How this model was trained is not recorded."
    words = {
        "train_ce_loss": "training loss, nats per token",
        "val_loss": "held-out loss, nats per token",
        "val_bits_per_byte": "held-out bits per byte",
    }
    lines = ["With MuonClip (Muon, AdamW and per-head QK-Clip).", "", "| | |", "|---|---|"]
    for name, value in figures.items():
        shown = f"{value:.4g}" if isinstance(value, float) else f"`{value}`"
        if isinstance(value, int):
            shown = f"{value:,}" if value > 9999 else str(value)
        lines.append(f"| {words.get(name, name.replace('_', ' '))} | {shown} |")
    return "\n".join(lines)
