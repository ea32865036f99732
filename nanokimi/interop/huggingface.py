"""Names of weights and the fields of ``config.json``: ours and those of transformers' DeepSeek-V3 and DeepSeek-V2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.errors import ConfigError, UserError

# Parts of the dotted names of weights: ours -> theirs.
NAMES = {
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "router": "gate",
    "balance_bias": "e_score_correction_bias",
    "shared": "shared_experts",
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
# Ours -> theirs, where both mean the same by the same number.
FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "max_seq_length": "max_position_embeddings",
    "n_dense_layers": "first_k_dense_replace",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_routed_experts": "n_routed_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_shared_experts": "n_shared_experts",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "norm_topk_prob": "norm_topk_prob",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
YARN_FIELDS = {
    "rope_factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# What a field means that is not there, the same in every engine. The others must be there: engines differ in them.
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
YARN_DEFAULTS: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
# What our network has in one way only: every other value is a feature that it lacks.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True}
ARCHITECTURES = {
    "sigmoid": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "softmax": ("deepseek_v2", "DeepseekV2ForCausalLM"),
}
SCORE_FUNCS = {"deepseek_v3": "sigmoid", "kimi_k2": "sigmoid", "deepseek_v2": "softmax"}


def their_names(name: str, n_experts: int) -> list[str]:
    """What our tensor ``name`` is called on disk; a stack of experts is one tensor per expert there."""
    theirs = ".".join(NAMES.get(part, part) for part in name.split("."))
    if ".experts." not in name:
        return [theirs]
    before, part = theirs.rsplit(".", 1)
    return [f"{before}.{expert}.{part}.weight" for expert in range(n_experts)]


def to_huggingface(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a model, by the names of its ``state_dict()``, as a Hugging Face folder has them.

    Softmax-routed models become DeepSeek-V2's, which has no balance bias.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(".balance_bias") and config.score_func == "softmax":
            continue
        parts = tensor.unbind() if ".experts." in name else (tensor,)
        renamed |= zip(their_names(name, config.n_routed_experts), parts, strict=True)
    return renamed


def from_huggingface(
    read: Callable[[str], Tensor], config: ModelConfig, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The way back: a folder's tensors under the names of ``expected``, the ``state_dict()`` of such a model."""
    renamed: dict[str, Tensor] = {}
    for name, like in expected.items():
        if name.endswith(".balance_bias") and config.score_func == "softmax":
            renamed[name] = torch.zeros(like.shape)
        else:
            parts = [read(theirs) for theirs in their_names(name, config.n_routed_experts)]
            renamed[name] = torch.stack(parts) if ".experts." in name else parts[0]
    return renamed


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` of the same model; every field that other engines read is explicit.

    Raises:
        UserError: another attention than MLA, or softmax scores in a way that DeepSeek-V2 does not have.
    """
    if config.attention != "mla":
        raise UserError(
            f"attention is {config.attention}: transformers' DeepSeek models have mla alone, so it cannot be exported"
        )
    topk_method = "noaux_tc"
    if config.score_func == "softmax":
        topk_method = "greedy" if config.n_expert_groups == config.n_limited_groups else "group_limited_greedy"
        if config.norm_topk_prob:
            raise UserError(
                "norm_topk_prob with score_func softmax: transformers' DeepseekV2ForCausalLM does not normalise gate "
                "values, so this model cannot be exported; train with norm_topk_prob=false, or with sigmoid scores"
            )
    model_type, architecture = ARCHITECTURES[config.score_func]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "q_lora_rank": config.q_lora_rank or None,  # transformers asks whether it is None
        "num_key_value_heads": config.n_heads,
        "scoring_func": config.score_func,
        "topk_method": topk_method,
        **_rope(config),
        **FIXED,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Positions in the old spelling and in the new one: each engine reads but one of them."""
    plain = {"rope_type": "default", "rope_theta": config.rope_theta}
    yarn = {"rope_type": "yarn", **{theirs: getattr(config, ours) for ours, theirs in YARN_FIELDS.items()}}
    spelled = {"rope_theta": config.rope_theta, "rope_parameters": plain | yarn if config.rope_factor > 1 else plain}
    if config.rope_factor > 1:
        spelled["rope_scaling"] = {"type": "yarn", **yarn}
    elif config.score_func == "softmax":  # mlx-lm cannot do without it in a deepseek_v2: stretched by 1
        spelled["rope_scaling"] = {"type": "yarn", **yarn, "original_max_position_embeddings": config.max_seq_length}
    return spelled


def model_values(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Fields of ModelConfig that ``config.json`` decides, and notes on what of it was left out.

    Args:
        content: of the file ``where``, which messages name.

    Raises:
        UserError: another architecture, missing fields, features that our network lacks; all of them are listed.
    """
    model_type = content.get("model_type")
    score_func = SCORE_FUNCS.get(str(model_type))
    if score_func is None:
        raise UserError(
            f"{where}: model_type {model_type!r} is another architecture: only {', '.join(SCORE_FUNCS)} can be imported"
        )
    said = {name: value for name, value in content.items() if value is not None}
    if "q_lora_rank" in content:
        said.setdefault("q_lora_rank", 0)
    greedy = score_func == "softmax" and said.get("topk_method", "greedy") == "greedy"
    if greedy and (said.get("n_group") is None or said.get("n_group") != said.get("topk_group")):
        said |= {"n_group": 1, "topk_group": 1}
    values, missing = _translated(DEFAULTS | said, FIELDS)
    rope, rope_problems = _rope_values(said)
    if problems := missing + rope_problems + _features_we_lack(said, score_func):
        raise UserError(f"{where}: this model does not fit: {'; '.join(problems)}")
    values |= {"score_func": score_func, **rope}
    try:
        ModelConfig(**values)
    except ConfigError as error:
        ours, _, problem = str(error).partition(" ")
        raise UserError(f"{where}: {FIELDS.get(ours, ours)} {problem}") from error
    tied = "embedding and head were one matrix (tie_word_embeddings): the head is a copy of its own now"
    return values, [tied] if said.get("tie_word_embeddings") else []


def _translated(said: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Their values under our names, and which are missing."""
    values = {ours: said[theirs] for ours, theirs in names.items() if theirs in said}
    return values, [f"lacks {theirs}" for theirs in names.values() if theirs not in said]


def _features_we_lack(said: Mapping[str, Any], score_func: str) -> list[str]:
    allowed: dict[str, tuple[Any, ...]] = {
        **{name: (value,) for name, value in FIXED.items()},
        "scoring_func": (score_func,),
        "topk_method": ("noaux_tc",) if score_func == "sigmoid" else ("greedy", "group_limited_greedy"),
        "num_key_value_heads": (said.get("num_attention_heads"),),
        "quantization_config": (),
    }
    if score_func == "softmax":
        allowed["norm_topk_prob"] = (False,)
    return [
        f"{name} is {said[name]!r}, " + (f"not {' or '.join(map(repr, values))}" if values else "which is not read")
        for name, values in allowed.items()
        if name in said and said[name] not in values
    ]


def _rope_values(said: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our fields of the positions, and what is wrong with theirs."""
    parameters, scaling = said.get("rope_parameters", {}), said.get("rope_scaling", {})
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        return {}, ["rope_scaling is no JSON object"]
    given = parameters | scaling  # transformers prefers the old spelling
    rope = YARN_DEFAULTS | {name: value for name, value in given.items() if value is not None}
    theta = rope.get("rope_theta", said.get("rope_theta"))
    if theta is None:
        return {}, ["lacks rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or (kind == "yarn" and rope.get("factor") == 1):
        return {"rope_theta": theta, "rope_factor": 1.0}, []
    if kind != "yarn":
        return {}, [f"rope_scaling is of type {kind!r}, not 'yarn'"]
    rope.setdefault("original_max_position_embeddings", said.get("max_position_embeddings"))
    values, problems = _translated(rope, YARN_FIELDS)
    fixed = {"attention_factor": None, "truncate": True}
    problems += [f"has {name} {rope[name]!r}" for name, usual in fixed.items() if rope.get(name, usual) != usual]
    return {"rope_theta": theta, **values}, [f"rope_scaling {problem}" for problem in problems]
