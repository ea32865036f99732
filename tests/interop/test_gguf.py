"""What a GGUF file holds, read back by the ``gguf`` package; that llama.cpp computes the same: test_llamacpp.py."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import UserError
from nanokimi.interop.gguf_file import (
    CONTROL,
    DTYPES,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    gguf_vocabulary,
    stored_weights,
    write_gguf,
)
from nanokimi.model.transformer import Transformer

# Rows of every matrix are multiples of 32, except those of the transposed nope blocks.
WIDE = {"moe_inter_dim": 32, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 24}


def written(path: Path, model: Transformer, *, dtype: str = "f32", weights: dict[str, Tensor] | None = None) -> Path:
    found = model.state_dict() if weights is None else weights
    write_gguf(path, model.config, found, load_tokenizer("byte"), dtype=dtype, name="debug")
    return path


def tensors_of(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and contents of every tensor, the outer dimension first."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        kind = GGMLQuantizationType(tensor.tensor_type)
        values = np.asarray(dequantize(tensor.data, kind)).reshape(tuple(tensor.shape)[::-1])
        found[tensor.name] = kind.name, torch.from_numpy(values.copy())
    return found


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def test_an_f32_file_holds_every_weight_bit_for_bit(tmp_path: Path, debug_model: Transformer) -> None:
    found = tensors_of(written(tmp_path / "m.gguf", debug_model))
    weights = debug_model.state_dict()
    assert {kind for kind, _ in found.values()} == {"F32"}
    assert sum(values.numel() for _, values in found.values()) == sum(w.numel() for w in weights.values())
    for theirs, ours in {
        "token_embd.weight": "embed.weight",
        "output.weight": "head.weight",
        "blk.0.ffn_down.weight": "layers.0.mlp.w2.weight",
        "blk.1.attn_q_a_norm.weight": "layers.1.attention.q_norm.weight",
        "blk.1.ffn_gate_exps.weight": "layers.1.mlp.experts.w1",
        "blk.2.ffn_up_shexp.weight": "layers.2.mlp.shared.w3.weight",
        "blk.2.exp_probs_b.bias": "layers.2.mlp.router.balance_bias",
    }.items():
        assert torch.equal(found[theirs][1], weights[ours]), theirs
    w_k, w_v = debug_model.blocks()[1].attention.wkv_b_heads()
    assert torch.equal(found["blk.1.attn_k_b.weight"][1], w_k.transpose(1, 2))
    assert torch.equal(found["blk.1.attn_v_b.weight"][1], w_v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [{}, WIDE, {"norm_eps": 1e-4}, {"q_lora_rank": 0, "norm_eps": 1e-4}])
def test_stored_weights_are_what_a_reader_finds(dtype: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **fields)))
    found = tensors_of(written(tmp_path / "m.gguf", model, dtype=dtype))
    stored = stored_weights(model.config, model.state_dict(), dtype)
    assert stored.keys() == model.state_dict().keys()
    holder = Transformer(model.config)
    holder.load_state_dict(stored)
    for layer, block in enumerate(holder.blocks()):
        w_k, w_v = block.attention.wkv_b_heads()
        assert torch.equal(found[f"blk.{layer}.attn_k_b.weight"][1], w_k.transpose(1, 2))
        assert torch.equal(found[f"blk.{layer}.attn_v_b.weight"][1], w_v)
        assert torch.equal(found[f"blk.{layer}.attn_output.weight"][1], block.attention.wo.weight)
    assert torch.equal(found["blk.1.ffn_down_exps.weight"][1], holder.moe_layers()[0].experts.w2)
    tolerance = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 1e-2}[dtype]
    for name, weight in model.state_dict().items():
        assert (stored[name] - weight).abs().max() <= tolerance * weight.abs().max(), name
    assert torch.equal(stored["head.weight"], model.head.weight) == (dtype == "f32")


def test_q8_0_leaves_f16_what_has_no_whole_blocks_and_f32_what_must_be_exact(tmp_path: Path) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **WIDE)))
    found = tensors_of(written(tmp_path / "m.gguf", model, dtype="q8_0"))
    kinds = {name.removeprefix("blk.1."): kind for name, (kind, _) in found.items()}
    assert kinds["attn_k_b.weight"] == "F16"
    assert kinds["attn_v_b.weight"] == kinds["token_embd.weight"] == kinds["ffn_down_exps.weight"] == "Q8_0"
    for exact in ("attn_norm.weight", "attn_kv_a_norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias"):
        assert kinds[exact] == "F32"


@pytest.mark.parametrize(("dtype", "kind"), [("f16", "F16"), ("bf16", "BF16")])
def test_half_precision_files_say_so(dtype: str, kind: str, tmp_path: Path, debug_model: Transformer) -> None:
    path = written(tmp_path / "m.gguf", debug_model, dtype=dtype)
    kinds = {kind for name, (kind, values) in tensors_of(path).items() if values.dim() > 1 and "gate_inp" not in name}
    assert kinds == {kind}
    assert keys_of(path)["general.file_type"] == {"f16": 1, "bf16": 32}[dtype]


def test_weights_in_bf16_give_the_same_file_as_their_fp32_copies(tmp_path: Path, debug_model: Transformer) -> None:
    half = {name: tensor.bfloat16() for name, tensor in debug_model.state_dict().items()}
    whole = {name: tensor.float() for name, tensor in half.items()}
    for dtype in DTYPES:
        first = written(tmp_path / "a.gguf", debug_model, dtype=dtype, weights=half)
        second = written(tmp_path / "b.gguf", debug_model, dtype=dtype, weights=whole)
        assert first.read_bytes() == second.read_bytes()


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, debug_model: Transformer) -> None:
    for dtype in DTYPES:
        first, second = (written(tmp_path / name, debug_model, dtype=dtype) for name in ("a.gguf", "b.gguf"))
        assert first.read_bytes() == second.read_bytes()


def test_the_keys_describe_the_model(tmp_path: Path) -> None:
    fields = {"q_lora_rank": 0, "n_expert_groups": 4, "n_limited_groups": 2, "norm_topk_prob": False}
    keys = keys_of(written(tmp_path / "m.gguf", Transformer(ModelConfig.preset("debug", **fields))))
    assert keys["general.architecture"] == "deepseek2"
    assert keys["deepseek2.attention.q_lora_rank"] == 0  # llama.cpp refuses a file without the key
    assert (keys["deepseek2.attention.key_length"], keys["deepseek2.attention.key_length_mla"]) == (24, 16)
    assert (keys["deepseek2.attention.value_length"], keys["deepseek2.attention.value_length_mla"]) == (16, 16)
    assert (keys["deepseek2.expert_group_count"], keys["deepseek2.expert_group_used_count"]) == (4, 2)
    assert keys["deepseek2.expert_gating_func"] == 2
    assert keys["deepseek2.expert_weights_norm"] is False
    assert keys["tokenizer.ggml.eos_token_id"] == 256
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.chat_template" not in keys


def test_a_chat_template_is_written_and_its_absence_too(tmp_path: Path, debug_model: Transformer) -> None:
    assert "tokenizer.chat_template" not in keys_of(written(tmp_path / "without.gguf", debug_model))
    tokenizer = load_tokenizer("byte")
    tokenizer.chat_template = "{{ messages[0].content }}é\n"
    path = tmp_path / "with.gguf"
    write_gguf(path, debug_model.config, debug_model.state_dict(), tokenizer, dtype="f32", name="debug")
    assert keys_of(path)["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize("bos", [None, "a"])
def test_the_token_that_begins_is_the_tokenizers(tmp_path: Path, debug_model: Transformer, bos: str | None) -> None:
    tokenizer = Tokenizer(HFTokenizer.from_str(load_tokenizer("byte").to_json()), "byte", bos=bos)
    path = tmp_path / "m.gguf"
    write_gguf(path, debug_model.config, debug_model.state_dict(), tokenizer, dtype="f32", name="debug")
    keys = keys_of(path)
    assert keys["tokenizer.ggml.bos_token_id"] == (tokenizer.eot_id if bos is None else ord(bos))
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.eot_id


def test_yarn_is_written_as_deepseek_writes_it(tmp_path: Path) -> None:
    config = ModelConfig.preset("debug", rope_factor=4.0, original_seq_len=32, mscale=0.7, mscale_all_dim=0.7)
    keys = keys_of(written(tmp_path / "m.gguf", Transformer(config)))
    scaling = {name.removeprefix("deepseek2.rope.scaling."): value for name, value in keys.items()}
    assert (scaling["type"], scaling["factor"], scaling["original_context_length"]) == ("yarn", 4.0, 32)
    assert scaling["yarn_log_multiplier"] == pytest.approx(0.07)
    assert "attn_factor" not in scaling


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"score_func": "softmax", "n_expert_groups": 4, "n_limited_groups": 2}, "n_limited_groups"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim"),
        ({"n_layers": 27}, "q_lora_rank"),
        ({"n_layers": 513}, "n_layers"),
        ({"n_routed_experts": 1025}, "n_routed_experts"),
        ({"n_routed_experts": 32, "n_activated_experts": 25}, "n_activated_experts"),
        ({"rope_factor": 4.0, "original_seq_len": 64, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast"),
        ({"rope_factor": 4.0, "original_seq_len": 32, "beta_slow": 0.5, "qk_rope_head_dim": 16}, "beta_slow"),
        ({"rope_factor": 4.0, "original_seq_len": 4}, "original_seq_len"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(fields: dict[str, Any], word: str, tmp_path: Path) -> None:
    config = ModelConfig.preset("debug", **fields)
    with pytest.raises(UserError, match=rf"{word}.*hf"):
        write_gguf(tmp_path / "m.gguf", config, {}, load_tokenizer("byte"), dtype="f32", name="debug")
    assert os.listdir(tmp_path) == []


def test_a_failed_export_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, debug_model: Transformer) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"earlier")
    weights = debug_model.state_dict()
    weights["head.weight"] = weights["head.weight"] / 0
    with pytest.raises(UserError, match=r"head\.weight.*not finite"):
        written(path, debug_model, weights=weights)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["m.gguf"]


class Deadly(dict[str, Tensor]):
    """Kills the process in the middle of the second time that it is gone through."""

    passes = 0

    def items(self) -> Any:
        self.passes += 1
        for number, item in enumerate(super().items()):
            if self.passes == 2 and number == len(self) // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


def test_a_killed_export_leaves_nothing_under_the_name(tmp_path: Path, debug_model: Transformer) -> None:
    child = os.fork()
    if not child:
        written(tmp_path / "m.gguf", debug_model, weights=Deadly(debug_model.state_dict()))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".tmp")
    assert (tmp_path / left).stat().st_size > 5000  # it had begun
    written(tmp_path / "m.gguf", debug_model)


def test_weights_beyond_fp16_are_refused_there_only(tmp_path: Path, debug_model: Transformer) -> None:
    weights = debug_model.state_dict()
    weights["embed.weight"][3, 3] = 1e5
    with pytest.raises(UserError, match=r"embed\.weight.*F16.*f32"):
        written(tmp_path / "m.gguf", debug_model, dtype="f16", weights=weights)
    for dtype in ("bf16", "q8_0"):
        written(tmp_path / "m.gguf", debug_model, dtype=dtype, weights=weights)


def test_a_missing_package_and_an_unknown_type_are_one_line(
    tmp_path: Path, debug_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"q4_k.*q8_0"):
        written(tmp_path / "m.gguf", debug_model, dtype="q4_k")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install"):
        written(tmp_path / "m.gguf", debug_model)


# ---- vocabulary ------------------------------------------------------------------------------------------


def changed(**fields: Any) -> Tokenizer:
    """The byte tokenizer with other fields of its ``tokenizer.json``, ``model`` merged into the old one."""
    layout = json.loads(load_tokenizer("byte").to_json())
    layout["model"] |= fields.pop("model", {})
    return Tokenizer(HFTokenizer.from_str(json.dumps(layout | fields)), "mine")


def with_token(content: str, **options: Any) -> Tokenizer:
    inner = HFTokenizer.from_str(load_tokenizer("byte").to_json())
    inner.add_tokens([AddedToken(content, normalized=False, **options)])
    return Tokenizer(inner, "mine")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_known_splitting_rules_have_llama_cpps_names() -> None:
    digits = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]
    smollm = changed(pre_tokenizer={"type": "Sequence", "pretokenizers": digits})
    assert gguf_vocabulary(load_tokenizer("byte"), 257).pre == "gpt-2"
    assert gguf_vocabulary(train_bpe(["some text, some text"], 270), 270).pre == "gpt-2"
    assert gguf_vocabulary(smollm, 257).pre == "smollm"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "ByteLevel"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "ByteLevel"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL],
                }
            },
            "Digits",
        ),
        ({"normalizer": {"type": "NFC"}}, "NFC"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ],
)
def test_other_splitting_rules_are_refused_with_a_remedy(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=rf"tokenizer mine.*{word}.*bpe:N"):
        gguf_vocabulary(changed(**fields), 257)


def test_the_list_is_padded_with_unused_tokens_of_their_own_names() -> None:
    vocabulary = gguf_vocabulary(with_token("[PAD259]"), 260)
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == 260
    assert vocabulary.types == [NORMAL] * 256 + [CONTROL, USER_DEFINED, UNUSED, UNUSED]
    assert vocabulary.tokens[256:258] == [END_OF_TEXT, "[PAD259]"]
    with pytest.raises(UserError, match=r"mine.*258.*257.*vocab_size"):
        gguf_vocabulary(with_token("<tool>"), 257)


def test_added_tokens_that_llama_cpp_would_find_elsewhere_are_refused() -> None:
    with pytest.raises(UserError, match=r"lstrip.*<tool>"):
        gguf_vocabulary(with_token("<tool>", lstrip=True), 258)
    layout = json.loads(load_tokenizer("byte").to_json())
    layout["added_tokens"][0]["special"] = False
    with pytest.raises(UserError, match="special"):
        gguf_vocabulary(Tokenizer(HFTokenizer.from_str(json.dumps(layout)), "mine"), 257)
