"""The model card of an export: what the model is, how it was trained, how to open it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanokimi.config import ModelConfig
from nanokimi.interop.hf_config import ARCHITECTURES
from nanokimi.interop.receipt import RECEIPT
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer

# Settings of the run that a reader wants to know, and that hold no path.
SETTINGS = (
    "dataset", "hf_repo_name", "hf_config", "batch_size", "gradient_accumulation", "learning_rate", "adam_lr",
    "momentum", "weight_decay", "schedule", "qk_clip_tau", "seed",
)  # fmt: skip


def training_figures(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells about its training, in plain values; of paths only the last part, they are private."""
    if "train_config" not in content:
        return dict(content.get("training", {}))
    config, counters, history = content["train_config"], content.get("counters", {}), content.get("history", "")
    kept = {name: config[name] for name in SETTINGS if config.get(name) not in ("", None)}
    if config.get("init_from"):
        kept["init_from"] = Path(config["init_from"]).name
    if config.get("dataset") in ("local", "localstreaming", "tokenbin"):
        kept["data"] = "a mixture" if config.get("mix") else _last_parts(config["data_path"])
    measured = {name: _last(history, name) for name in ("train_ce_loss", "val_loss", "val_bits_per_byte")}
    return {
        "steps": counters.get("step"),
        "tokens": counters.get("tokens"),
        **{name: value for name, value in measured.items() if value is not None},
        **kept,
    }


def _last(history: str, name: str) -> float | None:
    """The last number called ``name`` in the lines of a history, which may be long: only its end is read."""
    end = len(history)
    while (at := history.rfind(f'"{name}":', 0, end)) >= 0:
        end = history.rfind("\n", 0, at) + 1
        value: float | None = json.loads(history[end : history.index("\n", at)])[name]
        if value is not None:
            return value
    return None


def _last_parts(paths: str) -> str:
    return ", ".join(Path(path.strip()).name for path in paths.split(","))


def model_card(model: StoredModel, dtype: str) -> str:
    """``README.md`` of the exported folder, with the front matter that the hub reads."""
    model_type, architecture = ARCHITECTURES[model.config.score_func]
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

{_table(_shape(model.config, dtype))}

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


def _shape(config: ModelConfig, dtype: str) -> dict[str, str]:
    with torch.device("meta"):
        network = Transformer(config)
    return {
        "parameters": f"{network.num_parameters():,}",
        "active per token": f"{network.num_parameters(active=True):,}",
        "layers (dense)": f"{config.n_layers} ({config.n_dense_layers})",
        "width, heads": f"{config.dim}, {config.n_heads}",
        "experts: routed / active / shared": f"{config.n_routed_experts} / {config.n_activated_experts} / "
        f"{config.n_shared_experts}",
        "context": f"{config.max_seq_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
        "weights": dtype,
    }


def _training(figures: Mapping[str, Any]) -> str:
    if figures.get("imported"):
        return "The weights were imported; how they were trained is not known here."
    if not figures:
        return "How this model was trained is not recorded."
    words = {"train_ce_loss": "training loss, nats per token", "val_loss": "held-out loss, nats per token"}
    words |= {"val_bits_per_byte": "held-out bits per byte"}
    rows = {words.get(name, name.replace("_", " ")): _shown(value) for name, value in figures.items()}
    return "With MuonClip (Muon, AdamW and per-head QK-Clip).\n\n" + _table(rows)


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}" if value > 9999 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else f"`{value}`"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
