"""Folders in Hugging Face format: ours, those that transformers writes, those that we refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stored_models import OUT, SOFTMAX, edit_json, edit_tensors, in_folder, same_weights, stored_model
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from nanokimi.checkpoint.weights import build_model
from nanokimi.config import PRESETS, ModelConfig
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.chat_template import Message, chat_template_of
from nanokimi.interop.engines import TEXT
from nanokimi.interop.hf_reader import INDEX, OWN, read_folder
from nanokimi.interop.hf_writer import tokenizer_files, write_folder
from nanokimi.interop.huggingface import huggingface_config, model_values
from nanokimi.interop.stored import StoredModel

YARN: dict[str, Any] = {"rope_factor": 4.0, "original_seq_len": 32}


@pytest.fixture(scope="module")
def transformers_model() -> DeepseekV3ForCausalLM:
    """A model that transformers has made, with random weights and balance biases."""
    torch.manual_seed(5)
    config = DeepseekV3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=3,
        n_group=4, topk_group=2, routed_scaling_factor=1.7, first_k_dense_replace=1, norm_topk_prob=True,
        kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10,
        max_position_embeddings=96, initializer_range=0.1,
        rope_parameters={"rope_type": "yarn", "rope_theta": 20000.0, "factor": 3.0, "mscale": 1.0,
                         "mscale_all_dim": 0.8, "original_max_position_embeddings": 32, "beta_fast": 32.0,
                         "beta_slow": 1.0},
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 0.2)
    return model


def with_tokenizer(folder: Path) -> Path:
    for name, text in tokenizer_files(load_tokenizer("byte"), 96).items():
        (folder / name).write_text(text)
    return folder


# ---- from and to transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_transformers_comes_back_with_the_same_tensors(
    dtype: torch.dtype, transformers_model: DeepseekV3ForCausalLM, tmp_path: Path
) -> None:
    transformers_model.save_pretrained(tmp_path / "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=dtype).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    stored = read_folder(with_tokenizer(tmp_path / "theirs"))
    assert not stored.notes
    (tmp_path / "ours").mkdir()
    write_folder(tmp_path / "ours", stored)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert same_weights(before, after)
    biases = [tensor for name, tensor in after.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(bias.any() for bias in biases)
    if dtype == torch.float32:
        tokens = torch.randint(0, 257, (2, 96))
        with torch.no_grad():
            ours = build_model(tmp_path, stored.config, stored.weights)(tokens)
            torch.testing.assert_close(ours, theirs(tokens).logits, rtol=0, atol=2e-5)


def test_the_tokenizer_of_a_folder_is_the_same_in_transformers(tmp_path: Path) -> None:
    in_folder(tmp_path / "m")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "m"), read_folder(tmp_path / "m").tokenizer
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot_id == 256
    assert theirs.model_max_length == 128


def test_the_chat_template_of_a_folder_is_the_same_in_transformers(tmp_path: Path) -> None:
    """Written by us and read by them, and the other way round."""
    source = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}\n"
    inner = HFTokenizer.from_str(load_tokenizer("byte").to_json())
    inner.add_special_tokens(["<|begin|>"])
    tokenizer = Tokenizer(inner, "mine", bos="<|begin|>", chat_template=source)
    in_folder(tmp_path / "m", stored_model(tokenizer, vocab_size=258))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (theirs.chat_template, theirs.bos_token) == (source, "<|begin|>")
    talk: list[Message] = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "I."}]
    expected = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    theirs.save_pretrained(tmp_path / "again")
    for name in ("m", "again"):
        template = chat_template_of(load_tokenizer(str(tmp_path / name)))
        assert template is not None
        assert template.encode(talk) == expected


# ---- config.json -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        *({**PRESETS[name], "tokenizer_name": "byte"} for name in PRESETS),
        {**PRESETS["debug"], **SOFTMAX, **YARN, "mscale": 0.3, "beta_fast": 7.0},
        {**PRESETS["debug"], **SOFTMAX, "n_expert_groups": 4, "n_limited_groups": 2},
        {**PRESETS["debug"], **SOFTMAX, "n_expert_groups": 4, "n_limited_groups": 4},
    ],
)
def test_what_config_json_says_is_read_back(fields: dict[str, Any]) -> None:
    config = ModelConfig(**fields)
    values, notes = model_values(json.loads(json.dumps(huggingface_config(config))), "config.json")
    assert ModelConfig(**{"tokenizer_name": "byte"} | values) == config
    assert not notes


def test_kimi_k2_and_moonlight_are_read_as_they_are_spelled(tmp_path: Path) -> None:
    kimi = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "rope_parameters": OUT}
    kimi |= {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "ep_size": 1}
    stored = stored_model(**YARN, beta_fast=1.0)
    read = read_folder(in_folder(tmp_path / "kimi", stored, **kimi))
    assert read.config == stored.config
    assert same_weights(dict(read.weights), dict(stored.weights))
    moonlight = {"q_lora_rank": None, "rope_parameters": OUT, "rope_scaling": None, "dtype": "float32"}
    stored = stored_model(q_lora_rank=0, rope_theta=50000.0)
    read = read_folder(in_folder(tmp_path / "moonlight", stored, **moonlight))
    assert read.config == stored.config


def test_greedy_softmax_routing_knows_no_groups(tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "m", stored_model(**SOFTMAX), n_group=4, topk_group=1, topk_method="greedy")
    config = read_folder(folder).config
    assert (config.n_expert_groups, config.n_limited_groups) == (1, 1)


def test_yarn_without_an_original_context_takes_the_models(tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "m", rope_parameters=OUT, rope_scaling={"type": "yarn", "factor": 2})
    config = read_folder(folder).config
    assert (config.rope_factor, config.original_seq_len, config.beta_fast) == (2, 128, 32.0)
    assert (config.mscale, config.mscale_all_dim) == (0.0, 0.0)


NOT_OURS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another architecture": ({"model_type": "llama"}, ["'llama'", "deepseek_v3", "kimi_k2"]),
    "no architecture": ({"model_type": OUT}, ["model_type None"]),
    "biases": ({"attention_bias": True}, ["attention_bias is True", "not False"]),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "not read"]),
    "linear rope": ({"rope_parameters": OUT, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "yarn"]),
    "attention_factor": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.2}, "rope_parameters": OUT},
        ["attention_factor 1.2"],
    ),
    "truncate": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}, "rope_parameters": OUT},
        ["truncate False"],
    ),
    "yarn without factor": ({"rope_scaling": {"type": "yarn"}, "rope_parameters": OUT}, ["lacks factor"]),
    "rope as a list": ({"rope_scaling": [1]}, ["rope_scaling"]),
    "sparse every other layer": ({"moe_layer_freq": 2}, ["moe_layer_freq is 2"]),
    "halves": ({"rope_interleave": False}, ["rope_interleave is False"]),
    "softmax in V3": ({"scoring_func": "softmax"}, ["scoring_func is 'softmax'", "'sigmoid'"]),
    "another top-k": ({"topk_method": "greedy"}, ["topk_method", "'noaux_tc'"]),
    "fewer key heads": ({"num_key_value_heads": 1}, ["num_key_value_heads is 1", "2"]),
    "no theta": ({"rope_theta": OUT, "rope_parameters": OUT}, ["lacks rope_theta"]),
    "fields that are missing": ({"n_group": OUT, "kv_lora_rank": None}, ["lacks n_group", "lacks kv_lora_rank"]),
    "a word for a number": ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
    "an impossible shape": ({"n_group": 3}, ["n_expert_groups"]),
    "several at once": (
        {"attention_bias": True, "hidden_act": "relu", "moe_layer_freq": 3, "n_group": OUT},
        ["attention_bias", "hidden_act", "moe_layer_freq", "n_group"],
    ),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_features_that_we_lack_are_all_listed(name: str, tmp_path: Path) -> None:
    fields, words = NOT_OURS[name]
    folder = in_folder(tmp_path / "m", **fields)
    with pytest.raises(UserError) as caught:
        read_folder(folder)
    line = str(caught.value)
    assert all(word in line for word in (str(folder / "config.json"), *words)), line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"norm_topk_prob": True}, "norm_topk_prob is True"), ({"scoring_func": "sigmoid"}, "scoring_func")],
)
def test_softmax_models_that_v2_does_not_have_are_refused(fields: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        read_folder(in_folder(tmp_path / "m", stored_model(**SOFTMAX), **fields))


# ---- tensors ---------------------------------------------------------------------------------------------


def test_further_layers_and_old_tables_are_left_out_with_a_note(tmp_path: Path) -> None:
    stored = stored_model()
    folder = in_folder(tmp_path / "m", stored, num_nextn_predict_layers=1)
    extra = {"model__layers__3__eh_proj__weight": torch.ones(4).to(torch.float8_e4m3fn)}
    extra |= {"model__layers__3__embed_tokens__weight": torch.ones(257, 32)}
    extra |= {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    edit_tensors(folder, **extra)
    read = read_folder(folder)
    assert same_weights(dict(read.weights), dict(stored.weights))
    (note,) = read.notes
    assert all(name.replace("__", ".") in note for name in extra)


def test_a_tied_head_becomes_one_of_its_own(tmp_path: Path) -> None:
    stored = stored_model()
    folder = in_folder(tmp_path / "m", stored, tie_word_embeddings=True)
    edit_tensors(folder, lm_head__weight=None)
    read = read_folder(folder)
    assert torch.equal(read.weights["head.weight"], stored.weights["embed.weight"])
    assert read.weights["head.weight"].data_ptr() != read.weights["embed.weight"].data_ptr()
    assert "tie_word_embeddings" in read.notes[0]
    assert json.loads((in_folder(tmp_path / "again", read) / "config.json").read_text())["tie_word_embeddings"] is False


TENSOR_FAULTS: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "fp8": (
        {"model__layers__0__mlp__up_proj__weight": torch.ones(64, 32).to(torch.float8_e4m3fn)},
        ["model.layers.0.mlp.up_proj.weight", "F8_E4M3", "bf16"],
    ),
    "integers": ({"lm_head__weight": torch.ones(257, 32, dtype=torch.int8)}, ["lm_head.weight", "I8"]),
    "a missing one": ({"model__norm__weight": None}, ["lacks model.norm.weight"]),
    "a missing head": ({"lm_head__weight": None}, ["lacks lm_head.weight"]),
    "an unknown one": ({"model__layers__0__bias": torch.ones(2)}, ["unknown model.layers.0.bias"]),
    "another shape": ({"model__norm__weight": torch.ones(31)}, ["model.norm.weight is [31]", "[32]"]),
    "a missing expert": ({"model__layers__2__mlp__experts__7__up_proj__weight": None}, ["experts.7.up_proj"]),
}


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_named(name: str, tmp_path: Path) -> None:
    changes, words = TENSOR_FAULTS[name]
    folder = in_folder(tmp_path / "m")
    edit_tensors(folder, **changes)
    with pytest.raises(UserError) as caught:
        read_folder(folder)
    assert all(word in str(caught.value) for word in (str(folder), *words)), str(caught.value)


# ---- several files ---------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Weights over several files, without a receipt."""
    (tmp_path / "m").mkdir()
    write_folder(tmp_path / "m", stored_model(), shard_bytes=40_000)
    return tmp_path / "m"


def test_weights_beyond_the_limit_are_split_and_indexed(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((sharded / INDEX).read_text())
    tensors = {name: load_file(sharded / name) for name in files}
    assert index["weight_map"] == {name: file for file, part in tensors.items() for name in part}
    sizes = {file: sum(tensor.nbytes for tensor in part.values()) for file, part in tensors.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(sizes[file] <= 40_000 or len(part) == 1 for file, part in tensors.items())
    assert same_weights(dict(read_folder(sharded).weights), dict(stored_model().weights))


def test_files_are_as_readable_as_the_user_wants(sharded: Path) -> None:
    (ordinary := sharded / "ordinary").touch()
    assert {file.stat().st_mode for file in sharded.iterdir()} == {ordinary.stat().st_mode}


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    write_folder(tmp_path, stored_model(), shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(json.loads((tmp_path / INDEX).read_text())["weight_map"])


def test_transformers_reads_the_shards(sharded: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.lm_head.weight, stored_model().weights["head.weight"])


def test_faults_of_shards_are_named(sharded: Path) -> None:
    second = next(sharded.glob("model-00002*"))
    data, index = second.read_bytes(), (sharded / INDEX).read_text()
    faults: list[tuple[str, Any, list[str]]] = [
        ("missing", second.unlink, [second.name, "missing"]),
        ("truncated", lambda: second.write_bytes(data[:-100]), [second.name, "truncated"]),
        ("empty", lambda: second.write_bytes(b""), [second.name, "truncated"]),
    ]
    for weight_map in ([], {}, None, {"a": 3}, {"a": "../elsewhere.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}):
        text = json.dumps({"weight_map": weight_map})
        faults.append((text, lambda text=text: (sharded / INDEX).write_text(text), [INDEX, "weight_map"]))
    lists_more = json.loads(index)["weight_map"] | {"model.extra": second.name}
    text = json.dumps({"weight_map": lists_more})
    faults.append(("lost", lambda: (sharded / INDEX).write_text(text), [INDEX, "lists model.extra"]))
    faults.append(("no JSON", lambda: (sharded / INDEX).write_text(index[:50]), [INDEX, "damaged"]))
    for name, damage, words in faults:
        damage()
        with pytest.raises(UserError) as caught:
            read_folder(sharded)
        assert all(word in str(caught.value) for word in words), f"{name}: {caught.value}"
        second.write_bytes(data)
        (sharded / INDEX).write_text(index)
    read_folder(sharded)


# ---- types, and what is private --------------------------------------------------------------------------


def test_every_type_keeps_its_bits_and_biases_stay_fp32(tmp_path: Path) -> None:
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        stored = stored_model().with_dtype(name)
        read = read_folder(in_folder(tmp_path / name, stored))
        assert same_weights(dict(read.weights), dict(stored.weights))
        assert read.dtype == name
        assert {tensor.dtype for key, tensor in read.weights.items() if not key.endswith("balance_bias")} == {dtype}
        assert read.weights["layers.1.mlp.router.balance_bias"].dtype == torch.float32


def test_values_that_a_type_cannot_hold_are_named() -> None:
    stored = stored_model()
    stored.weights["embed.weight"][3, 4] = 1e5
    with pytest.raises(UserError, match=r"embed\.weight.*f16.*bf16"):
        stored.with_dtype("f16")
    stored.with_dtype("bf16")
    with pytest.raises(UserError, match=r"--dtype q8_0.*bf16"):
        stored.with_dtype("q8_0")
    for value in (float("nan"), float("inf")):
        stored.weights["norm.weight"][0] = value
        with pytest.raises(UserError, match=r"norm\.weight.*not finite"):
            stored.require_finite()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("/home/someone/secret/tokenizer.json", "tokenizer.json"),
        ("/home/someone/secret", "secret"),
        ("data/tokenizer.json", "tokenizer.json"),
        ("HuggingFaceTB/SmolLM-135M", "HuggingFaceTB/SmolLM-135M"),
        ("bpe:4096", "bpe:4096"),
    ],
)
def test_the_tokenizers_path_stays_at_home(name: str, kept: str, tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "m", stored_model(tokenizer_name=name))
    assert json.loads((folder / OWN).read_text())["model_config"]["tokenizer_name"] == kept
    assert read_folder(folder).tokenizer.name == kept


def test_what_config_json_has_no_place_for_is_kept(tmp_path: Path) -> None:
    fields = {"bias_update_rate": 0.02, "aux_loss_coeff": 0.3, "original_seq_len": 50, "mscale": 0.1, "norm_eps": 1e-5}
    stored = replace(stored_model(**fields), training={"steps": 3})
    read = read_folder(in_folder(tmp_path / "m", stored))
    assert read.config == stored.config
    assert read.training == {"steps": 3}


def test_config_json_wins_over_what_we_noted(tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "m")
    own = json.loads((folder / OWN).read_text())
    own["model_config"] |= {"dim": 999, "rope_factor": 7.0, "score_func": "softmax", "from_the_future": 1}
    (folder / OWN).write_text(json.dumps(own))
    assert read_folder(folder).config == stored_model().config


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_config": 3, "training": {}}', '{"model_config": {}}'])
def test_a_broken_file_of_our_own_is_one_line(text: str, tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "m")
    (folder / OWN).write_text(text)
    with pytest.raises(UserError, match=rf"{OWN}.*again"):
        read_folder(folder)


def test_nothing_depends_on_time_or_place(tmp_path: Path) -> None:
    stored: StoredModel = stored_model(n_shared_experts=0)
    one, other = in_folder(tmp_path / "one", stored), tmp_path / "deep" / "other"
    other.mkdir(parents=True)
    write_folder(other, stored_model(n_shared_experts=0))
    edit_json(other / "config.json")
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }
