"""The network: causality, the cache, counts, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import lively

from nanokimi.config import PRESETS, ModelConfig
from nanokimi.model import attention
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer

COUNTS = {
    "nano-243m": (243_263_104, 165_848_704),
    "kimi-k2": (1_026_408_209_408, 32_861_477_888),
    "deepseek-v3": (671_026_404_352, None),
    "moonlight-16b": (15_960_108_544, None),
}
BIASES = {"kimi-k2": 23_040, "deepseek-v3": 14_848}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": 0, "n_dense_layers": 0, "v_head_dim": 12},
    {"n_expert_groups": 4, "n_limited_groups": 2, "score_func": "softmax", "v_head_dim": 24},
    {"n_dense_layers": 3, "n_heads": 3},
    {"n_shared_experts": 0, "norm_topk_prob": False, "n_layers": 1, "n_dense_layers": 0},
]


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_exactly_their_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(name))
    total, active = COUNTS[name]
    assert model.num_parameters() == total
    assert active is None or model.num_parameters(active=True) == active
    biases = sum(moe.router.balance_bias.numel() for moe in model.moe_layers())
    assert biases == BIASES.get(name, biases)


def test_the_default_model_is_built_for_real_with_its_exact_count() -> None:
    assert Transformer(ModelConfig()).num_parameters() == 243_263_104


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 3e6, 12e6), ("debug", 0, 1e6)])
def test_small_presets_are_small_and_have_all_parts(name: str, low: float, high: float) -> None:
    config = ModelConfig.preset(name)
    assert low <= Transformer(config).num_parameters() <= high
    assert config.q_lora_rank
    assert (config.n_routed_experts, config.n_activated_experts, config.n_shared_experts) == (8, 2, 2)
    assert (config.n_dense_layers, config.max_seq_length >= 128) == (1, True)


def test_every_preset_keeps_other_engines_open() -> None:
    for name in ("nano-243m", "tiny", "debug"):
        config = ModelConfig.preset(name)
        assert config.v_head_dim == config.qk_head_dim, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_and_full_forward_agree_at_every_split_point(variant: dict[str, Any]) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **variant)), std=0.15)
    tokens = torch.randint(0, 257, (2, 24))
    with torch.no_grad():
        full = model(tokens)
        for split in range(1, 24):
            cache = LatentCache(model.config, 2)
            pieces = torch.cat((model(tokens[:, :split], cache=cache), model(tokens[:, split:], cache=cache)), dim=1)
            torch.testing.assert_close(pieces, full, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_logits_alone_are_those_of_the_full_pass_and_leave_the_same_cache(variant: dict[str, Any]) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **variant)), std=0.15)
    tokens = torch.randint(0, 257, (2, 24))
    full, last = LatentCache(model.config, 2), LatentCache(model.config, 2)
    with torch.no_grad():
        for part in tokens.split((13, 1, 10), dim=1):
            expected = model(part, cache=full)[:, -1:]
            torch.testing.assert_close(model(part, cache=last, last_only=True), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(last.entries, full.entries, rtol=0, atol=1e-5)
    assert last.lengths == full.lengths == [24, 24]


def test_the_last_layer_computes_queries_and_mlp_for_the_last_position_only(debug_model: Transformer) -> None:
    widths: list[tuple[int, int]] = []
    for block in debug_model.blocks():
        block.attention.wo.register_forward_pre_hook(lambda _, x: widths.append(tuple(x[0].shape[:2])))
        block.mlp.register_forward_pre_hook(lambda _, x: widths.append(tuple(x[0].shape[:2])))
    with torch.no_grad():
        debug_model(torch.zeros(2, 9, dtype=torch.int64), cache=LatentCache(debug_model.config, 2), last_only=True)
    assert widths == [(2, 9)] * 4 + [(2, 1)] * 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (1, 2), (3, 0, 2)])
@pytest.mark.parametrize("held", [(5, 0, 17, 30), (6, 6, 6, 6), (0, 0, 0, 0)])
def test_rows_of_any_lengths_decode_together_as_each_does_alone(
    variant: dict[str, Any], rows: tuple[int, ...], held: tuple[int, ...]
) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **variant)), std=0.15)
    tokens = torch.randint(0, 257, (4, 40))
    cache = LatentCache(model.config, 4, 40)
    lengths = list(held)
    with torch.no_grad():
        full = model(tokens)
        for row, length in enumerate(lengths):
            if length:
                model(tokens[row : row + 1, :length], cache=cache.select([row]))
        for new in (1, 3, 1):
            ends = [length + new for length in lengths]
            part = torch.stack([tokens[row, lengths[row] : ends[row]] for row in rows])
            expected = torch.stack([full[row, lengths[row] : ends[row]] for row in rows])
            torch.testing.assert_close(model(part, cache=cache.select(rows)), expected, rtol=0, atol=2e-5)
            lengths = [end if row in rows else lengths[row] for row, end in enumerate(ends)]
            assert cache.lengths == lengths


def test_ragged_rows_write_nothing_but_their_own_new_entries(debug_model: Transformer) -> None:
    cache = LatentCache(debug_model.config, 3, 10)
    cache.lengths[:] = [2, 5, 7]
    before = cache.entries.normal_().clone()
    with torch.no_grad():
        debug_model(torch.tensor([[1, 2], [3, 4]]), cache=cache.select([2, 0]))
    changed = (cache.entries != before).any(dim=-1).any(dim=0)
    assert changed.nonzero().tolist() == [[0, 2], [0, 3], [2, 7], [2, 8]]


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_prefill_in_chunks_or_token_by_token_gives_the_same_logits(chunk: int, debug_model: Transformer) -> None:
    tokens = torch.randint(0, 257, (2, 21))
    cache = LatentCache(debug_model.config, 2)
    with torch.no_grad():
        pieces = torch.cat([debug_model(piece, cache=cache) for piece in tokens.split(chunk, dim=1)], dim=1)
        torch.testing.assert_close(pieces, debug_model(tokens), rtol=0, atol=2e-5)
        last = debug_model(tokens[:, :5], last_only=True)
        torch.testing.assert_close(last, debug_model(tokens[:, :5])[:, -1:], rtol=0, atol=2e-5)


def test_a_long_text_behind_a_cache_attends_a_few_queries_at_a_time(
    debug_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 4)
    tokens = torch.randint(0, 257, (2, 24))
    cache = LatentCache(debug_model.config, 2)
    with torch.no_grad():
        full = debug_model(tokens)
        pieces = torch.cat([debug_model(part, cache=cache) for part in tokens.split((3, 1, 9, 11), dim=1)], dim=1)
    torch.testing.assert_close(pieces, full, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_forms_of_attention_behind_a_cache_agree_for_rows_of_any_lengths(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **variant)), std=0.15)
    tokens, held = torch.randint(0, 257, (2, 24)), (5, 9)
    with torch.no_grad():
        full = model(tokens)
        for least in (1, 100):  # queries from which keys and values are expanded: always, never
            monkeypatch.setattr(attention.MLA, "worth_expanding", lambda self, least=least: least)
            cache = LatentCache(model.config, 2)
            for row, length in enumerate(held):
                model(tokens[row : row + 1, :length], cache=cache.select([row]))
            new = torch.stack([tokens[row, length : length + 13] for row, length in enumerate(held)])
            expected = torch.stack([full[row, length : length + 13] for row, length in enumerate(held)])
            torch.testing.assert_close(model(new, cache=cache), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_a_later_token_changes_no_earlier_logit(cached: bool, debug_model: Transformer) -> None:
    tokens = torch.randint(0, 257, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 257

    def logits(x: torch.Tensor) -> torch.Tensor:
        if not cached:
            return debug_model(x)
        cache = LatentCache(debug_model.config)
        return torch.cat((debug_model(x[:, :6], cache=cache), debug_model(x[:, 6:], cache=cache)), dim=1)

    with torch.no_grad():
        a, b = logits(tokens), logits(changed)
    torch.testing.assert_close(a[:, :12], b[:, :12], rtol=0, atol=2e-5)
    assert float((a[:, 12:] - b[:, 12:]).abs().amax(dim=-1).min()) > 1e-3


def test_the_cache_holds_the_latent_and_the_rotary_key_and_nothing_more(debug_config: ModelConfig) -> None:
    cache = LatentCache(debug_config, batch_size=3, max_length=50)
    per_token_and_layer = debug_config.kv_lora_rank + debug_config.qk_rope_head_dim
    tensors = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    assert sum(t.numel() for t in tensors) == debug_config.n_layers * 3 * 50 * per_token_and_layer


def test_too_many_tokens_for_the_context_or_the_cache_are_refused(debug_model: Transformer) -> None:
    with pytest.raises(ValueError, match="129 tokens exceed the context of 128"):
        debug_model(torch.zeros(1, 129, dtype=torch.int64))
    with pytest.raises(ValueError, match="cache holds 4 tokens, 5 are needed"):
        debug_model(torch.zeros(1, 5, dtype=torch.int64), cache=LatentCache(debug_model.config, max_length=4))
    ragged = LatentCache(debug_model.config, 2, max_length=4)
    ragged.lengths[1] = 3
    with pytest.raises(ValueError, match="cache holds 4 tokens, 5 are needed"):
        debug_model(torch.zeros(2, 2, dtype=torch.int64), cache=ragged)


def test_logits_are_fp32_and_fp64_is_kept(debug_model: Transformer) -> None:
    tokens = torch.randint(0, 257, (1, 8))
    assert debug_model(tokens).dtype == torch.float32
    in_fp64 = debug_model.double()(tokens)
    assert in_fp64.dtype == torch.float64
    assert debug_model.bfloat16()(tokens).dtype == torch.float32


def test_the_loss_is_the_cross_entropy_of_the_logits(debug_model: Transformer) -> None:
    tokens = torch.randint(0, 257, (2, 16))
    expected = torch.nn.functional.cross_entropy(debug_model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(debug_model(tokens[:, :-1], tokens[:, 1:]).cross_entropy, expected)


def test_expert_counts_add_up_over_micro_batches_until_reset(debug_model: Transformer) -> None:
    debug_model.train()
    for _ in range(2):
        tokens = torch.randint(0, 257, (2, 10))
        debug_model(tokens, tokens)
    assert debug_model.expert_counts.sum(dim=-1).tolist() == [2 * 20 * 2] * debug_model.config.n_moe_layers
    debug_model.reset_stats()
    assert int(debug_model.expert_counts.sum()) == 0


def test_fresh_weights_have_the_configured_spread() -> None:
    model = Transformer(ModelConfig.preset("debug", dim=128, init_std=0.05))
    assert float(model.head.weight.std()) == pytest.approx(0.05, rel=0.05)
    assert bool((model.norm.weight == 1).all())
    assert all(bool((moe.router.balance_bias == 0).all()) for moe in model.moe_layers())


@pytest.mark.fault(44)
def test_seeds_are_honoured() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Transformer(ModelConfig.preset("debug")).embed.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_all_presets_are_valid() -> None:
    assert set(PRESETS) == {"nano-243m", "tiny", "debug", "kimi-k2", "deepseek-v3", "moonlight-16b"}
    for name in PRESETS:
        ModelConfig.preset(name)
