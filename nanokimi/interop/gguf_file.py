"""Writes a model as a GGUF file of the architecture ``deepseek2``, which llama.cpp and programs built on it read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.files import atomic_path
from nanokimi.interop.huggingface import their_names
from nanokimi.model.attention import frequencies, rotary_tables, softmax_scale
from nanokimi.model.layers import LATENT_EPS

if TYPE_CHECKING:
    from gguf import GGUFWriter

DTYPES = ("f32", "f16", "bf16", "q8_0")
Q8_BLOCK = 32  # a row of Q8_0 consists of blocks of so many weights
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # the format's types of tokens
# What llama.cpp has room for; beyond that it ends the whole process.
ROOM = {"n_routed_experts": 1024, "n_activated_experts": 24, "n_layers": 512}
BETA_FAST, BETA_SLOW = 32.0, 1.0  # llama.cpp does not read the keys for these in this architecture


def write_gguf(
    path: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, *, dtype: str, name: str
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
    with atomic_path(path) as temporary, closing(GGUFWriter(temporary, "deepseek2")) as writer:
        _add_settings(writer, config, dtype, name)
        _add_vocabulary(writer, vocabulary, tokenizer)
        _write_tensors(writer, config, weights, dtype)


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
    theirs = frequencies(replace(config, beta_fast=BETA_FAST, beta_slow=BETA_SLOW))
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
        **{
            f"{name} is {getattr(config, name)}: llama.cpp has room for {room}": getattr(config, name) > room
            for name, room in ROOM.items()
        },
        f"beta_fast is {config.beta_fast:g} and beta_slow {config.beta_slow:g}: llama.cpp takes {BETA_FAST:g} and "
        f"{BETA_SLOW:g} whatever the file says": yarn and not torch.equal(frequencies(config), theirs),
        f"original_seq_len is {config.original_seq_len}: llama.cpp stretches contexts otherwise that are so short or "
        "long for rope_theta": yarn and not BETA_SLOW <= turns < BETA_FAST * config.rope_theta**2,
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{problem}; GGUF cannot express this model: export it to hf instead")


def _add_settings(writer: GGUFWriter, config: ModelConfig, dtype: str, name: str) -> None:
    from gguf import GGML_QUANT_VERSION, ExpertGatingFuncType, LlamaFileType

    writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
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
    from gguf import GGMLQuantizationType, dequantize

    stored = {}
    for name, weight in weights.items():
        parts = [
            torch.from_numpy(dequantize(_encode(name, part, kind), GGMLQuantizationType[kind]))
            for _, part, kind in _parts(config, name, weight, dtype)
        ]
        stored[name] = _rounded(weight, dtype) if _scale(config, name) != 1 else parts[0]
        if name.endswith(".wkv_b.weight"):
            stored[name] = torch.cat((parts[0].transpose(1, 2), parts[1]), dim=1).reshape(weight.shape)
    return stored


def _write_tensors(writer: GGUFWriter, config: ModelConfig, weights: Mapping[str, Tensor], dtype: str) -> None:
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map, quant_shape_to_byte_shape

    names = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, config.n_layers)  # by those of transformers
    for name, weight in weights.items():
        for theirs, part, kind in _parts(config, name, torch.empty_like(weight, device="meta"), dtype):
            raw = GGMLQuantizationType[kind]
            size = math.prod(quant_shape_to_byte_shape(part.shape, raw))
            gguf_name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            writer.add_tensor_info(gguf_name, part.shape, np.dtype(np.float32), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in weights.items():
        for _, part, kind in _parts(config, name, weight, dtype):
            writer.write_tensor_data(_encode(name, part, kind))


def _parts(config: ModelConfig, name: str, weight: Tensor, dtype: str) -> Iterator[tuple[str, Tensor, str]]:
    """What our tensor ``name`` becomes: transformers' name, contents and GGUF type of one or two tensors."""
    theirs = their_names(name, 1)[0].replace(".experts.0.", ".experts.").replace("correction_bias", "correction.bias")
    if name.endswith(".wkv_b.weight"):
        rows = (config.qk_nope_head_dim, config.v_head_dim)
        w_k, w_v = weight.unflatten(0, (config.n_heads, sum(rows))).split(rows, dim=1)
        w_k = w_k.transpose(1, 2)  # absorbed into the query: [H, R, N]
        yield theirs.replace("kv_b_proj", "k_b_proj"), w_k, _kind(w_k, dtype)
        yield theirs.replace("kv_b_proj", "v_b_proj"), w_v, _kind(w_v, dtype)
    elif (scale := _scale(config, name)) != 1:
        rotary = config.qk_rope_head_dim if name.endswith(".wkv_a.weight") else 0
        rounded = _rounded(weight, dtype)
        rounded[: len(weight) - rotary] *= scale
        yield theirs, rounded, "F32"
    else:
        yield theirs, weight, "F32" if ".router." in name else _kind(weight, dtype)


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
    """A copy of ``weight`` in fp32, rounded to ``dtype`` first."""
    half = {"f16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    return weight.to(half).to(torch.float32, copy=True)


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
    encoded: np.ndarray[Any, Any] = quantize(part.float().contiguous().numpy(), GGMLQuantizationType[kind])
    return encoded


# ---- the tokenizer ---------------------------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """The ``tokenizer.ggml`` keys of a GGUF file."""

    pre: str  # llama.cpp's name of the rule that splits text into words
    tokens: list[str]  # text of every id, as the byte-level alphabet writes it; one per row of the embedding
    types: list[int]  # NORMAL, CONTROL, USER_DEFINED or UNUSED, one per token
    merges: list[str]  # "left right", the most frequent first; never empty


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """``tokenizer`` for a model whose embedding has ``size`` rows; those without a token are marked as unused.

    llama.cpp splits text into words by rules that it knows by name. So only tokenizers with one of these rules can be
    exported: their ids are then the same for every text.

    Raises:
        UserError: llama.cpp would split text otherwise, or the tokenizer has more tokens than the model.
    """
    layout = json.loads(tokenizer.to_json())
    pre = _splitting_rule(tokenizer.name, layout)
    if tokenizer.vocab_size > size:
        raise UserError(
            f"tokenizer {tokenizer.name}: has {tokenizer.vocab_size} entries, the model only {size} (vocab_size): "
            "it belongs to another model"
        )
    texts = {token_id: text for text, token_id in layout["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    for added in layout["added_tokens"]:
        token_id, text = added["id"], added["content"]
        texts[token_id], types[token_id] = text, CONTROL if added["special"] else USER_DEFINED
        for option in ("single_word", "lstrip", "rstrip"):
            if added[option] and not added["special"]:
                raise _refusal(tokenizer.name, f"the option {option} of its token {text!r} is unknown to llama.cpp:")
    if types[tokenizer.eot_id] == USER_DEFINED:
        raise _refusal(tokenizer.name, f"{tokenizer.eot} ends documents but is not marked as special: mark it, or")
    types[tokenizer.eot_id] = CONTROL
    taken = set(texts.values())
    for token_id in range(size):
        name = f"[PAD{token_id}]"
        while name in taken:
            name = f"[{name}]"
        texts.setdefault(token_id, name)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in layout["model"]["merges"]]
    # llama.cpp refuses a file without merges. This one never happens: words begin as single characters.
    merges = merges or [f"{tokenizer.eot} {tokenizer.eot}"]
    return Vocabulary(pre, [texts[i] for i in range(size)], [types.get(i, UNUSED) for i in range(size)], merges)


def _splitting_rule(name: str, layout: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a ``tokenizer.json`` splits text; UserError if it has none."""
    if layout["normalizer"] is not None:
        raise _refusal(name, f"its normalizer {layout['normalizer']['type']} is unknown to llama.cpp:")
    model = layout["model"]
    if model["type"] != "BPE":
        raise _refusal(name, f"is a {model['type']} model, not a byte-level BPE:")
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for option in (*options, "ignore_merges"):
        if model.get(option):
            raise _refusal(name, f"its option {option} is unknown to llama.cpp:")
    found = layout["pre_tokenizer"] or {"type": "none"}
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    described = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if described == [gpt2]:
        return "gpt-2"
    if described == [{"type": "Digits", "individual_digits": True}, gpt2]:
        return "smollm"
    kinds = ", ".join(str(step["type"]) for step in steps)
    raise _refusal(name, f"llama.cpp has no rule that splits text as it does (pre_tokenizer {kinds}):")


def _refusal(name: str, problem: str) -> UserError:
    remedy = "choose tokenizer_name byte, bpe:N or HuggingFaceTB/SmolLM-135M before training, or export to hf"
    return UserError(f"tokenizer {name}: {problem} {remedy}")
