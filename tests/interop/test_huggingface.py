"""transformers' own DeepseekV3ForCausalLM is the reference for the whole network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nanokimi.config import ModelConfig
from nanokimi.errors import UserError
from nanokimi.inference.engine import generate_tokens
from nanokimi.interop.huggingface import huggingface_config, to_huggingface
from nanokimi.model.transformer import Transformer

CONFIGS: dict[str, dict[str, Any]] = {
    "debug": {},
    "without q_lora": {"q_lora_rank": 0},
    "all layers sparse": {"n_dense_layers": 0, "n_shared_experts": 1},
    "groups": {"n_expert_groups": 4, "n_limited_groups": 2, "n_dense_layers": 2, "n_activated_experts": 3},
    "groups without q_lora": {"n_expert_groups": 2, "n_limited_groups": 1, "q_lora_rank": 0, "route_scale": 2.5},
    "narrow values": {"v_head_dim": 12, "rope_theta": 50000.0, "norm_topk_prob": False},
    "wide values": {"v_head_dim": 24, "n_routed_experts": 16, "n_activated_experts": 4, "n_dense_layers": 2},
    "other eps": {"norm_eps": 1e-5, "n_heads": 3, "qk_rope_head_dim": 4},
}


def reference_of(model: Transformer, folder: Path) -> Any:
    """The same weights in transformers, through a folder on disk as anybody would load it."""
    (folder / "config.json").write_text(json.dumps(huggingface_config(model.config)))
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in to_huggingface(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **CONFIGS[name])), std=0.1)
    reference = reference_of(model, tmp_path)
    tokens = torch.randint(0, 257, (2, 40))
    with torch.no_grad():
        ours, theirs = model(tokens), reference(tokens).logits
    assert theirs.std() > 0.3  # the comparison is of something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)

    prompt = tokens[0, :7].tolist()
    theirs = reference.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate_tokens(model, prompt, max_tokens=32, temperature=0.0) == theirs[0, 7:].tolist()


def test_every_weight_is_renamed_and_none_is_invented(tmp_path: Path) -> None:
    model = lively(Transformer(ModelConfig.preset("debug")))
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(model.config)))
    save_file({k: v.contiguous().clone() for k, v in to_huggingface(model).items()}, tmp_path / "model.safetensors")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_softmax_scores_are_refused() -> None:
    with pytest.raises(UserError, match="softmax"):
        huggingface_config(ModelConfig.preset("debug", score_func="softmax"))
