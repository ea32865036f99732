"""Rotary positions and YaRN; that they are transformers' own: interop/test_huggingface.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import lively

from nanokimi.config import ModelConfig
from nanokimi.errors import ConfigError
from nanokimi.model.attention import apply_rope, frequencies, rotary_tables, softmax_scale
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer

YARN: dict[str, Any] = {"rope_factor": 4.0, "original_seq_len": 32}


@pytest.mark.parametrize("fields", [{}, {"original_seq_len": 16, "beta_fast": 2.0, "mscale": 0.3}, {"mscale": 0.0}])
def test_without_a_factor_the_tables_are_plain_rope_to_the_bit(fields: dict[str, Any]) -> None:
    config = ModelConfig.preset("debug", rope_theta=50000.0, **fields)
    exponents = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32) / config.qk_rope_head_dim
    angles = torch.outer(torch.arange(config.max_seq_length, dtype=torch.float32), 1.0 / 50000.0**exponents)
    cos, sin = rotary_tables(config)
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())
    assert softmax_scale(config) == config.qk_head_dim**-0.5


def test_fast_pairs_stay_slow_ones_slow_down_and_those_between_are_blended() -> None:
    plain = ModelConfig.preset("debug", qk_rope_head_dim=64)
    yarn = ModelConfig.preset("debug", qk_rope_head_dim=64, rope_factor=8.0, original_seq_len=512)
    slowed = frequencies(plain) / frequencies(yarn)
    turns = frequencies(plain) * 512 / (2 * math.pi)  # over the original context
    torch.testing.assert_close(slowed[turns > 64], torch.ones(int((turns > 64).sum())))
    torch.testing.assert_close(slowed[turns < 0.5], torch.full((int((turns < 0.5).sum()),), 8.0))
    between = slowed[(turns > 1.5) & (turns < 24)]
    assert len(between) > 3
    assert ((between > 1.0) & (between < 8.0)).all()
    assert (slowed.diff() >= 0).all()


def test_one_bound_for_fast_and_slow_leaves_at_most_one_pair_between() -> None:
    config = ModelConfig.preset("kimi-k2")
    assert config.beta_fast == config.beta_slow == 1.0
    plain = ModelConfig.preset("kimi-k2", rope_factor=1.0)
    slowed = frequencies(plain) / frequencies(config)
    assert ((slowed - 1).abs() > 1e-3).logical_and((slowed - 32).abs() > 1e-3).sum() <= 1
    assert slowed.min() < 1.001
    assert slowed.max() > 31.9


@pytest.mark.parametrize(
    ("mscale", "all_dims", "table", "logits"),
    [
        (1.0, 1.0, 1.0, 1.0 + 0.1 * math.log(4)),
        (0.5, 1.0, (1 + 0.05 * math.log(4)) / (1 + 0.1 * math.log(4)), 1.0 + 0.1 * math.log(4)),
        (1.0, 0.0, 1.0 + 0.1 * math.log(4), 1.0),  # without all_dims the growth lies in the tables alone
        (0.0, 1.0, 1.0 + 0.1 * math.log(4), 1.0 + 0.1 * math.log(4)),  # what DeepSeek's rule says, odd as it is
    ],
)
def test_attention_logits_grow_as_mscale_says(mscale: float, all_dims: float, table: float, logits: float) -> None:
    config = ModelConfig.preset("debug", **YARN, mscale=mscale, mscale_all_dim=all_dims)
    cos, sin = rotary_tables(config)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, table**2))
    assert softmax_scale(config) == pytest.approx(config.qk_head_dim**-0.5 * logits**2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_factor": 4.0}, ["rope_factor is 4", "original_seq_len"]),
        ({"rope_factor": 0.5, "original_seq_len": 32}, ["rope_factor", "1 or more"]),
        ({"rope_factor": math.inf, "original_seq_len": 32}, ["rope_factor"]),
        ({**YARN, "beta_fast": 0.0}, ["beta_fast"]),
        ({**YARN, "mscale": -1.0}, ["mscale"]),
        ({**YARN, "mscale_all_dim": math.nan}, ["mscale_all_dim"]),
        ({"original_seq_len": -1}, ["original_seq_len"]),
    ],
)
def test_impossible_settings_are_refused_by_name(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.preset("debug", **fields)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("fields", [{}, {"mscale": 0.7, "mscale_all_dim": 0.4, "q_lora_rank": 0}])
def test_under_yarn_cached_and_full_forward_agree_and_look_back_only(fields: dict[str, Any]) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **YARN, **fields)), std=0.15)
    tokens = torch.randint(0, 257, (2, 100))
    with torch.no_grad():
        full = model(tokens)
        for split in (1, 31, 32, 33, 99):
            cache = LatentCache(model.config, 2)
            pieces = torch.cat((model(tokens[:, :split], cache=cache), model(tokens[:, split:], cache=cache)), dim=1)
            torch.testing.assert_close(pieces, full, rtol=0, atol=2e-5)
        other = tokens.clone()
        other[:, 60:] = (other[:, 60:] + 1) % 257
        torch.testing.assert_close(model(other)[:, :60], full[:, :60], rtol=0, atol=1e-5)
        assert (model(other)[:, 60:] - full[:, 60:]).abs().max() > 0.1


def test_rotated_products_depend_on_distance_alone() -> None:
    cos, sin = rotary_tables(ModelConfig.preset("debug", **YARN))
    query, key = torch.randn(2, 1, 1, 1, 8)

    def product(m: int, n: int) -> torch.Tensor:
        return (
            apply_rope(query, cos[m : m + 1], sin[m : m + 1]) * apply_rope(key, cos[n : n + 1], sin[n : n + 1])
        ).sum()

    torch.testing.assert_close(product(100, 90), product(10, 0))
    assert (product(100, 90) - product(100, 80)).abs() > 1e-3
