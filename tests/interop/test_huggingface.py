"""transformers' own DeepseekV3ForCausalLM, and V2's, are the reference for the whole network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stored_models import SOFTMAX, stored_model
from transformers import AutoModelForCausalLM

from nanokimi.checkpoint.weights import build_model
from nanokimi.config import ModelConfig
from nanokimi.errors import UserError
from nanokimi.inference.generate import generate_tokens
from nanokimi.interop.hf_writer import write_folder
from nanokimi.interop.huggingface import huggingface_config
from nanokimi.interop.stored import StoredModel

# The context that the model has learned is a quarter of the one it has.
YARN: dict[str, Any] = {"rope_factor": 4.0, "original_seq_len": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "debug": {},
    "without q_lora": {"q_lora_rank": 0},
    "all layers sparse": {"n_dense_layers": 0, "n_shared_experts": 1},
    "all layers dense": {"n_dense_layers": 3},
    "groups": {"n_expert_groups": 4, "n_limited_groups": 2, "n_dense_layers": 2, "n_activated_experts": 3},
    "groups without q_lora": {"n_expert_groups": 2, "n_limited_groups": 1, "q_lora_rank": 0, "route_scale": 2.5},
    "narrow values": {"v_head_dim": 12, "rope_theta": 50000.0, "norm_topk_prob": False},
    "wide values": {"v_head_dim": 24, "n_routed_experts": 16, "n_activated_experts": 4, "n_dense_layers": 2},
    "other eps": {"norm_eps": 1e-5, "n_heads": 3, "qk_rope_head_dim": 4},
    "no shared experts": {"n_shared_experts": 0},
    "yarn": YARN,
    "yarn, unequal mscales": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn, mscale_all_dim 0": {**YARN, "mscale_all_dim": 0.0},
    "yarn, mscale 0": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.7},
    "yarn as in Kimi K2": {**YARN, "beta_fast": 1.0, "rope_theta": 50000.0},
    "yarn, wide": {**YARN, "qk_rope_head_dim": 32, "beta_fast": 8.0, "beta_slow": 0.5, "q_lora_rank": 0},
    "yarn, another factor than the contexts have": {**YARN, "rope_factor": 10.0, "original_seq_len": 300},
    "softmax": SOFTMAX,
    "softmax with groups": {**SOFTMAX, "n_expert_groups": 4, "n_limited_groups": 2, "n_activated_experts": 3},
    "softmax with all groups": {**SOFTMAX, "n_expert_groups": 4, "n_limited_groups": 4, "route_scale": 2.0},
    "softmax without shared experts": {**SOFTMAX, "n_shared_experts": 0, "q_lora_rank": 0},
    "softmax, yarn": {**SOFTMAX, **YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "softmax, yarn, unequal mscales": {**SOFTMAX, **YARN, "mscale": 1.0, "mscale_all_dim": 0.4, "q_lora_rank": 0},
    "softmax, yarn, mscale_all_dim 0": {**SOFTMAX, **YARN, "mscale_all_dim": 0.0},
}


def reference_of(model: StoredModel, folder: Path) -> Any:
    """The same weights in transformers, through a folder on disk as anybody would load it."""
    write_folder(folder, model)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    stored = stored_model(**CONFIGS[name])
    model, reference = build_model(tmp_path, stored.config, stored.weights), reference_of(stored, tmp_path)
    expected = "DeepseekV2ForCausalLM" if "softmax" in name else "DeepseekV3ForCausalLM"
    assert type(reference).__name__ == expected
    tokens = torch.randint(0, 257, (2, 120))
    with torch.no_grad():
        ours, theirs = model(tokens), reference(tokens).logits
    assert theirs.std() > 0.3  # the comparison is of something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)

    prompt = tokens[0, :7].tolist()
    theirs = reference.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate_tokens(model, prompt, max_tokens=64, temperature=0.0) == theirs[0, 7:].tolist()


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 0}, SOFTMAX, {"n_shared_experts": 0}])
def test_every_weight_is_renamed_and_none_is_invented(fields: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path, stored_model(**fields))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_softmax_scores_that_are_normalised_are_refused() -> None:
    with pytest.raises(UserError, match=r"norm_topk_prob.*softmax.*norm_topk_prob=false"):
        huggingface_config(ModelConfig.preset("debug", score_func="softmax"))


def test_softmax_scores_with_a_balance_bias_are_refused(tmp_path: Path) -> None:
    stored = stored_model(**SOFTMAX)
    stored.weights["layers.1.mlp.router.balance_bias"][3] = 1e-3
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.router\.balance_bias.*softmax.*bias_update_rate=0"):
        write_folder(tmp_path, stored)
    assert not list(tmp_path.iterdir())
