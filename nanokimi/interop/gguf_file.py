"""A model as a GGUF file, architecture ``deepseek2``: what llama.cpp and the programs built on it read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_path
from nanokimi.interop.gguf_tokenizer import Vocabulary, gguf_vocabulary
from nanokimi.model.attention import frequencies, rotary_tables, softmax_scale
from nanokimi.model.layers import LATENT_EPS

if TYPE_CHECKING:
    from gguf import GGUFWriter

DTYPES = ("f32", "f16", "bf16", "q8_0")
Q8_BLOCK = 32  # a row of Q8_0 consists of blocks of so many weights
# What llama.cpp has room for; beyond that it ends the whole process.
MAX_LAYERS, MAX_EXPERTS, MAX_ACTIVATED = 512, 1024, 24
BETA_FAST, BETA_SLOW = 32.0, 1.0  # the keys for these are not read for this architecture

# Ours -> theirs, behind "layers.i." and "blk.i."; wkv_b is two tensors there.
LAYER_NAMES = {
    "attention_norm.weight": "attn_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "attention.wq.weight": "attn_q.weight",
    "attention.wq_a.weight": "attn_q_a.weight",
    "attention.q_norm.weight": "attn_q_a_norm.weight",
    "attention.wq_b.weight": "attn_q_b.weight",
    "attention.wkv_a.weight": "attn_kv_a_mqa.weight",
    "attention.kv_norm.weight": "attn_kv_a_norm.weight",
    "attention.wo.weight": "attn_output.weight",
    "mlp.w1.weight": "ffn_gate.weight",
    "mlp.w2.weight": "ffn_down.weight",
    "mlp.w3.weight": "ffn_up.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.balance_bias": "exp_probs_b.bias",
    "mlp.experts.w1": "ffn_gate_exps.weight",
    "mlp.experts.w2": "ffn_down_exps.weight",
    "mlp.experts.w3": "ffn_up_exps.weight",
    "mlp.shared.w1.weight": "ffn_gate_shexp.weight",
    "mlp.shared.w2.weight": "ffn_down_shexp.weight",
    "mlp.shared.w3.weight": "ffn_up_shexp.weight",
}
TOP_NAMES = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    dtype: str,
    name: str,
) -> None:
    """Writes the model to ``path``, one tensor after the other; the name appears once the file is complete.

    Norms, routers and biases stay fp32; of a ``q8_0`` file, rows that are no multiple of 32 stay fp16.
    Deterministic: the same model gives the same bytes.

    Args:
        weights: by the names of ``Transformer.state_dict()``, in any floating type.
        dtype: one of ``DTYPES``.
        name: the model's name inside the file.

    Raises:
        UserError: llama.cpp cannot compute exactly this model or split text as its tokenizer does, a weight does
            not fit into ``dtype``, or the package ``gguf`` is missing.
        OSError: the disk is full or the folder not writable.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UserError("writing GGUF needs the package gguf: pip install 'nanokimi[gguf]'") from error
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: GGUF files have one of {', '.join(DTYPES)}")
    require_expressible(config)
    vocabulary = gguf_vocabulary(tokenizer, config.vocab_size)
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, "deepseek2")
        try:
            _add_settings(writer, config, dtype, name)
            _add_vocabulary(writer, vocabulary, tokenizer)
            _write_tensors(writer, config, weights, dtype)
        finally:
            writer.close()


def require_expressible(config: ModelConfig) -> None:
    """Checks that llama.cpp's ``deepseek2`` can compute this model exactly.

    Raises:
        UserError: it cannot; the message names the field.
    """
    if config.attention != "mla":
        raise UserError(
            f"attention is {config.attention}: llama.cpp's deepseek2 has mla alone, so it cannot be exported"
        )
    lite = config.n_layers in (26, 27) or (config.n_layers == 48 and config.vocab_size == 128256)
    yarn = config.rope_factor > 1
    turns = config.original_seq_len / (2 * math.pi)  # of the fastest pair; the slowest makes theta times fewer
    grouped = config.n_limited_groups < config.n_expert_groups
    problems = {
        f"qk_nope_head_dim is {config.qk_nope_head_dim}: llama.cpp needs 1 or more": not config.qk_nope_head_dim,
        "n_shared_experts is 0: llama.cpp needs one (see with_shared_expert)": (
            config.n_moe_layers > 0 and not config.n_shared_experts
        ),
        f"n_layers is {config.n_layers}, by which llama.cpp recognises models without q_lora_rank, but q_lora_rank is "
        f"{config.q_lora_rank}": lite and config.q_lora_rank > 0,
        "score_func is softmax with n_limited_groups below n_expert_groups: llama.cpp scores a group by its two best "
        "experts, softmax routing by its best one": grouped and config.score_func == "softmax",
        f"n_routed_experts is {config.n_routed_experts}: llama.cpp has room for {MAX_EXPERTS}": (
            config.n_routed_experts > MAX_EXPERTS
        ),
        f"n_activated_experts is {config.n_activated_experts}: llama.cpp has room for {MAX_ACTIVATED}": (
            config.n_activated_experts > MAX_ACTIVATED
        ),
        f"n_layers is {config.n_layers}: llama.cpp has room for {MAX_LAYERS}": config.n_layers > MAX_LAYERS,
        f"beta_fast is {config.beta_fast:g} and beta_slow {config.beta_slow:g}: llama.cpp takes {BETA_FAST:g} and "
        f"{BETA_SLOW:g} whatever the file says": yarn and not _same_frequencies(config),
        f"original_seq_len is {config.original_seq_len}: llama.cpp stretches contexts otherwise that are so short or "
        "long for rope_theta": yarn and not BETA_SLOW <= turns < BETA_FAST * config.rope_theta**2,
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{problem}; GGUF cannot express this model: export it to hf instead")


def _same_frequencies(config: ModelConfig) -> bool:
    return torch.equal(frequencies(config), frequencies(replace(config, beta_fast=BETA_FAST, beta_slow=BETA_SLOW)))


# ---- what the file says ----------------------------------------------------------------------------------


def _add_settings(writer: GGUFWriter, config: ModelConfig, dtype: str, name: str) -> None:
    from gguf import GGML_QUANT_VERSION, ExpertGatingFuncType, LlamaFileType

    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[dtype]
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_leading_dense_block_count(config.n_dense_layers)
    writer.add_feed_forward_length(config.inter_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    # Attention runs in the latent space: one key of width R + P for all heads, of which R are the value.
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_expert_feed_forward_length(config.moe_inter_dim)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.n_activated_experts)
    writer.add_expert_shared_count(max(config.n_shared_experts, 1))  # also where all layers are dense
    writer.add_expert_weights_scale(config.route_scale)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(ExpertGatingFuncType[config.score_func.upper()])
    if config.n_limited_groups < config.n_expert_groups:
        writer.add_expert_group_count(config.n_expert_groups)
        writer.add_expert_group_used_count(config.n_limited_groups)
    _add_rope(writer, config)


def _add_rope(writer: GGUFWriter, config: ModelConfig) -> None:
    from gguf import RopeScalingType

    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_factor == 1:
        return
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(config.original_seq_len)
    writer.add_rope_scaling_yarn_beta_fast(config.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(config.beta_slow)
    # llama.cpp multiplies queries and keys by attn_factor where they are rotated, and all logits by the square of
    # attn_factor * (1 + log_mul * log(factor)); where log_mul is 0, by something else.
    rotated = float(rotary_tables(replace(config, max_seq_length=1))[0][0, 0])
    all_dims = math.sqrt(softmax_scale(config) * math.sqrt(config.qk_head_dim))
    log_mul = (all_dims / rotated - 1) / math.log(config.rope_factor)
    writer.add_rope_scaling_yarn_log_mul(log_mul or 1e-9)
    if rotated != 1:
        writer.add_rope_scaling_attn_factors(rotated)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_eot_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


# ---- weights ---------------------------------------------------------------------------------------------


def stored_weights(config: ModelConfig, weights: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """``weights`` in fp32 as a file of type ``dtype`` holds them: rounded where it rounds them."""
    stored = {}
    for name, weight in weights.items():
        parts = [_decode(_encode(name, part, kind), kind) for _, part, kind in _parts(config, name, weight, dtype)]
        if name.endswith("wkv_b.weight"):
            stored[name] = torch.cat((parts[0].transpose(1, 2), parts[1]), dim=1).reshape(weight.shape)
        else:
            stored[name] = _rounded(weight, dtype) if _scale(config, name) != 1 else parts[0]
    return stored


def _write_tensors(writer: GGUFWriter, config: ModelConfig, weights: Mapping[str, Tensor], dtype: str) -> None:
    """All tensors: first what they are, then one after the other what is in them."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    for name, weight in weights.items():
        for theirs, part, kind in _parts(config, name, torch.empty_like(weight, device="meta"), dtype):
            raw = GGMLQuantizationType[kind]
            size = math.prod(quant_shape_to_byte_shape(part.shape, raw))
            writer.add_tensor_info(theirs, part.shape, np.dtype(np.float32), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in weights.items():
        for _, part, kind in _parts(config, name, weight, dtype):
            writer.write_tensor_data(_encode(name, part, kind))


def _parts(config: ModelConfig, name: str, weight: Tensor, dtype: str) -> Iterator[tuple[str, Tensor, str]]:
    """Their name, contents and GGUF type of what becomes of our tensor ``name``."""
    if name in TOP_NAMES:
        yield TOP_NAMES[name], weight, _kind(weight, dtype)
        return
    _, layer, inner = name.split(".", 2)
    prefix = f"blk.{layer}."
    if inner == "attention.wkv_b.weight":
        rows = (config.qk_nope_head_dim, config.v_head_dim)
        w_k, w_v = weight.unflatten(0, (config.n_heads, sum(rows))).split(rows, dim=1)
        w_k = w_k.transpose(1, 2)  # absorbed into the query: [H, R, N]
        yield f"{prefix}attn_k_b.weight", w_k, _kind(w_k, dtype)
        yield f"{prefix}attn_v_b.weight", w_v, _kind(w_v, dtype)
    elif (scale := _scale(config, name)) != 1:
        latent, rotary = _rounded(weight, dtype).tensor_split(
            (config.kv_lora_rank,) if "wkv_a" in inner else (len(weight),)
        )
        yield prefix + LAYER_NAMES[inner], torch.cat((latent * scale, rotary)), "F32"
    else:
        exact = inner.startswith("mlp.router.")
        yield prefix + LAYER_NAMES[inner], weight, "F32" if exact else _kind(weight, dtype)


def _scale(config: ModelConfig, name: str) -> float:
    """Factor of the latents that makes up for the one eps llama.cpp has for all norms.

    ``c x / sqrt(c² mean(x²) + norm_eps)`` is ``x / sqrt(mean(x²) + LATENT_EPS)`` for ``c² = norm_eps / LATENT_EPS``.
    """
    latent = name.endswith((".attention.wq_a.weight", ".attention.wkv_a.weight"))
    return math.sqrt(config.norm_eps / LATENT_EPS) if latent else 1.0


def _kind(part: Tensor, dtype: str) -> str:
    if part.dim() == 1:
        return "F32"
    return "F16" if dtype == "q8_0" and part.shape[-1] % Q8_BLOCK else dtype.upper()


def _rounded(weight: Tensor, dtype: str) -> Tensor:
    half = {"f16": torch.float16, "bf16": torch.bfloat16}.get(dtype)
    return weight.float() if half is None else weight.to(half).float()


def _encode(name: str, part: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The bytes of ``part``; UserError, naming our tensor, if it holds what ``kind`` cannot."""
    from gguf import GGMLQuantizationType, quantize

    half = torch.finfo(torch.float16).max
    largest = {"F16": half, "Q8_0": 127 * half, "BF16": torch.finfo(torch.bfloat16).max}.get(kind, math.inf)
    low, high = map(float, part.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name}: holds values that are not finite: export an earlier checkpoint")
    if max(-low, high) > largest:
        raise UserError(f"{name}: holds values from {low:g} to {high:g}, beyond those of {kind}: choose dtype f32")
    if kind == "BF16":
        return part.bfloat16().contiguous().view(torch.uint8).numpy()
    if kind == "Q8_0":
        quantized: np.ndarray[Any, Any] = quantize(part.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
        return quantized
    return part.to(torch.float16 if kind == "F16" else torch.float32).contiguous().numpy()


def _decode(encoded: np.ndarray[Any, Any], kind: str) -> Tensor:
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(encoded, GGMLQuantizationType[kind]))
