"""Our names and transformers' names for one architecture: ``DeepseekV3ForCausalLM``. Renaming, no arithmetic."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.errors import UserError
from nanokimi.model.transformer import Transformer

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
TOP_NAMES = {"embed": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def to_huggingface(model: Transformer) -> dict[str, Tensor]:
    """The state of ``model`` under the names a ``DeepseekV3ForCausalLM`` folder has on disk, one tensor per expert."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if layer is None:
            renamed[TOP_NAMES[name]] = tensor
            continue
        prefix, inner = f"model.layers.{layer[1]}.", layer[2]
        if inner.startswith("mlp.experts."):
            part = EXPERT_NAMES[inner.removeprefix("mlp.experts.")]
            renamed |= {f"{prefix}mlp.experts.{e}.{part}.weight": expert for e, expert in enumerate(tensor)}
        else:
            renamed[prefix + LAYER_NAMES[inner]] = tensor
    return renamed


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` of the same model for ``DeepseekV3ForCausalLM``; every field other engines read is explicit.

    Raises:
        UserError: softmax scores, which that architecture does not have.
    """
    if config.score_func != "sigmoid":
        raise UserError("score_func softmax has no place in DeepseekV3ForCausalLM, which scores by sigmoid")
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "max_position_embeddings": config.max_seq_length,
        "first_k_dense_replace": config.n_dense_layers,
        "intermediate_size": config.inter_dim,
        "moe_intermediate_size": config.moe_inter_dim,
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.n_activated_experts,
        "n_shared_experts": config.n_shared_experts,
        "n_group": config.n_expert_groups,
        "topk_group": config.n_limited_groups,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.route_scale,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank or None,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_interleave": True,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }
