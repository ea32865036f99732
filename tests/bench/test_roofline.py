"""FLOPs and bytes against counts by hand."""

from __future__ import annotations

import pytest

from benchmarks.bench import roofline
from nanokimi.config import ModelConfig
from nanokimi.insight.planner import forward_flops, working_weights
from nanokimi.model.transformer import Transformer


def test_training_of_nano_243m_takes_one_and_a_half_teraflop() -> None:
    config = ModelConfig.preset("nano-243m")
    weights = 165_848_704 - 49_152 * 896
    pairs = sum(position + 1 for position in range(1024))  # keys that each query sees
    attention = 3 * 2 * 6 * 8 * (112 + 112) * pairs * 2
    assert roofline.training_flops(config, 165_848_704, 2, 1024) == 6 * weights * 2048 + attention
    assert roofline.training_flops(config, 165_848_704, 2, 1024) == pytest.approx(1.564e12, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 0}, {"v_head_dim": 24, "n_shared_experts": 0}])
def test_the_forward_pass_counts_every_matrix_a_token_visits(changes: dict[str, int]) -> None:
    config = ModelConfig.preset("debug", **changes)
    model = Transformer(config)
    matrices = ("query_key", "matrix", "head")  # routers and shared experts among them, routed experts apart
    visited = sum(p.numel() for role, p in model.param_roles() if role in matrices)
    visited += config.n_moe_layers * config.n_activated_experts * 3 * config.dim * config.moe_inter_dim
    norms = sum(p.numel() for role, p in model.param_roles() if role == "norm")
    active = model.num_parameters(active=True)
    assert working_weights(config, active) == visited + norms
    heads = config.n_layers * config.n_heads * (config.qk_head_dim + config.v_head_dim)
    assert forward_flops(config, active, 3, 4) == 2 * (visited + norms) * 12 + 2 * heads * 3 * (1 + 2 + 3 + 4)


def test_a_prefill_needs_the_head_once() -> None:
    config = ModelConfig.preset("debug")
    active = Transformer(config).num_parameters(active=True)
    saved = forward_flops(config, active, 1, 50) - roofline.prefill_flops(config, active, 50)
    assert saved == 49 * 2 * config.vocab_size * config.dim


def test_a_token_reads_the_working_weights_and_the_cache() -> None:
    config = ModelConfig.preset("nano-243m")
    cache = 6 * 900 * (256 + 56) * 4
    assert roofline.cache_bytes(config, 900) == cache
    assert roofline.token_bytes(config, 165_848_704, 900, "fp32") == 4 * 121_808_512 + cache
    assert roofline.token_bytes(config, 165_848_704, 900, "int8") == 121_808_512 + cache
