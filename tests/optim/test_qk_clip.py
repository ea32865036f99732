"""Oracles 4 to 6 of QK-Clip: brute-force logits, layer by layer, with each layer's inputs held fixed."""

from __future__ import annotations

import pytest
import torch
from conftest import lively
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.model.attention import MLA, frequencies
from nanokimi.model.transformer import Transformer
from nanokimi.ops.attention import causal_attention, largest_logits, reference_attention
from nanokimi.optim.muonclip import MuonClip
from nanokimi.optim.qk_clip import clip_factors, qk_clip_

TAU = 3.0


def layer_inputs(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """What each attention layer sees."""
    seen: list[Tensor] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().clone())

    hooks = [block.attention.register_forward_pre_hook(note) for block in model.blocks()]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def brute_force_logits(attention: MLA, x: Tensor) -> Tensor:
    """Largest scaled causal logit per head ``[H]``, straight from the definition in the papers."""
    c = attention.config
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequencies(c))
    q = attention.queries(x, (angles.cos(), angles.sin())).transpose(1, 2)
    q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
    latent, k_rope = attention.remembered(x, (angles.cos(), angles.sin()))
    best = torch.full((c.n_heads,), -torch.inf)
    for head in range(c.n_heads):
        rows = attention.wkv_b.weight[head * (c.qk_nope_head_dim + c.v_head_dim) :][: c.qk_nope_head_dim]
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                for s in range(t + 1):
                    nope = q_nope[b, t, head] @ (rows @ latent[b, s])
                    rope = q_rope[b, t, head] @ k_rope[b, s]
                    best[head] = torch.maximum(best[head], (nope + rope) * c.qk_head_dim**-0.5)
    return best


@pytest.mark.parametrize("q_lora_rank", [24, 0])
@pytest.mark.parametrize("exact", [True, False])
def test_clipping_lands_on_tau_in_every_layer_and_touches_nothing_else(q_lora_rank: int, exact: bool) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", q_lora_rank=q_lora_rank, bias_update_rate=0.0)))
    tokens = torch.randint(0, 257, (2, 12))
    inputs = layer_inputs(model, tokens)
    attentions = [block.attention for block in model.blocks()]
    before = torch.stack([brute_force_logits(a, x) for a, x in zip(attentions, inputs, strict=True)])
    assert bool((before > TAU).any())
    assert bool((before < TAU).any()), "the test needs heads of both kinds"

    model.exact_logits = exact
    model.train()
    model(tokens, tokens)
    if exact:
        torch.testing.assert_close(model.max_logits, before, rtol=1e-5, atol=1e-5)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    noted = model.max_logits.clone()
    MuonClip(model, lr=0.0, adam_lr=0.0, tau=TAU).step()

    after = torch.stack([brute_force_logits(a, x) for a, x in zip(attentions, inputs, strict=True)])
    seen = before if exact else noted
    torch.testing.assert_close(after, before * TAU / seen.clamp_min(TAU), rtol=1e-5, atol=1e-6)
    if exact:
        clipped = before > TAU
        torch.testing.assert_close(after[clipped], torch.full_like(after[clipped], TAU), rtol=1e-5, atol=0)
    assert_only_query_and_key_rows_changed(model, saved, seen > TAU)


def assert_only_query_and_key_rows_changed(model: Transformer, saved: dict[str, Tensor], clipped: Tensor) -> None:
    c = model.config
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else -1
        if name.endswith(("wq.weight", "wq_b.weight")):
            same = (tensor == saved[name]).unflatten(0, (c.n_heads, -1)).flatten(1).all(dim=1)
            assert torch.equal(same, ~clipped[layer]), name
        elif name.endswith("wkv_b.weight"):
            per_head = (tensor == saved[name]).unflatten(0, (c.n_heads, -1))
            assert bool(per_head[:, c.qk_nope_head_dim :].all()), "value rows must not change"
            assert torch.equal(per_head[:, : c.qk_nope_head_dim].flatten(1).all(dim=1), ~clipped[layer]), name
        else:
            assert torch.equal(tensor, saved[name]), name


def test_a_second_clip_on_the_same_inputs_changes_next_to_nothing() -> None:
    model = lively(Transformer(ModelConfig.preset("debug")))
    tokens = torch.randint(0, 257, (2, 12))
    for block, x in zip(model.blocks(), layer_inputs(model, tokens), strict=True):
        qk_clip_([block.attention.qk_rows()], brute_force_logits(block.attention, x)[None], TAU)
        weight = block.attention.wkv_b.weight.detach()
        once = weight.clone()
        qk_clip_([block.attention.qk_rows()], brute_force_logits(block.attention, x)[None], TAU)
        assert float((weight - once).norm() / once.norm()) < 1e-6


def test_bf16_weights_land_on_tau_within_bf16() -> None:
    model = lively(Transformer(ModelConfig.preset("debug"))).bfloat16()
    x = torch.randn(1, 10, model.config.dim)
    attention = model.blocks()[0].attention
    seen = brute_force_logits(attention.float(), x)
    attention.bfloat16()
    qk_clip_([attention.qk_rows()], seen[None], TAU)
    after = brute_force_logits(attention.float(), x)
    torch.testing.assert_close(after, seen.clamp_max(TAU), rtol=1e-2, atol=1e-2)


def test_log_sum_exp_bounds_the_maximum_from_both_sides() -> None:
    for length in (1, 5, 17, 200):
        q, k = 5 * torch.randn(2, 3, length, 16), torch.randn(2, 3, length, 16)
        _, lse = causal_attention(q, k, torch.randn(2, 3, length, 16), 0.25)
        logits = (q @ k.mT * 0.25).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        largest, visible = logits.amax(-1), torch.arange(1, length + 1).float()
        ulp = torch.nextafter(largest, largest + 1) - largest
        assert bool((lse >= largest - 2 * ulp).all())
        assert bool((lse <= largest + visible.log() + 1e-5).all())


def test_chunked_maxima_are_exact_across_chunk_borders() -> None:
    q, k = torch.randn(2, 3, 300, 16), torch.randn(2, 3, 300, 16)
    hidden = torch.ones(300, 300, dtype=torch.bool).triu(1)
    expected = (q @ k.mT * 0.25).masked_fill(hidden, -torch.inf).amax(dim=(0, 2, 3))
    torch.testing.assert_close(largest_logits(q, k, 0.25), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("qk", "value"), [(16, 16), (24, 16), (16, 24)])
def test_fused_attention_equals_the_reference_with_its_gradients(qk: int, value: int) -> None:
    def leaf(width: int) -> Tensor:
        return torch.randn(2, 3, 33, width, requires_grad=True)

    q, k, v = leaf(qk), leaf(qk), leaf(value)
    weight = torch.randn(2, 3, 33, value)
    results = []
    for attend in (causal_attention, reference_attention):
        out, lse = attend(q, k, v, 0.3)
        results.append((out, lse, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_micro_batches_give_the_maximum_of_their_maxima(debug_model: Transformer) -> None:
    debug_model.train()
    maxima = []
    batches = torch.randint(0, 257, (3, 2, 20))
    for batch in batches:
        debug_model.reset_stats()
        debug_model(batch, batch)
        maxima.append(debug_model.max_logits.clone())
    debug_model.reset_stats()
    for batch in batches:
        debug_model(batch, batch)
    assert torch.equal(debug_model.max_logits, torch.stack(maxima).amax(dim=0))
    assert not torch.equal(debug_model.max_logits, maxima[-1])


def test_evaluation_and_generation_leave_the_meter_alone(debug_model: Transformer) -> None:
    before = debug_model.max_logits.clone()
    debug_model(torch.randint(0, 257, (1, 9)))
    assert torch.equal(debug_model.max_logits, before)


def test_heads_without_positive_logits_are_left_alone() -> None:
    seen = torch.tensor([[-torch.inf, -5.0, 0.0, 100.0, 200.0]])
    assert clip_factors(seen, 100.0).tolist() == [[1.0, 1.0, 1.0, 1.0, 0.5]]


def test_tau_zero_switches_clipping_off(debug_model: Transformer) -> None:
    before = debug_model.state_dict()["layers.0.attention.wq_b.weight"].clone()
    debug_model.max_logits.fill_(1e6)
    MuonClip(debug_model, lr=0.0, tau=0.0).step()
    assert torch.equal(debug_model.state_dict()["layers.0.attention.wq_b.weight"], before)
