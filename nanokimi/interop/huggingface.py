"""Our weight names and transformers' for one architecture: DeepSeek-V3, and V2. Renaming, no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nanokimi.config import ModelConfig

# Ours -> theirs, behind "layers.i." and "model.layers.i.".
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
    "mlp.w3.weight": "mlp.up_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.balance_bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "mlp.shared.w2.weight": "mlp.shared_experts.down_proj.weight",
    "mlp.shared.w3.weight": "mlp.shared_experts.up_proj.weight",
}
TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def their_names(name: str, n_experts: int) -> list[str]:
    """What our tensor ``name`` is called on disk; a stack of experts is one tensor per expert there."""
    if name in TOP_NAMES:
        return [TOP_NAMES[name]]
    _, layer, inner = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if inner.startswith("mlp.experts."):
        part = EXPERT_NAMES[inner.removeprefix("mlp.experts.")]
        return [f"{prefix}mlp.experts.{expert}.{part}.weight" for expert in range(n_experts)]
    return [prefix + LAYER_NAMES[inner]]


def to_huggingface(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a model, by the names of its ``state_dict()``, as a Hugging Face folder has them.

    Softmax-routed models become DeepSeek-V2's, which has no balance bias.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(".balance_bias") and config.score_func == "softmax":
            continue
        theirs = their_names(name, config.n_routed_experts)
        renamed |= zip(theirs, tensor.unbind(), strict=True) if ".experts." in name else {theirs[0]: tensor}
    return renamed


def from_huggingface(
    weights: Mapping[str, Tensor], config: ModelConfig, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The way back: a folder's tensors under the names of ``expected``, the ``state_dict()`` of such a model.

    Raises:
        KeyError: a tensor is missing.
    """
    renamed: dict[str, Tensor] = {}
    for name, like in expected.items():
        theirs = their_names(name, config.n_routed_experts)
        if name.endswith(".balance_bias") and config.score_func == "softmax":
            renamed[name] = torch.zeros(like.shape)
        else:
            renamed[name] = (
                torch.stack([weights[part] for part in theirs]) if ".experts." in name else weights[theirs[0]]
            )
    return renamed
